"""``geoexplora pretrain``: from resolved options to a run folder."""

from __future__ import annotations

import logging
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from geoexplora.datamodules.tiles import TilesDataModule
from geoexplora.errors import DataError
from geoexplora.runs.checkpoint import RunCheckpoint
from geoexplora.runs.folder import RunFolder
from geoexplora.runs.metrics import Metrics, read_metrics
from geoexplora.runs.progress import progress_callback
from geoexplora.tasks.callbacks import MetricsWriter, StepClock, check_finite
from geoexplora.tasks.health import HealthWatch, sample_names
from geoexplora.tasks.opened_run import opened_run
from geoexplora.tasks.opening import open_data
from geoexplora.tasks.parallel import SharedFailure, fit
from geoexplora.tasks.pretrain.building import build_task, whole_tile_size
from geoexplora.tasks.pretrain.callbacks import FirstFeatures, KNNProbe
from geoexplora.tasks.pretrain.exports import RunExport
from geoexplora.tasks.pretrain.task import PretrainTask
from geoexplora.tasks.run_records import DATA_KEY, SOURCE_KEY, data_record, record_start, refuse_other_data
from geoexplora.tasks.schedule import Schedule
from geoexplora.tasks.trainer import make_trainer, quiet_lightning

log = logging.getLogger(__name__)


def pretrain(options: Any) -> dict[str, Any]:
    """Pre-train, or go on with a run.

    Args:
        options: settings of ``geoexplora pretrain`` (``geoexplora.cli.pretrain.PretrainOptions``).

    Returns:
        The last row of the metrics.

    Raises:
        GeoExploraError: if data, weights, settings or the run folder are not as they should be.
    """
    quiet_lightning()
    with opened_run(options) as run:
        datamodule = open_data(options)
        datamodule.whole_tiles, datamodule.unlabelled = whole_tile_size(options), True
        datamodule.setup("fit")
        images = len(datamodule.training_source)
        schedule = Schedule.of(options, images)
        task = build_task(options, datamodule, schedule, run.saved.get(SOURCE_KEY))
        task.data_state = data_record(datamodule)
        refuse_other_data(run.saved.get(DATA_KEY), task.data_state)
        metrics, failure = Metrics(run.folder.metrics_file), SharedFailure(run.folder.path)
        trainer = _trainer(options, schedule, run.folder, metrics, datamodule, task, failure)
        if run.leads:
            run.begin(failure, metrics)
            record_start(
                run.folder, options, "pretrain", task.spec, task.parameter_table(), schedule, task.hparams["lr"],
                images, source=task.source_state,
            )  # fmt: skip
        datamodule.num_batches = schedule.steps * schedule.accumulate
        datamodule.first_batch = run.step * schedule.accumulate
        fit(trainer, failure, task, datamodule=datamodule, ckpt_path=run.checkpoint, weights_only=True)
    record = run.folder.read_run_json()
    log.info("run folder: %s, %d of %d steps done", run.folder.path, record["step"], schedule.steps)
    return dict(record["metrics"])


def _trainer(
    options: Any,
    schedule: Schedule,
    folder: RunFolder,
    metrics: Metrics,
    datamodule: TilesDataModule,
    task: PretrainTask,
    failure: SharedFailure,
) -> Trainer:
    clock, export = StepClock(), RunExport(folder, datamodule)
    names = sample_names(datamodule.training_source)
    writer = MetricsWriter(metrics, options.log_every, schedule.images_per_step, clock, _watch(folder, task), names)
    callbacks: list[Callback] = [failure, writer, progress_callback("pre-training"), FirstFeatures(export)]
    if options.probe_every and _has_labels(datamodule):
        callbacks.append(KNNProbe(metrics, datamodule, options.probe_every, clock))

    def before_save() -> None:
        clock.pause()
        writer.check(task.trainer.global_step)
        check_finite(task.model)
        metrics.sync()

    def on_saved(trainer: Trainer, saved: LightningModule) -> None:
        export(trainer, saved)
        clock.go_on()

    callbacks.append(RunCheckpoint(folder, options.checkpoint_every, before_save=before_save, on_saved=on_saved))
    return make_trainer(options, schedule, folder, callbacks)


def _watch(folder: RunFolder, task: PretrainTask) -> HealthWatch:
    """The judge of the rows; that of a resumed run compares with the run's own start."""
    rows = read_metrics(folder.metrics_file) if folder.metrics_file.exists() else []
    first = next((row for row in rows if "feature_std" in row), None)
    return HealthWatch(task.hparams.get("prototypes"), first)


def _has_labels(datamodule: TilesDataModule) -> bool:
    if not (datamodule.has_split("train") and datamodule.has_split("val")):
        return False
    if len(set(datamodule.eval_dataset("train").labels.tolist())) < 2:
        return False
    try:
        datamodule.source("val")
    except DataError as problem:  # pre-training needs no labels
        log.warning("no kNN probe: %s", problem)
        return False
    return True
