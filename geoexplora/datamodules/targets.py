"""Whether a tile's target is what its dataset says; and how it is told in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geoexplora.datasets.tiles import Target, Tile, TileSource
from geoexplora.errors import DataError


def check_target(
    tile: Tile, source: TileSource, index: int, ignore_index: int | None = None, num_classes: int | None = None
) -> Target:
    """The target of a tile, known to fit its image and the classes.

    Where nobody tells the number of classes, any class from 0 on will do.

    Args:
        tile: the tile.
        source: where it comes from.
        index: the one that was asked for.
        ignore_index: the value of a mask that is no class.
        num_classes: number of classes; None: as many as the source tells.

    Raises:
        DataError: if a class, a value of a mask, or a vector of labels is out of range, a mask is of another size than
            its image, or a number is not finite; names the file.
    """
    target, count = tile.target, num_classes or len(source.classes)
    if isinstance(target, np.ndarray) and source.target == "mask":
        problem = _mask_problem(target, tile.image.shape[1:], count, ignore_index)
    elif isinstance(target, np.ndarray):
        problem = _vector_problem(target, count)
    elif isinstance(target, float):
        problem = "" if math.isfinite(target) else f"the value {target}"
    else:
        problem = "" if target is None or _within(target, target, count) else f"the label {target}{_not_in(count)}"
    if not problem:
        return target
    name = f"the tile that stands in for {source.path(index)}" if tile.unreadable >= 0 else str(source.path(index))
    raise DataError(f"{name} has {problem}", _REMEDIES[source.target])


_REMEDIES = {
    "class": "Correct its label, or remove the tile.",
    "multilabel": "Correct its labels, or remove the tile.",
    "mask": "Correct or remove the mask; for pixels without a class name their value: --ignore-index VALUE.",
    "value": "Correct its label, or remove the tile.",
}


def _within(low: int, high: int, count: int) -> bool:
    return low >= 0 and (high < count or count == 0)


def _not_in(count: int) -> str:
    return f", which is none of the {count} classes 0 to {count - 1}" if count else ", which is no class"


def _mask_problem(mask: NDArray[Any], size: tuple[int, ...], count: int, ignore_index: int | None) -> str:
    if mask.shape != size:
        shapes = [" x ".join(map(str, shape)) for shape in (mask.shape, size)]
        return f"a mask of {shapes[0]} pixels, but an image of {shapes[1]}"
    if _within(int(mask.min()), int(mask.max()), count):
        return ""
    values = np.unique(mask)
    wrong = [value for value in values.tolist() if value != ignore_index and not _within(value, value, count)]
    return f"the value {wrong[0]} in its mask{_not_in(count)}" if wrong else ""


def _vector_problem(labels: NDArray[Any], count: int) -> str:
    if count and labels.shape != (count,):
        return f"a vector of {len(labels)} labels, but there are {count} classes"
    wrong = labels[(labels != 0) & (labels != 1)]
    return f"the value {wrong[0]} in its vector of labels, which are 0 or 1" if wrong.size else ""


def target_title(label: Any, classes: Sequence[str]) -> str | None:
    """A label in words: the names of its classes, or the number.

    Args:
        label: of one sample, as in a batch: (), int64 or float32, or (K,), int64; None without one.
        classes: names of the K classes; empty where they are not known.
    """
    if label is None:
        return None
    if label.ndim:
        return ", ".join(classes[at] if classes else str(at) for at in label.nonzero().flatten().tolist())
    return classes[int(label)] if classes else f"{float(label):g}"
