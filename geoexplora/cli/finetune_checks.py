"""Checks of the settings of fine-tuning. Torch-free. See ``geoexplora.cli.checks``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from geoexplora.cli import checks
from geoexplora.cli.command import Check, Finding

LOSSES = {
    "classification": ("ce", "jaccard", "focal"),
    "multilabel": ("bce", "jaccard", "focal"),
    "segmentation": ("ce", "jaccard", "focal", "dice"),
    "regression": ("mse", "mae"),
}
"""Losses by task; the first is the usual one."""

LOW_RANK = ("lora", "adalora", "dora")

_IMAGE_TASKS = ("classification", "multilabel", "regression")
_MEANINGFUL = {
    "pool": _IMAGE_TASKS,
    "head": ("segmentation",),
    "head_width": ("segmentation",),
    "levels": ("segmentation",),
    "group_features": ("segmentation",),
    "ignore_index": ("segmentation",),
    "num_classes": ("classification", "multilabel", "segmentation"),
    "mixup": ("classification", "multilabel"),
    "cutmix": ("classification", "multilabel"),
    "random_erasing": _IMAGE_TASKS,
}
"""Settings that only some tasks know."""


def start(options: Any) -> Iterator[Finding]:
    """There is an encoder to start from, or the sizes of a new one."""
    if options.resume and options.init is None:
        return  # said when it was started
    if options.init is None and options.model is None:
        text = (
            "--init is missing. Name the encoder to fine-tune: a run or a weights file; or give --model to train one"
            " from random weights."
        )
        yield Finding(("init", "model"), text, "unready")
    elif options.init is not None and options.model is not None:
        text = f"--model {options.model} names the sizes of random weights, but --init gives weights. Leave one out."
        yield Finding(("model", "init"), text)
    elif options.model is not None:
        yield from checks.model(options)
    elif not options.resume:
        yield from checks.exists(options)


def method(options: Any) -> Iterator[Finding]:
    """The method suits what it starts from, and takes the settings that are given."""
    if options.method in LOW_RANK:
        if options.init is None and not options.resume:
            text = (
                f"--method {options.method} adapts trained weights, but --model {options.model} starts from random"
                " ones. Name an encoder by --init, or take --method full."
            )
            yield Finding(("method", "init"), text)
        if options.rank < 1:
            yield Finding(("rank",), f"--rank must be at least 1, not {options.rank}.")
        if options.alpha is not None and not options.alpha > 0:
            yield Finding(("alpha",), f"--alpha must be above 0, not {options.alpha:g}.")
    else:
        # Only a warning: of a configuration for LoRA, run again with --method linear to compare, nothing else changes.
        defaults = {name: field.default for name, field in type(options).__dataclass_fields__.items()}
        for name in ("rank", "alpha"):
            value = getattr(options, name)
            if value != defaults[name]:
                text = f"--{name} {value:g} changes nothing here: --method {options.method} has no low-rank updates."
                yield Finding((name, "method"), text, "warning")
    if options.method != "full" and options.layer_decay != 1:
        text = (
            f"--layer-decay {options.layer_decay:g} is for --method full: with {options.method} the encoder's own"
            " weights do not train. Leave it at 1."
        )
        yield Finding(("layer_decay", "method"), text)


def task(options: Any) -> Iterator[Finding]:
    """Settings belong to the task."""
    defaults = {name: field.default for name, field in type(options).__dataclass_fields__.items()}
    for name, tasks in _MEANINGFUL.items():
        value = getattr(options, name)
        if value != defaults[name] and options.task not in tasks:
            text = (
                f"--{name.replace('_', '-')} means nothing for --task {options.task}, only for {' and '.join(tasks)}."
            )
            yield Finding((name, "task"), f"{text} Leave it out.")
    known = LOSSES[options.task]
    if options.loss is not None and options.loss not in known:
        text = f"--loss {options.loss} does not suit --task {options.task}. Choose among: {', '.join(known)}."
        yield Finding(("loss", "task"), text)
    mixed = [name for name in ("mixup", "cutmix") if getattr(options, name)]
    if mixed and options.loss in {"jaccard", "focal"}:
        text = f"--{mixed[0]} makes shares of classes, which --loss {options.loss} does not take. Use {known[0]}."
        yield Finding((mixed[0], "loss"), text)
    uses_ce = (options.loss or known[0]) == "ce"
    for name in ("class_weights", "label_smoothing"):
        if getattr(options, name) and not uses_ce:
            text = f"--{name.replace('_', '-')} belongs to --loss ce of classification and segmentation. Leave it out."
            yield Finding((name, "loss", "task"), text)


def amounts(options: Any) -> Iterator[Finding]:
    """Numbers lie where they can."""
    for name in ("num_classes", "head_width", "eval_every", "patience", "image_size", "patch_size"):
        value = getattr(options, name)
        least = 2 if name == "num_classes" else 1
        if value is not None and value < least:
            yield Finding((name,), f"--{name.replace('_', '-')} must be at least {least}, not {value}.")
    for name in ("mixup", "cutmix"):
        if not getattr(options, name) >= 0:
            yield Finding((name,), f"--{name} must be at least 0, not {getattr(options, name):g}.")
    for name in ("random_erasing", "label_smoothing"):
        if not 0 <= getattr(options, name) < 1:
            text = f"--{name.replace('_', '-')} must be at least 0 and below 1, not {getattr(options, name):g}."
            yield Finding((name,), text)
    low, high = options.crop_scale
    if not 0 < low <= high <= 1:
        text = f"--crop-scale {low:g},{high:g}: expected two shares of the area, rising, above 0 and up to 1."
        yield Finding(("crop_scale",), text)
    weights = options.class_weights
    if isinstance(weights, tuple):
        if not all(weight >= 0 for weight in weights):
            yield Finding(("class_weights",), "--class-weights must be at least 0.")
        elif sum(weight > 0 for weight in weights) < 2:
            text = "--class-weights: at least two must be above 0, as nothing can be learned from one class alone."
            yield Finding(("class_weights",), text)


FINETUNE_CHECKS: dict[Check, tuple[str, ...]] = checks.SOURCE_CHECKS | {
    start: ("init", "model", "resume"),
    method: ("method", "init", "model", "rank", "alpha", "layer_decay", "resume"),
    task: ("task", "loss", *_MEANINGFUL, "class_weights", "label_smoothing"),
    amounts: (
        "num_classes", "head_width", "eval_every", "patience", "image_size", "patch_size", "mixup", "cutmix",
        "random_erasing", "label_smoothing", "crop_scale", "class_weights",
    ),
    checks.groups: ("dataset", "bands", "groups"),
    checks.numbers: (),
    checks.effective_batch: ("batch_size", "devices", "num_nodes", "effective_batch_size"),
    checks.length: ("epochs", "max_steps"),
    checks.output: ("output", "resume"),
}  # fmt: skip
"""Checks of finetune."""
