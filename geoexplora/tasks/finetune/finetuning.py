"""``geoexplora finetune``: from resolved options to a run folder."""

from __future__ import annotations

import csv
import io
import logging
from functools import partial
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torchmetrics.wrappers import ClasswiseWrapper

from geoexplora.datamodules.tiles import TilesDataModule
from geoexplora.errors import ConfigError
from geoexplora.runs.checkpoint import RunCheckpoint
from geoexplora.runs.folder import RunFolder
from geoexplora.runs.metrics import Metrics, read_metrics
from geoexplora.runs.plots import plot_loss
from geoexplora.runs.progress import progress_callback
from geoexplora.tasks.callbacks import MetricsWriter, StepClock, check_finite
from geoexplora.tasks.finetune.best import best_step, best_weights, load_best, remove_outdated
from geoexplora.tasks.finetune.building import build_finetuning
from geoexplora.tasks.finetune.evaluation import Evaluation, evaluate
from geoexplora.tasks.finetune.exports import export_model
from geoexplora.tasks.finetune.pictures import draw_predictions
from geoexplora.tasks.finetune.task import FineTuneTask
from geoexplora.tasks.finetune.validation import Validation
from geoexplora.tasks.health import sample_names
from geoexplora.tasks.labelled_data import KINDS, look_at_labels
from geoexplora.tasks.opened_run import opened_run
from geoexplora.tasks.opening import open_encoder, open_for
from geoexplora.tasks.parallel import SharedFailure, fit
from geoexplora.tasks.run_records import DATA_KEY, SOURCE_KEY, data_record, record_start, refuse_other_data
from geoexplora.tasks.schedule import Schedule
from geoexplora.tasks.trainer import make_trainer, quiet_lightning
from geoexplora.weights.atomic import write_text
from geoexplora.weights.spec import EncoderSpec

log = logging.getLogger(__name__)


def finetune(options: Any) -> dict[str, float]:
    """Fine-tune, or go on with a run.

    Args:
        options: settings of ``geoexplora finetune`` (``geoexplora.cli.finetune.FinetuneOptions``).

    Returns:
        Metrics of the best weights: ``test_*`` where the data have a labelled test split, ``val_*`` otherwise.

    Raises:
        GeoExploraError: if data, weights, settings or the run folder are not as they should be.
    """
    quiet_lightning()
    with opened_run(options) as run:
        encoder, spec, datamodule, record = _open(options, run.saved)
        labels = look_at_labels(options, datamodule)
        datamodule.setup("fit")
        images = len(datamodule.training_source)
        schedule = Schedule.of(options, images)
        task = build_finetuning(options, encoder, spec, labels, datamodule.ignore_index, schedule)
        task.extra_state = {DATA_KEY: data_record(datamodule), SOURCE_KEY: record}
        refuse_other_data(run.saved.get(DATA_KEY), task.extra_state[DATA_KEY])
        metrics, failure = Metrics(run.folder.metrics_file), SharedFailure(run.folder.path)
        validation = _validation(options, run.folder, datamodule, metrics, task, schedule)
        trainer = _trainer(options, schedule, run.folder, metrics, validation, task, failure)
        if run.leads:
            run.begin(failure, metrics)
            record_start(
                run.folder, options, "finetune", task.spec, task.parameter_table(), schedule, task.hparams["lr"],
                images, source=record, classes=task.hparams.get("labels"),
            )  # fmt: skip
        datamodule.num_batches = schedule.steps * schedule.accumulate
        datamodule.first_batch = run.step * schedule.accumulate
        if run.saved:  # processes that fork, and runs that have ended, do not load it by themselves
            task.load_state_dict(run.saved["state_dict"])
        if not _has_stopped(run.saved, validation):
            fit(trainer, failure, task, datamodule=datamodule, ckpt_path=run.checkpoint, weights_only=True)
        if not run.leads:
            return {}
        return _finish(options, run.folder, task, datamodule, labels.tested_on, validation.state_key)


def format_metrics(metrics: dict[str, float]) -> str:
    """Metrics as lines of text."""
    width = max(map(len, metrics), default=0)
    return "\n".join(f"{name:<{width}}  {value:.4f}" for name, value in metrics.items())


def _open(options: Any, saved: dict[str, Any]) -> tuple[Any, EncoderSpec, TilesDataModule, Any]:
    """Encoder, description, data and record of the source; of a resumed run without reading ``--init`` again."""
    if saved:
        spec = EncoderSpec.from_metadata(saved["hyper_parameters"]["spec"])
        return None, spec, open_for(options, spec, KINDS[options.task]), saved.get(SOURCE_KEY)
    opened = open_encoder(options, KINDS[options.task])
    return opened.encoder, opened.spec, opened.datamodule, opened.record


