"""``geoexplora pretrain``: from resolved options to a run folder."""

from __future__ import annotations

import hashlib
import logging
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from geoexplora.datamodules.tiles import TilesDataModule
from geoexplora.errors import DataError
from geoexplora.explora import format_table, table_to_json
from geoexplora.runs.checkpoint import RunCheckpoint, find_checkpoint
from geoexplora.runs.folder import RunFolder
from geoexplora.runs.metrics import Metrics, read_metrics
from geoexplora.runs.progress import progress_callback
from geoexplora.tasks.building import build_task, whole_tile_size
from geoexplora.tasks.callbacks import FirstFeatures, KNNProbe, MetricsWriter, StepClock, check_finite
from geoexplora.tasks.exports import RunExport
from geoexplora.tasks.health import HealthWatch, sample_names
from geoexplora.tasks.opening import open_data
from geoexplora.tasks.parallel import SharedFailure, fit, process_rank
from geoexplora.tasks.pretrain_task import DATA_KEY, SOURCE_KEY, PretrainTask
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
    folder = RunFolder(options.output)
    leads, resumes = process_rank() == 0, options.resume and folder.holds_run
    if leads and resumes:
        folder.open()
    try:
        checkpoint = find_checkpoint(folder) if resumes else None
        saved = {} if checkpoint is None else torch.load(checkpoint, mmap=True, weights_only=True)
        step: int = saved.get("global_step", 0)
        datamodule = open_data(options)
        datamodule.whole_tiles, datamodule.unlabelled = whole_tile_size(options), True
        datamodule.setup("fit")
        images = len(datamodule.training_source)
        schedule = Schedule.of(options, images)
        task = build_task(options, datamodule, schedule, saved.get(SOURCE_KEY))
        task.data_state = data_record(datamodule)
        refuse_other_data(saved.get(DATA_KEY), task.data_state)
        metrics, failure = Metrics(folder.metrics_file), SharedFailure(folder.path)
        trainer = _trainer(options, schedule, folder, metrics, datamodule, task, failure)
        if leads:
            if not resumes:
                folder.create()  # only now: wrong input leaves no folder behind
            failure.clear()
            if resumes:
                log.info("going on with %s from step %d", folder.path, step)
            metrics.truncate_after(step if checkpoint else -1)
            _record(folder, options, task, images, schedule)
        datamodule.num_batches = schedule.steps * schedule.accumulate
        datamodule.first_batch = step * schedule.accumulate
        fit(trainer, failure, task, datamodule=datamodule, ckpt_path=checkpoint, weights_only=True)
    finally:
        if leads:
            folder.close()
    record = folder.read_run_json()
    log.info("run folder: %s, %d of %d steps done", folder.path, record["step"], schedule.steps)
    return dict(record["metrics"])


def data_record(datamodule: TilesDataModule) -> dict[str, Any]:
    """What must be the same when a run is resumed: the training rows in their order, and the normalization.

    Returns:
        Plain types: ``images``, ``rows`` (a digest) and ``normalization``.
    """
    source = datamodule.training_source
    rows = hashlib.sha256()
    for name in ("labels", "location_ids", "image_ids"):
        rows.update(np.ascontiguousarray(getattr(source, name, [])).tobytes())
    return {
        "images": len(source),
        "rows": rows.hexdigest(),
        "normalization": datamodule.normalization.to_dict(),
    }


def refuse_other_data(before: dict[str, Any] | None, now: dict[str, Any]) -> None:
    """Refuse to go on with a run on other data than it was started with: order and learning rate would shift.

    Raises:
        DataError: if the rows or the normalization differ.
    """
    if before is None or before == now:
        return
    if (before["images"], before["rows"]) != (now["images"], now["rows"]):
        count = f"{before['images']} images then, {now['images']} now"
        what = f"the training data have changed since this run was started: {count}"
    else:
        what = "the statistics of the training tiles have changed since this run was started"
    raise DataError(what, "Restore the data, or start a new run from this one's weights: --init RUN --output NEW.")


def _record(folder: RunFolder, options: Any, task: PretrainTask, images: int, schedule: Schedule) -> None:
    table = task.parameter_table()
    log.info("what is trained:\n%s", format_table(table))
    log.info(
        "%d images, %d steps of %d images, learning rate %.3g",
        images,
        schedule.steps,
        schedule.images_per_step,
        task.hparams["lr"],
    )
    folder.write_config(options.to_config())
    folder.update_run_json(
        command="pretrain",
        source=task.source_state,
        bands=list(task.spec.bands),
        groups=None if task.spec.groups is None else [list(group) for group in task.spec.groups],
        normalization=dict(task.spec.normalization),
        parameters=table_to_json(table),
        schedule=vars(schedule),
    )


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
