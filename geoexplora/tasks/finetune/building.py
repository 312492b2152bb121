"""From resolved options to a fine-tuning task."""

from __future__ import annotations

from inspect import signature
from typing import Any

from geoexplora.registry import resolve_blocks
from geoexplora.tasks.finetune.classification import ExPLoRAClassification, ExPLoRARegression
from geoexplora.tasks.finetune.segmentation import ExPLoRASegmentation
from geoexplora.tasks.finetune.task import FineTuneTask
from geoexplora.tasks.labelled_data import Labels
from geoexplora.tasks.schedule import Schedule
from geoexplora.weights.spec import EncoderSpec

TASKS: dict[str, type[FineTuneTask]] = {
    "classification": ExPLoRAClassification,
    "multilabel": ExPLoRAClassification,
    "segmentation": ExPLoRASegmentation,
    "regression": ExPLoRARegression,
}


def build_finetuning(
    options: Any, encoder: Any, spec: EncoderSpec, labels: Labels, ignore_index: int | None, schedule: Schedule
) -> FineTuneTask:
    """The task that the options describe.

    Args:
        options: settings of ``geoexplora finetune``.
        encoder: the encoder; None where a checkpoint brings its weights.
        spec: what it is.
        labels: what the data say.
        ignore_index: mask value that is no class.
        schedule: gives the length.
    """
    task = TASKS[options.task]
    wanted = {*signature(FineTuneTask).parameters, *signature(task).parameters}
    own = {"task", "init", "spec", "bands", "groups", "normalization", "image_size"}  # these the spec holds
    settings = {name: getattr(options, name) for name in wanted - own if hasattr(options, name)}
    scale = schedule.images_per_step / 256
    count, names = len(labels.classes), list(labels.classes)
    settings |= {
        "encoder": encoder,
        "spec": spec.to_metadata(),
        "lr": options.lr * scale,
        "min_lr": options.min_lr * scale,
        "warmup_steps": schedule.warmup_steps,
        "total_steps": schedule.steps,
    }
    if options.task == "regression":
        settings |= {"target_mean": labels.mean, "target_std": labels.std, "loss": options.loss or "mse"}
        return task(**settings)
    settings |= {
        "labels": names,
        "class_weights": None if labels.class_weights is None else list(labels.class_weights),
        "ignore_index": ignore_index,
    }
    if options.task == "multilabel":
        return task(**settings | {"task": "multilabel", "num_labels": count, "num_classes": None})
    settings["num_classes"] = count
    if options.task == "segmentation":
        levels = None if options.levels is None else list(resolve_blocks(options.levels, spec.depth))
        settings |= {"levels": levels, "width": options.head_width, "loss": options.loss or "ce"}
    return task(**settings)
