"""What TorchGeo's datasets say of their images: of which kind it is, the names of the classes, listed labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torchgeo.datasets import NonGeoDataset, So2Sat
from torchgeo.datasets.utils import lazy_import

from geoexplora.datasets.tiles import Target, TargetKind
from geoexplora.errors import DataError
from geoexplora.torchgeo_facts import FACTS


def class_names(dataset: NonGeoDataset) -> tuple[str, ...]:
    """The names of a dataset's classes: its numbers where it tells only how many there are, empty where not even that.

    Args:
        dataset: the dataset.
    """
    facts = FACTS.get(type(dataset).__name__)
    if facts and facts.classes:
        return facts.classes
    count, sets = getattr(dataset, "num_classes", None), getattr(dataset, "class_sets", None)
    if isinstance(sets, Mapping) and count in sets:  # BigEarthNet's 19 or 43
        return tuple(sets[count])
    for attribute in ("classes", "class_set"):
        names = getattr(dataset, attribute, ())
        if isinstance(names, Sequence | np.ndarray) and not isinstance(names, str) and len(names):
            return tuple(str(name) for name in names)
    return tuple(str(number) for number in range(count)) if isinstance(count, int) else ()


def target_kind(dataset: NonGeoDataset, sample: Mapping[str, Any], classes: Sequence[str]) -> TargetKind:
    """The kind of a dataset's targets, by one of its samples.

    A ``mask`` of integers goes before a ``label``. An integer label is a class where the dataset tells its classes,
    else a number, such as a wind speed. Boxes and all else are no target here.

    Args:
        dataset: the dataset.
        sample: one of its samples.
        classes: names of its classes.
    """
    facts = FACTS.get(type(dataset).__name__)
    if facts and facts.target:
        return facts.target
    if any("bbox" in name for name in sample):
        return "none"
    mask, label = sample.get("mask"), sample.get("label")
    if isinstance(mask, Tensor) and not mask.is_floating_point() and mask.ndim - (mask.shape[:1] == (1,)) == 2:
        return "mask"
    if not isinstance(label, Tensor) or label.ndim > 1:
        return "none"
    if label.numel() == 1:
        return "class" if classes and not label.is_floating_point() else "value"
    several = not label.is_floating_point() and len(label) == len(classes)
    return "multilabel" if several else "none"


def read_target(sample: Mapping[str, Any], kind: TargetKind, path: Path) -> Target:
    """The target in a sample.

    Args:
        sample: of the dataset.
        kind: of the dataset's targets.
        path: names the sample in messages.

    Returns:
        See ``geoexplora.datasets.tiles.Tile``.

    Raises:
        DataError: if the sample has none of that kind.
    """
    if kind == "none":
        return None
    name = "mask" if kind == "mask" else "label"
    found = sample.get(name)
    if isinstance(found, Tensor) and (kind == "value" or not found.is_floating_point()):
        if kind == "mask" and found.ndim - (found.shape[:1] == (1,)) == 2:
            mask: NDArray[Any] = found.squeeze(0).numpy() if found.ndim == 3 else found.numpy()
            return mask
        if kind == "multilabel" and found.ndim == 1:
            labels: NDArray[Any] = found.numpy()
            return labels
        if kind == "class" and found.numel() == 1:
            return int(found)
        if kind == "value" and found.numel() == 1:
            return float(found)
    shape = f" of this kind: {found.dtype} {tuple(found.shape)}" if isinstance(found, Tensor) else ""
    raise DataError(
        f"{path} has no {name}{shape}", f"All tiles must have a {name} of the same kind; remove or repair this one."
    )


def listed_labels(dataset: NonGeoDataset, classes: Sequence[str]) -> NDArray[np.int64] | None:
    """The class index of each image, where a dataset lists them: class folders, and So2Sat's file.

    Args:
        dataset: the dataset.
        classes: names of its classes.

    Returns:
        (N,), or None where all images would have to be read.

    Raises:
        DataError: if one is none of the classes.
    """
    targets = getattr(dataset, "targets", None)
    if targets is not None and len(targets) == len(dataset):
        labels = np.array(targets, dtype=np.int64)
    elif isinstance(dataset, So2Sat):
        with lazy_import("h5py").File(dataset.fn, "r") as file:
            labels = file["label"][:].argmax(axis=1).astype(np.int64)
    else:
        return None
    wrong = np.flatnonzero((labels < 0) | (labels >= len(classes)))
    if classes and wrong.size:
        raise DataError(
            f"TorchGeo's {type(dataset).__name__} lists the label {labels[wrong[0]]} for image {wrong[0]}, "
            f"which is none of the {len(classes)} classes 0 to {len(classes) - 1}",
            "Check that the folder is as TorchGeo expects it.",
        )
    return labels
