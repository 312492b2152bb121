"""fMoW-RGB: pan-sharpened images of functional map of the world locations (Christie et al., arXiv 1711.07846)."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from geoexplora.bands import RGB, nearest
from geoexplora.datasets import jpeg
from geoexplora.datasets.fmow_index import OFFICIAL_CLASSES
from geoexplora.datasets.fmow_rgb_annotations import Samples
from geoexplora.datasets.fmow_rgb_boxes import CROPS, Box, Crop, crop_window
from geoexplora.datasets.fmow_rgb_list import find_lists, index_list, read_list
from geoexplora.datasets.fmow_rgb_tree import (
    VARIANTS,
    Variant,
    category_folders,
    find_base,
    find_tree,
    index_tree,
    split_name,
)
from geoexplora.datasets.tile_dataset import Sample, TileDataset, fmow_classes, outside_years
from geoexplora.datasets.tiles import UnreadableTiles, UnusableTileError
from geoexplora.errors import ConfigError, DataError, SplitNotFoundError

logger = logging.getLogger(__name__)

FALSE_DETECTION = "false_detection"
"""The 63rd category: boxes that hold nothing of the 62."""


class FMoWRGB(TileDataset):
    """fMoW-RGB, or any tree of the same layout: one sample for each bounding box.

    The images of ``train`` and ``val`` lie beside JSON files with their bounding boxes::

        fmow-rgb/<split>/<category>/<category>_<location_id>/<category>_<location_id>_<image_id>_rgb.jpg

    Those of ``test`` and ``seq`` need the ground truth archive beside them: ``find_tree``. Reading all JSON files takes
    a while the first time only: ``index_tree``.

    If there is one of SatMAE's lists (``train_62classes.csv``, ``val_62classes.csv``, ``test_62classes.csv``; columns
    label, path, timestamp by position), it decides, with one sample for each row: ``index_list``. Its paths are
    relative to the folder of the splits, or absolute; those of another machine are found from the folder
    ``fmow-rgb/`` or the split's folder on.

    Labels go by name, classes are in alphabetical order. Boxes not wider or higher than 2 px are left out, as in
    fMoW's baseline, whatever the crop. Boxes partly outside the image are clipped. Samples are described in
    ``TileDataset``; images hold digital numbers 0 to 255.

    Args:
        root: the folder that holds ``fmow-rgb/`` (or ``fmow/``), or that folder; lists beside or in it.
        split: ``train``, ``val``, ``test_gt`` (``test`` means the same) or ``seq_gt`` (``seq``).
        bands: the bands to return, in this order.
        transforms: applied to each sample.
        crop: ``tight``: the box itself; ``full``: the whole image; ``baseline``: the box with context by the rule of
            fMoW's baseline, which ``crop_window`` states with its source.
        variant: ``rgb``: pan-sharpened; ``msrgb``: of coarse resolution, with boxes of its own.
        false_detection: keep boxes of ``false_detection`` as the last class.
        missing: what to do about images that are not there, and boxes that cannot be used: ``error``, or ``skip`` with
            a warning.
        years: first and last year to keep; None keeps all.
        max_unreadable: the largest bearable share of unreadable images; one is always borne.
        least_side: images may be read at 1/2, 1/4 or 1/8 of their resolution as long as each side of the crop keeps
            at least so many pixels; None: always in full resolution. May be set at any time.

    Raises:
        SplitNotFoundError: if none of the images is there.
        DataError: if there is no data, a list or JSON file is malformed, no sample is left after the filters, labels or
            images are missing, or boxes lie outside their image or have no area.
        ConfigError: if a band, crop or variant is unknown, or ``least_side`` is not positive.
    """

    sensor = RGB

    def __init__(
        self,
        root: Path | str,
        split: str = "train",
        bands: Sequence[str] = RGB.band_names,
        transforms: Callable[[Sample], Sample] | None = None,
        *,
        crop: Crop = "baseline",
        variant: Variant = "rgb",
        false_detection: bool = False,
        missing: Literal["error", "skip"] = "error",
        years: tuple[int, int] | None = None,
        max_unreadable: float = 0.1,
        least_side: int | None = None,
    ) -> None:
        check_choices(crop, variant)
        if least_side is not None and least_side < 1:
            raise ConfigError(f"a least side of {least_side} px cannot be", "Give at least 1, or None.")
        self.root = Path(root)
        self.split = split_name(split)
        self.bands = RGB.select(bands)
        self.transforms = transforms
        self.crop: Crop = crop
        self.least_side = least_side
        self._keep = list(RGB.indices(self.bands))
        self._base = find_base(self.root)

        lists = find_lists(self.root, self._base)
        entries = {split: read_list(path) for split, path in lists.items()}
        listed = self.split in lists
        self._origin = lists[self.split] if listed else self._base / self.split

        def index(fresh: bool) -> Samples:
            if listed:
                return index_list(self._origin, entries[self.split], self._base, crop, variant, fresh)
            return index_tree(find_tree(self._base, self.split), variant, fresh)

        samples = index(fresh=False)
        if len(samples.problems) and missing == "error":  # files may have been corrected since they were indexed
            samples = index(fresh=True)
        named = {label for listed in entries.values() for label in listed.labels}
        self.classes = self._classes(named | category_folders(self._base), samples)
        if false_detection:
            self.classes = (*self.classes, FALSE_DETECTION)
            if FALSE_DETECTION not in samples.categories:
                logger.warning("%s has no boxes of %s", self._origin, FALSE_DETECTION)

        rows = self._rows(samples, years, missing)
        codes = np.array([self.classes.index(name) if name in self.classes else -1 for name in samples.categories])
        self.labels = codes.astype(np.int64)[samples.codes[rows]]
        self.location_ids = samples.location_ids[rows]
        self.image_ids = samples.image_ids[rows]
        self.timestamps = samples.timestamps[rows]
        self._paths, self._boxes = samples.paths[rows], samples.boxes[rows]
        self.unreadable = UnreadableTiles(len(rows), max_unreadable)

    def path(self, index: int) -> Path:
        """The file of a sample's image."""
        return self._base / os.fsdecode(self._paths[index])

    def load(self, index: int) -> NDArray[np.uint8]:
        """The crop of that very index.

        Returns:
            (C, h, w).

        Raises:
            UnusableTileError: if its image is missing, unreadable or truncated, or its box lies outside.
        """
        try:
            content = self.path(index).read_bytes()
        except OSError as error:
            raise UnusableTileError(error.strerror or str(error)) from error
        header = jpeg.read_header(content)
        x, y, across, down = self._boxes[index].tolist()
        box: Box = (x, y, across, down) if across else (0, 0, header.width, header.height)
        try:
            window = crop_window(box, header.width, header.height, self.crop if across else "full")
        except ValueError as error:
            raise UnusableTileError(str(error)) from error
        image = jpeg.decode(content, header, window, self.least_side)
        return image if self._keep == [0, 1, 2] else image[self._keep]

    def fingerprint(self) -> bytes:
        """Files, boxes and crop of the samples: what their pixels depend on."""
        return super().fingerprint() + self._boxes.tobytes() + f"{self.crop} {self.least_side}".encode()

    def _classes(self, named: set[str], samples: Samples) -> tuple[str, ...]:
        classes = fmow_classes(named - {FALSE_DETECTION})
        if classes != OFFICIAL_CLASSES and self.split == "train":  # once for all splits
            logger.info("classes: the %d found in lists and folders, not fMoW's 62", len(classes))
        unknown = sorted(set(samples.categories.tolist()) - {*classes, FALSE_DETECTION})
        if unknown:
            raise DataError(
                f"{self._origin} has boxes of the category {unknown[0]!r}, which is no class",
                f"{nearest(unknown[0], classes)}Correct the JSON files, or name a folder after it.",
            )
        return classes

    def _rows(self, samples: Samples, years: tuple[int, int] | None, missing: str) -> NDArray[np.int64]:
        absent = [os.fsdecode(path) for path in samples.absent]
        total = len(samples.paths) + len(absent)
        if absent and not len(samples.paths) and not len(samples.problems) and not samples.tiny[0]:
            raise SplitNotFoundError(
                f"none of the {total} images of {self._origin} is there, such as {self._base / absent[0]}",
                "Unpack them, or correct root.",
            )
        self._report(absent, f"{len(absent)} of the {total} images of {self._origin} are missing", missing)
        wrong = [f"{os.fsdecode(path)}: {reason.decode()}" for path, reason in samples.problems]
        these = "box or JSON file" if len(wrong) == 1 else "boxes or JSON files"
        self._report(wrong, f"{len(wrong)} {these} of {self._origin} cannot be used", missing)
        dropped = [f"{len(absent)} missing", f"{len(wrong)} unusable"]
        if samples.tiny[0]:
            dropped.append(f"{samples.tiny[0]} of at most 2 px")
            logger.info("%d boxes of at most 2 px are left out, as in fMoW's baseline", samples.tiny[0])
        keep = np.ones(len(samples.paths), dtype=np.bool_)
        keep[np.isin(samples.codes, np.flatnonzero(~np.isin(samples.categories, self.classes)))] = False
        dropped.append(f"{np.count_nonzero(~keep)} of {FALSE_DETECTION}")
        if years is not None:
            unknown = np.isnat(samples.timestamps) & keep
            if unknown.any():
                raise DataError(
                    f"{np.count_nonzero(unknown)} samples of {self._origin} have no timestamp such as "
                    f"2017-02-16T10:21:01Z; the first: {os.fsdecode(samples.paths[unknown][0])}",
                    "Correct them, or keep all years.",
                )
            outside = outside_years(samples.timestamps, years) & keep
            dropped.append(f"{np.count_nonzero(outside)} outside the years {years[0]} to {years[1]}")
            keep &= ~outside
        if not keep.any():
            raise DataError(
                f"no sample is left of {self._origin}: {', '.join(dropped)}",
                "Widen the filters (years), or check that root is the right folder.",
            )
        clipped = np.count_nonzero(samples.clipped & keep)
        if clipped and self.crop != "full":
            logger.warning("%d boxes of %s lie partly outside their image and are clipped", clipped, self._origin)
        return np.flatnonzero(keep)

    def _report(self, cases: Sequence[str], problem: str, missing: str) -> None:
        if not cases:
            return
        first = "".join(f"\n  {self._base / case}" for case in cases[:5])
        if missing == "error":
            raise DataError(
                f"{problem}; the first of them:{first}",
                "Unpack or correct them, check root, or go on without them: --missing skip.",
            )
        logger.warning("%s and skipped; the first of them:%s", problem, first)


def check_choices(crop: str, variant: str) -> None:
    """Check two settings.

    Raises:
        ConfigError: if the crop or the variant is unknown.
    """
    for name, value, known in (("crop", crop, CROPS), ("variant", variant, VARIANTS)):
        if value not in known:
            raise ConfigError(f"unknown {name} {value!r}", f"{nearest(value, known)}Known: {', '.join(known)}.")
