"""Reads the JSON files of fMoW-RGB into arrays."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from geoexplora.datasets.fmow_rgb_boxes import TINY, Box

NAME = re.compile(r"(?P<category>.+)_(?P<location>\d+)_(?P<image>\d+)_(?:ms)?rgb")
"""Names of images and JSON files without their ending."""


class LabelledBox(NamedTuple):
    """A usable bounding box; ``clipped`` says that it lies partly outside the image."""

    category: str
    box: Box
    clipped: bool


@dataclass
class Annotation:
    """What a JSON file says.

    Attributes:
        boxes: the usable boxes, in the file's order.
        problems: what is wrong with others.
        tiny: number of boxes too small to be used.
        timestamp: UTC; None if there is none that can be read.
    """

    boxes: list[LabelledBox] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    tiny: int = 0
    timestamp: datetime | None = None


@dataclass(frozen=True)
class Samples:
    """Bounding boxes of images, as arrays of one row a box, and what could not be used.

    Attributes:
        paths: of the images, relative to the folder that holds the splits, or absolute.
        categories: the distinct categories, sorted.
        codes: position of each row's category in ``categories``.
        location_ids: unique only within a category and split.
        image_ids: unique only within a location.
        timestamps: UTC, to the second; NaT where there is none.
        boxes: (N, 4) x, y, width, height; a width of 0 stands for the whole image.
        clipped: whether the box lies partly outside the image, by the size that the JSON file tells.
        problems: (P, 2) files and what is wrong with them.
        absent: images that are named but not there.
        tiny: (1,) number of boxes too small to be used.
    """

    paths: NDArray[np.bytes_]
    categories: NDArray[np.str_]
    codes: NDArray[np.int64]
    location_ids: NDArray[np.int64]
    image_ids: NDArray[np.int64]
    timestamps: NDArray[np.datetime64]
    boxes: NDArray[np.int32]
    clipped: NDArray[np.bool_]
    problems: NDArray[np.bytes_]
    absent: NDArray[np.bytes_]
    tiny: NDArray[np.int64]


class Row(NamedTuple):
    """One sample before it goes into arrays; see ``Samples``."""

    path: str
    category: str
    location: int
    image: int
    timestamp: datetime | None
    box: Box
    clipped: bool


@dataclass
class Found:
    """What was found in one part of the data; see ``Samples``."""

    rows: list[Row] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    tiny: int = 0


def gather(parts: Iterable[Found]) -> Samples:
    """Put all parts into arrays, in their order."""
    rows: list[Row] = []
    problems: list[tuple[bytes, bytes]] = []
    absent: list[bytes] = []
    tiny = 0
    for part in parts:
        rows += part.rows
        problems += [(os.fsencode(path), reason.encode()) for path, reason in part.problems]
        absent += [os.fsencode(path) for path in part.absent]
        tiny += part.tiny
    categories, codes = np.unique(np.array([row.category for row in rows], dtype=np.str_), return_inverse=True)
    return Samples(
        paths=np.array([os.fsencode(row.path) for row in rows], dtype=np.bytes_),
        categories=categories,
        codes=codes.astype(np.int64),
        location_ids=np.array([row.location for row in rows], dtype=np.int64),
        image_ids=np.array([row.image for row in rows], dtype=np.int64),
        timestamps=np.array([row.timestamp for row in rows], dtype="datetime64[s]"),
        boxes=np.array([row.box for row in rows], dtype=np.int32).reshape(-1, 4),
        clipped=np.array([row.clipped for row in rows], dtype=np.bool_),
        problems=np.array(problems, dtype=np.bytes_).reshape(-1, 2),
        absent=np.array(absent, dtype=np.bytes_),
        tiny=np.array([tiny], dtype=np.int64),
    )


def read_annotation(path: Path) -> Annotation:
    """Read a JSON file. Whatever is wrong with it is told in ``problems``."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        return Annotation(problems=[error.strerror or str(error)])
    except (ValueError, RecursionError):  # also of bytes that are no text, and of too many brackets
        return Annotation(problems=["it is no JSON"])
    found = content.get("bounding_boxes") if isinstance(content, dict) else None
    # Where there is one box only, some files hold it without the list.
    boxes = [found] if isinstance(found, dict) else found
    if not isinstance(boxes, list) or not boxes:
        return Annotation(problems=["it has no bounding_boxes"])
    annotation = Annotation(timestamp=parse_time(content.get("timestamp")))
    size = content.get("img_width"), content.get("img_height")
    for entry in boxes:
        _add_box(annotation, entry, size)
    return annotation


def _add_box(annotation: Annotation, entry: Any, size: tuple[Any, Any]) -> None:
    box = entry.get("box") if isinstance(entry, dict) else None
    if not isinstance(box, list) or len(box) != 4 or not all(_is_number(part) for part in box):
        annotation.problems.append(f"a box is not [x, y, width, height]: {box!r}")
        return
    category = entry.get("category")
    if not isinstance(category, str) or not category:
        annotation.problems.append(f"the box {box} has no category")
        return
    x, y, across, down = (round(part) for part in box)
    # Without a size in the file, a box outside the image shows when the image is read.
    width, height = (side if _is_number(side) else math.inf for side in size)
    if across <= 0 or down <= 0:
        annotation.problems.append(f"the box {box} has no area")
    elif x >= width or y >= height or x + across <= 0 or y + down <= 0:
        of_size = "" if math.inf in (width, height) else f" of {width} x {height} px"
        annotation.problems.append(f"the box {box} lies outside the image{of_size}")
    elif across <= TINY or down <= TINY:
        annotation.tiny += 1
    else:
        clipped = x < 0 or y < 0 or x + across > width or y + down > height
        annotation.boxes.append(LabelledBox(category, (x, y, across, down), clipped))


def _is_number(value: Any) -> bool:
    return type(value) in {int, float} and abs(value) < 2**30  # also false of NaN


def parse_time(text: Any) -> datetime | None:
    """A timestamp such as 2017-02-16T10:21:01Z, in UTC without saying so; None if it cannot be read."""
    try:
        time = datetime.fromisoformat(text)
    except (TypeError, ValueError):
        return None
    return time if time.tzinfo is None else time.astimezone(UTC).replace(tzinfo=None)
