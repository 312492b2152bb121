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
from geoexplora.errors import ConfigError, DataError, SplitNotFoundError

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
    """What the data say.

    Attributes:
        classes: names of the K classes; numbers where the dataset has no names; empty for values.
        class_weights: K weights; None: all alike.
        mean: of the training values.
        std: of the training values.
        tested_on: the split that the best weights are tested on in the end.
    """

    classes: tuple[str, ...]
    class_weights: tuple[float, ...] | None = None
    mean: float = 0.0
    std: float = 1.0
    tested_on: str = "test"


@dataclass(frozen=True)
class _Counts:
    """How often the classes are met in a split.

    Attributes:
        samples: (K,) images, or pixels of masks, of each class.
        images: number of images looked at.
        are_all: whether these are all of the split.
    """

    samples: NDArray[np.int64]
    images: int
    are_all: bool


def look_at_labels(options: Any, datamodule: TilesDataModule) -> Labels:
    """Check the labels of all splits against what the options ask for.

    Args:
        options: settings of ``geoexplora finetune``.
        datamodule: the dataset; its ``ignore_index`` and ``num_classes`` are settled here.

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
    _refuse_other_targets(options, datamodule, "val")
    if options.task == "regression":
        values = np.array(list(_targets(datamodule, "train", MOST)), dtype=np.float64)
        if len(np.unique(values)) < 2:
            raise DataError("all training images have the same value", "Nothing can be learned from them.")
        return Labels((), None, float(values.mean()), float(values.std()), _test_split(options, datamodule))
    classes = _classes(options, datamodule)
    datamodule.num_classes = len(classes)
    weights = options.class_weights
    if isinstance(weights, tuple) and len(weights) != len(classes):
        raise ConfigError(
            f"--class-weights has {len(weights)} numbers for {len(classes)} classes",
            f"Give one for each of: {', '.join(classes)}.",
        )
    counts = _counts(options.task, datamodule, "train", MOST if weights == "balanced" else FEW)
    _check_training(options.task, counts, classes, datamodule.ignore_index)
    if weights == "balanced":
        weights = _balanced(counts, datamodule.ignore_index)
    _check_validation(options.task, _counts(options.task, datamodule, "val", FEW), classes)
    return Labels(classes, weights, tested_on=_test_split(options, datamodule))


def _remedy(kind: TargetKind) -> str:
    task = next((name for name, known in KINDS.items() if known == kind), None)
    return f"Use --task {task}." if task else "Fine-tuning needs a labelled dataset."


def _refuse_other_targets(options: Any, datamodule: TilesDataModule, split: str) -> None:
    """Splits of a dataset may differ: of some the test split has no labels."""
    kind = datamodule.source(split).target
    if kind != KINDS[options.task]:
        raise DataError(
            f"the split {split} of {options.dataset} {_WORDS[kind]}",
            f"Fine-tuning needs one that, like train, {_WORDS[KINDS[options.task]]}: add them, or split the data.",
        )


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


def _test_split(options: Any, datamodule: TilesDataModule) -> str:
    """``test``, known to have good labels; ``val`` where it has none or is not there.

    It is opened before the training, which may take days: what is wrong with it must not come out at the end.
    """
    if not datamodule.has_split("test"):
        return "val"
    try:
        source = datamodule.source("test")
    except SplitNotFoundError as problem:
        log.warning("%s: the best weights will be tested on the val split", str(problem).splitlines()[0])
        return "val"
    if source.target == "none":
        log.info("the test split has no labels: the best weights will be tested on the val split")
        return "val"
    _refuse_other_targets(options, datamodule, "test")
    if options.task == "regression":
        list(_targets(datamodule, "test", FEW))
    else:
        _counts(options.task, datamodule, "test", FEW)
    return "test"


def _counts(task: str, datamodule: TilesDataModule, split: str, most: int) -> _Counts:
    """Count the classes of a split, in up to so many images where it does not list them.

    Raises:
        DataError: if a target is not what it should be; names the file.
    """
    source, count = datamodule.source(split), datamodule.num_classes or 0
    if task == "classification" and ((listed := datamodule.eval_dataset(split).labels) >= 0).all():
        outside = np.flatnonzero(listed >= count)
        if len(outside):
            at = int(outside[0])
            raise DataError(
                f"{source.path(at)} has the label {listed[at]}, which is none of {count} classes",
                "Correct its label, or --num-classes.",
            )
        return _Counts(np.bincount(listed, minlength=count), len(listed), True)
    samples, images = np.zeros(count, dtype=np.int64), 0
    for target in _targets(datamodule, split, most):
        images += 1
        values = np.atleast_1d(target).ravel().astype(np.int64)
        if task == "multilabel":
            samples += values
            continue
        if datamodule.ignore_index is not None:
            values = values[values != datamodule.ignore_index]
        samples += np.bincount(values, minlength=count)
    return _Counts(samples, images, images == len(source))


def _targets(datamodule: TilesDataModule, split: str, most: int) -> Iterator[Any]:
    """Targets of up to so many images, evenly spread."""
    source = datamodule.source(split)
    chosen = np.unique(np.linspace(0, len(source) - 1, min(most, len(source))).astype(int)).tolist()
    for index in chosen:
        yield check_target(source.read(index), source, index, datamodule.ignore_index, datamodule.num_classes)


def _check_training(task: str, counts: _Counts, classes: tuple[str, ...], ignored: int | None) -> None:
    """Refuse what cannot be learned from; of a part of the images only warn."""
    what, sameness = _what(task), _sameness(task, counts, classes)
    if sameness and counts.are_all:
        remedy = "check the masks and --ignore-index" if task == "segmentation" else "check the labels"
        raise DataError(f"all training {what} {sameness}", f"Two classes are needed: {remedy}.")
    if sameness:
        log.warning("all training %s of the %d images looked at %s", what, counts.images, sameness)
        return
    absent = [name for at, name in enumerate(classes) if counts.samples[at] == 0 and at != ignored]
    if not absent:
        return
    if counts.are_all:
        rest = "it cannot be learned" if len(absent) == 1 else "they cannot be learned"
        log.warning("no training %s of %s: %s", what, _some(absent), rest)
    elif counts.images >= MOST:  # of a few images most lack some class, which says nothing
        log.warning("no training %s of %s in the %d images looked at", what, _some(absent), counts.images)


def _check_validation(task: str, counts: _Counts, classes: tuple[str, ...]) -> None:
    """Refuse what no best weights can be chosen by, and warn of what says little."""
    what, sameness = _what(task), _sameness(task, counts, classes)
    if task == "segmentation" and counts.are_all and not counts.samples.any():
        raise DataError(
            f"all validation {what} {sameness}",
            "The best weights are chosen by them: check the masks and --ignore-index.",
        )
    if sameness:
        where = "" if counts.are_all else f" of the {counts.images} images looked at"
        log.warning("all validation %s%s %s: their scores say little", what, where, sameness)


def _what(task: str) -> str:
    return "pixels" if task == "segmentation" else "images"


def _sameness(task: str, counts: _Counts, classes: tuple[str, ...]) -> str:
    """What all images or pixels have in common, so that nothing tells them apart; empty where they differ."""
    present = np.flatnonzero(counts.samples)
    if task == "multilabel":
        differ = (counts.samples > 0) & (counts.samples < counts.images)
        return "" if differ.any() else f"have the same labels: {_some(classes[at] for at in present) or 'none'}"
    if len(present) > 1:
        return ""
    return f"are of one class, {classes[present[0]]}" if len(present) else "are of no class, only of the ignored value"


def _balanced(counts: _Counts, ignored: int | None) -> tuple[float, ...]:
    """As scikit-learn's: inverse frequencies with a mean of 1 over the samples.

    A class that only a sample of the images lacks weighs as much as the rarest one in it, not nothing.
    """
    samples = counts.samples
    present = samples > 0
    if not present.any():
        return (1.0,) * len(samples)
    weights = np.where(present, samples.sum() / (present.sum() * np.maximum(samples, 1)), 0.0)
    if not counts.are_all:
        unseen = ~present
        if ignored is not None and 0 <= ignored < len(unseen):
            unseen[ignored] = False
        if unseen.any():
            weights[unseen] = weights.max()
            log.warning("classes that these images lack get the weight of the rarest one, %.3g", weights.max())
    return tuple(weights.tolist())


def _some(names: Any) -> str:
    listed = list(names)
    return ", ".join(listed[:8]) + (f" and {len(listed) - 8} more" if len(listed) > 8 else "")
