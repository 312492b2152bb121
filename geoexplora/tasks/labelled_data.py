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

LOOKED_AT = 2048
"""Training images whose targets are read where a dataset does not list them."""


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
        values = np.array([value for _, value in _targets(datamodule)], dtype=np.float64)
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
    counts = _counts(options.task, datamodule, len(classes), weights == "balanced")
    if counts is not None:
        _check_counts(counts, classes, "pixels" if options.task == "segmentation" else "images")
        if weights == "balanced":  # as scikit-learn's: inverse frequencies with a mean of 1 over the samples
            present = counts > 0
            share = counts.sum() / (present.sum() * np.maximum(counts, 1))
            weights = tuple(np.where(present, share, 0.0).tolist())
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


def _counts(task: str, datamodule: TilesDataModule, count: int, needed: bool) -> NDArray[np.int64] | None:
    """Training samples of each class (pixels of masks), where they are listed or needed."""
    listed = datamodule.eval_dataset("train").labels
    if task == "classification" and (listed >= 0).all():
        outside = np.flatnonzero(listed >= count)
        if len(outside):
            at = int(outside[0])
            raise DataError(
                f"{datamodule.source('train').path(at)} has the label {listed[at]}, which is none of {count} classes",
                "Correct its label, or --num-classes.",
            )
        return np.bincount(listed, minlength=count)
    if not needed or task == "multilabel":
        return None
    found = np.zeros(count, dtype=np.int64)
    for _, target in _targets(datamodule):
        values = np.atleast_1d(target).ravel().astype(np.int64)
        if datamodule.ignore_index is not None:
            values = values[values != datamodule.ignore_index]
        found += np.bincount(values, minlength=count)[:count]
    return found


def _targets(datamodule: TilesDataModule) -> Iterator[tuple[int, Any]]:
    """Index and target of up to ``LOOKED_AT`` training images, evenly spread."""
    source = datamodule.source("train")
    chosen = np.unique(np.linspace(0, len(source) - 1, min(LOOKED_AT, len(source))).astype(int)).tolist()
    for index in chosen:
        yield index, check_target(source.read(index), source, index, datamodule.ignore_index)


def _check_counts(counts: NDArray[np.int64], classes: tuple[str, ...], what: str) -> None:
    present = np.flatnonzero(counts)
    if not len(present):
        raise DataError("the training masks hold no class at all", "Check --ignore-index and the masks.")
    if len(present) == 1:
        raise DataError(
            f"all training {what} are of one class, {classes[int(present[0])]}", "Labels of two classes are needed."
        )
    absent = [classes[at] for at in np.flatnonzero(counts == 0)]
    if absent:
        log.warning(
            "no training %s of %s: %s cannot be learned", what, _some(absent), "it" if len(absent) == 1 else "they"
        )


def _some(names: Any) -> str:
    listed = list(names)
    return ", ".join(listed[:8]) + (f" and {len(listed) - 8} more" if len(listed) > 8 else "")