def _validation(
    options: Any,
    folder: RunFolder,
    datamodule: TilesDataModule,
    metrics: Metrics,
    task: FineTuneTask,
    schedule: Schedule,
) -> Validation:
    monitor = options.monitor or task.monitor
    single = [name for name, metric in task.new_metrics().items() if not isinstance(metric, ClasswiseWrapper)]
    names = [f"val_{name}" for name in (*single, "loss")]
    if monitor not in names:
        raise ConfigError(
            f"--monitor {monitor} is no metric of --task {options.task}",
            f"Its metrics are: {', '.join(names)}.",
        )
    every = options.eval_every or max(1, round(schedule.steps_per_epoch))
    mode = "min" if monitor.endswith("loss") else task.mode
    return Validation(datamodule, metrics, folder.best_file, every, monitor, mode, options.patience, StepClock())


def _trainer(
    options: Any,
    schedule: Schedule,
    folder: RunFolder,
    metrics: Metrics,
    validation: Validation,
    task: FineTuneTask,
    failure: SharedFailure,
) -> Trainer:
    clock = validation.clock
    names = sample_names(validation.datamodule.source("train"))
    writer = MetricsWriter(metrics, options.log_every, schedule.images_per_step, clock, None, names)
    callbacks: list[Callback] = [failure, writer, progress_callback("fine-tuning"), validation]

    def before_save() -> None:
        clock.pause()
        writer.check(task.trainer.global_step)
        check_finite(task.model)
        metrics.sync()

    exported = 0  # step of the best weights that lie in the run folder

    def on_saved(trainer: Trainer, saved: LightningModule) -> None:
        nonlocal exported
        step = trainer.global_step
        if validation.best_score is None or validation.best_step == step:
            export_model(folder, task, options.task, step)
        elif validation.best_step != exported:
            with best_weights(folder.best_file(validation.best_step), task) as best:
                export_model(folder, task, options.task, best)
        exported = validation.best_step
        remove_outdated(folder, validation.state_key)
        _update(folder, step, validation.monitor)
        clock.go_on()

    callbacks.append(RunCheckpoint(folder, options.checkpoint_every, before_save=before_save, on_saved=on_saved))
    return make_trainer(options, schedule, folder, callbacks)


def _has_stopped(saved: dict[str, Any], validation: Validation) -> bool:
    """Whether a run ended before its last step because nothing got better."""
    state = saved.get("callbacks", {}).get(validation.state_key)
    if state:
        validation.load_state_dict(state)
    return validation.has_stopped


def _update(folder: RunFolder, step: int, monitor: str) -> None:
    rows = read_metrics(folder.metrics_file)
    folder.update_run_json(step=step, metrics={name: value for row in rows for name, value in row.items()})
    plot_loss(folder.metrics_file, folder.loss_plot, probe=monitor)


def _finish(
    options: Any, folder: RunFolder, task: FineTuneTask, datamodule: TilesDataModule, split: str, state_key: str
) -> dict[str, float]:
    """Take the best weights that the last checkpoint knows, test them, and bring the run folder up to date."""
    step = load_best(folder.best_file(best_step(folder.last_checkpoint, state_key)), task)
    remove_outdated(folder, state_key)  # a run may have been killed before it could
    export_model(folder, task, options.task, step)
    device = torch.device("cuda" if options.accelerator != "cpu" and torch.cuda.is_available() else "cpu")
    task.to(device)
    log.info("best weights, of step %d, on the %s split ...", step, split)
    check = partial(datamodule.check_unreadable, split=split)
    autocast = torch.bfloat16 if options.precision == "bf16" else None
    found = evaluate(task, datamodule.eval_dataloader(split), autocast, check)
    scores = {f"{split}_{name}": value for name, value in found.metrics.items()}
    folder.update_run_json(best={"step": step, "split": split, "metrics": scores})
    _write_predictions(folder, task, datamodule, split, found)
    draw_predictions(folder, task, datamodule, split, found)
    log.info("run folder: %s", folder.path)
    return {name: value for name, value in scores.items() if "Classwise" not in name}


def _write_predictions(
    folder: RunFolder, task: FineTuneTask, datamodule: TilesDataModule, split: str, found: Evaluation
) -> None:
    """predictions.csv: a row for each image."""
    name, classes = sample_names(datamodule.source(split)), task.hparams.get("labels") or ()
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if task.target_key == "mask":
        writer.writerow(["file", "right"])
        writer.writerows([name(int(i)), f"{share:.4f}"] for i, share in zip(found.index, found.predicted, strict=True))
    elif found.confusion is not None:
        writer.writerow(["file", "label", "prediction", "probability"])
        best = found.predicted.argmax(1)
        for i, truth, at, row in zip(found.index, found.truth, best, found.predicted, strict=True):
            writer.writerow([name(int(i)), classes[int(truth)], classes[int(at)], f"{row[at]:.4f}"])
    else:
        truth, told = (np.atleast_2d(x.T).T for x in (found.truth, found.predicted))
        kinds = classes if len(classes) == truth.shape[1] else [str(n) for n in range(truth.shape[1])]
        writer.writerow(["file", *(f"label {kind}" for kind in kinds), *(f"prediction {kind}" for kind in kinds)])
        for i, row, other in zip(found.index, truth, told, strict=True):
            writer.writerow([name(int(i)), *(f"{value:g}" for value in (*row, *other))])
    write_text(folder.predictions_file, text.getvalue())
