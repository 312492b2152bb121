"""What labelled data say of a fine-tuning: classes, their weights, the spread of values; and whether it can work.

Shapes: N images, K classes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geoexplora.datamodules.targets import check_target
from geoexplora.datamodules.tiles import TilesDataModule
from geoexplora.datasets.tiles import TargetKind
from geoexplora.errors import ConfigError, DataError

log = logging.getLogger(__name__)

KINDS: dict[str, TargetKind] = {
    "classification": "class",
    "multilabel": "multilabel",
    "segmentation": "mask",
    "regression": "value",
}
"""The kind of target of each task."""

_WORDS = {
    "none": "has no labels",
    "class": "has one class for each image",
    "multilabel": "has several labels for each image",
    "mask": "has a mask for each image",
    "value": "has a value for each image",
}

MOST, FEW = 2048, 64
"""Images whose targets are read where a dataset does not list them: to count classes, to look for them."""


@dataclass(frozen=True)
class Labels:
    """What the training data say.

    Attributes:
        classes: names of the K classes; numbers where the dataset has no names; empty for values.
        class_weights: K weights; None: all alike.
        mean: of the values.
        std: of the values.
    """

    classes: tuple[str, ...]
    class_weights: tuple[float, ...] | None = None
    mean: float = 0.0
    std: float = 1.0


def look_at_labels(options: Any, datamodule: TilesDataModule) -> Labels:
    """Check the labels of a dataset against what the options ask for.

    Args:
        options: settings of ``geoexplora finetune``.
        datamodule: the dataset; its ``ignore_index`` is settled here.

    Raises:
        ConfigError: if task or number of classes are not the data's.
        DataError: if a split is missing or holds one class only, or a label is out of range.
    """
    if datamodule.target != KINDS[options.task]:
        raise ConfigError(f"{options.dataset} {_WORDS[datamodule.target]}", _remedy(datamodule.target))
    if options.ignore_index is not None:
        datamodule.ignore_index = options.ignore_index
    if not datamodule.has_split("val"):
        raise DataError(
            f"{options.dataset} has no labelled split val there",
            "Fine-tuning chooses the best weights by it: add it, or split the data.",
        )
    datamodule.source("val")
    if options.task == "regression":
        values = np.array(list(_targets(datamodule, "train", MOST)), dtype=np.float64)
        if len(np.unique(values)) < 2:
            raise DataError("all training images have the same value", "Nothing can be learned from them.")
        return Labels((), None, float(values.mean()), float(values.std()))
    classes = _classes(options, datamodule)
    weights = options.class_weights
    if isinstance(weights, tuple) and len(weights) != len(classes):
        raise ConfigError(
            f"--class-weights has {len(weights)} numbers for {len(classes)} classes",
            f"Give one for each of: {', '.join(classes)}.",
        )
    looked_at, counts = _counts(options.task, datamodule, "train", len(classes), MOST if weights == "balanced" else FEW)
    if counts is not None:
        _check_counts(counts, classes, looked_at, "pixels" if options.task == "segmentation" else "images")
        if weights == "balanced":  # as scikit-learn's: inverse frequencies with a mean of 1 over the samples
            present = counts > 0
            share = counts.sum() / (present.sum() * np.maximum(counts, 1))
            weights = tuple(np.where(present, share, 0.0).tolist())
    _, held = _counts(options.task, datamodule, "val", len(classes), FEW)
    if held is not None and np.count_nonzero(held) < 2:
        found = f"one class, {classes[int(held.argmax())]}" if held.any() else "no class"
        log.warning("the validation images are of %s: their scores say little", found)
    return Labels(classes, weights)


def _remedy(kind: TargetKind) -> str:
    task = next((name for name, known in KINDS.items() if known == kind), None)
    return f"Use --task {task}." if task else "Fine-tuning needs a labelled dataset."


def _classes(options: Any, datamodule: TilesDataModule) -> tuple[str, ...]:
    known, wanted = datamodule.classes, options.num_classes
    if known and wanted not in {None, len(known)}:
        raise ConfigError(
            f"--num-classes {wanted} does not fit {options.dataset}, which has {len(known)}: {_some(known)}",
            "Leave it out: the data tell.",
        )
    if not known and wanted is None:
        raise ConfigError(f"{options.dataset} does not tell its classes", "Give their number: --num-classes N.")
    return known or tuple(f"class {number}" for number in range(wanted))


def _counts(
    task: str, datamodule: TilesDataModule, split: str, count: int, most: int
) -> tuple[int | None, NDArray[np.int64] | None]:
    """How many images were looked at (None: all of them), and their samples (pixels of masks) of each class."""
    if task == "multilabel":
        return None, None
    source, listed = datamodule.source(split), datamodule.eval_dataset(split).labels
    if task == "classification" and (listed >= 0).all():
        outside = np.flatnonzero(listed >= count)
        if len(outside):
            at = int(outside[0])
            raise DataError(
                f"{source.path(at)} has the label {listed[at]}, which is none of {count} classes",
                "Correct its label, or --num-classes.",
            )
        return None, np.bincount(listed, minlength=count)
    found = np.zeros(count, dtype=np.int64)
    for target in _targets(datamodule, split, most):
        values = np.atleast_1d(target).ravel().astype(np.int64)
        if datamodule.ignore_index is not None:
            values = values[values != datamodule.ignore_index]
        found += np.bincount(values, minlength=count)[:count]
    return (None if most >= len(source) else most), found


def _targets(datamodule: TilesDataModule, split: str, most: int) -> Iterator[Any]:
    """Targets of up to so many images, evenly spread."""
    source = datamodule.source(split)
    chosen = np.unique(np.linspace(0, len(source) - 1, min(most, len(source))).astype(int)).tolist()
    for index in chosen:
        yield check_target(source.read(index), source, index, datamodule.ignore_index)


def _check_counts(counts: NDArray[np.int64], classes: tuple[str, ...], looked_at: int | None, what: str) -> None:
    """Refuse what cannot be learned from; of a part of the images only warn."""
    present = np.flatnonzero(counts)
    if len(present) < 2:
        found = "of no class, only of the ignored value"
        if len(present):
            found = f"of one class, {classes[int(present[0])]}"
        if looked_at is None:
            raise DataError(
                f"all training {what} are {found}", "Two classes are needed: check the data and --ignore-index."
            )
        log.warning("the %s of all %d training images looked at are %s", what, looked_at, found)
        return
    absent = [classes[at] for at in np.flatnonzero(counts == 0)]
    if absent and looked_at is None:
        rest = "it cannot be learned" if len(absent) == 1 else "they cannot be learned"
        log.warning("no training %s of %s: %s", what, _some(absent), rest)


def _some(names: Any) -> str:
    listed = list(names)
    return ", ".join(listed[:8]) + (f" and {len(listed) - 8} more" if len(listed) > 8 else "")
