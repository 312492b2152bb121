"""Datamodule of fMoW-RGB."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from geoexplora.bands import FMOW_RGB_STATISTICS, RGB
from geoexplora.datamodules.tiles import TilesDataModule
from geoexplora.datasets.fmow_rgb import FMoWRGB, check_choices
from geoexplora.datasets.fmow_rgb_boxes import Crop
from geoexplora.datasets.fmow_rgb_list import find_lists
from geoexplora.datasets.fmow_rgb_tree import SPLITS, Variant, find_base, has_tree, split_name
from geoexplora.datasets.tiles import TileSource
from geoexplora.transforms.crop import EVALUATION_RATIO, TrainCrop
from geoexplora.transforms.normalization import Normalization


class FMoWRGBDataModule(TilesDataModule):
    """fMoW-RGB (Christie et al., arXiv 1711.07846), or any tree of its layout; see ``TilesDataModule``.

    Images are decoded at 1/2, 1/4 or 1/8 of their resolution where even the smallest crop keeps as many pixels as the
    network's input (``least_side``): resizing then starts from fewer pixels, and none is enlarged that was not before.

    Args:
        root: the folder that holds ``fmow-rgb/``, or that folder; SatMAE's lists beside or in it.
        bands: the bands to read, in this order.
        image_size: side of the network's input in pixels.
        batch_size: size of a batch on one device.
        num_workers: loader processes; 0 reads in the main one.
        normalization: one of ``geoexplora.transforms.METHODS``, or a whole normalization, as stored with weights.
        statistics: ``reference``: those published for fMoW-RGB; ``dataset``: those of the training images at hand, read
            when the datamodule is made. Without effect on a whole normalization.
        antialias: antialiased resizing; crops are mostly larger than the input, so this matters here.
        crop_scale: smallest and largest share of the area that a training crop covers.
        crop: what of an image is a sample: ``baseline``, ``tight`` or ``full``; see ``FMoWRGB``.
        variant: ``rgb`` or ``msrgb``.
        false_detection: keep the 63rd class.
        years: first and last year to keep; None keeps all.
        missing: what to do about images that are not there and boxes that cannot be used: ``error``, or ``skip`` with a
            warning.
        max_unreadable: the largest bearable share of unreadable images.
        seed: of order and augmentation.

    Raises:
        ConfigError: if a band, the normalization, crop or variant is unknown, or a number is out of range.
    """

    def __init__(
        self,
        root: Path | str,
        *,
        bands: Sequence[str] = RGB.band_names,
        image_size: int = 224,
        batch_size: int = 64,
        num_workers: int = 0,
        normalization: str | Normalization = "standardize",
        statistics: Literal["reference", "dataset"] = "reference",
        antialias: bool = True,
        crop_scale: tuple[float, float] = (0.2, 1.0),
        crop: Crop = "baseline",
        variant: Variant = "rgb",
        false_detection: bool = False,
        years: tuple[int, int] | None = None,
        missing: Literal["error", "skip"] = "error",
        max_unreadable: float = 0.1,
        seed: int = 0,
    ) -> None:
        check_choices(crop, variant)
        super().__init__(
            FMoWRGB,
            RGB,
            bands,
            FMOW_RGB_STATISTICS,
            image_size=image_size,
            batch_size=batch_size,
            num_workers=num_workers,
            normalization=normalization,
            antialias=antialias,
            crop_scale=crop_scale,
            seed=seed,
            max_unreadable=max_unreadable,
        )
        self.root = Path(root)
        self.crop: Crop = crop
        self.variant: Variant = variant
        self.false_detection = false_detection
        self.years = years
        self.missing: Literal["error", "skip"] = missing
        if statistics == "dataset" and isinstance(normalization, str):
            self.normalize_by_dataset()

    @property
    def least_side(self) -> int:
        """How many pixels a side of a tile needs, so that nothing is enlarged that would not be in full resolution.

        A random crop covers at least ``crop_scale[0]`` of the area, and its sides are at most 4/3 to each other, so
        neither is shorter than ``sqrt(crop_scale[0] * 3/4)`` of the tile's short side. Evaluation resizes that to
        ``image_size / 0.875``; whole tiles go to squares of ``whole_tiles``.
        """
        shortest = math.sqrt(self.crop_scale[0] * TrainCrop.ratio[0])
        training = self.image_size / shortest if self.whole_tiles is None else self.whole_tiles
        return math.ceil(max(training, self.image_size / EVALUATION_RATIO))

    def has_split(self, split: str) -> bool:
        """Whether there is a list or a folder of the split ``train``, ``val``, ``test`` or ``seq``.

        Raises:
            DataError: if the root is not a folder.
        """
        name = f"{split}_gt" if split in {"test", "seq"} else split
        base = find_base(self.root)
        return name in SPLITS and (name in find_lists(self.root, base) or has_tree(base, name))

    def open_split(self, split: str) -> TileSource:
        """Open the dataset of one split.

        Raises:
            DataError: as ``FMoWRGB``.
        """
        return FMoWRGB(
            self.root,
            split_name(split),
            self.bands,
            crop=self.crop,
            variant=self.variant,
            false_detection=self.false_detection,
            missing=self.missing,
            years=self.years,
            max_unreadable=self.max_unreadable,
        )

    def source(self, split: str) -> TileSource:
        """The dataset of raw tiles of one split, opened once, read in as much resolution as is needed now."""
        dataset = super().source(split)
        if isinstance(dataset, FMoWRGB):
            dataset.least_side = self.least_side
        return dataset
