"""Datamodule of fMoW-Sentinel."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from geoexplora.bands import FMOW_SENTINEL_BANDS, FMOW_SENTINEL_STATISTICS, SENTINEL2
from geoexplora.datamodules.tiles import TilesDataModule
from geoexplora.datasets.fmow_index import SPLITS, find_layout, split_name
from geoexplora.datasets.fmow_sentinel import FMoWSentinel
from geoexplora.datasets.tiles import TileSource
from geoexplora.transforms.normalization import Normalization


class FMoWSentinelDataModule(TilesDataModule):
    """fMoW-Sentinel (SatMAE, arXiv 2207.08051), or any tree of its layout; see ``TilesDataModule``.

    The defaults are the reference's: ten bands, 96 pixels, clipped to uint8, crops of 0.2 to 1 of a tile's area,
    bicubic without antialiasing, years 2000 to 2020.

    Args:
        root: the folder that holds ``fmow-sentinel/``, or that folder.
        bands: the bands to read, in this order.
        image_size: side of the network's input in pixels.
        batch_size: size of a batch on one device.
        num_workers: loader processes; 0 reads in the main one.
        normalization: one of ``geoexplora.transforms.METHODS``, or a whole normalization, as stored with weights.
        statistics: ``reference``: those published for fMoW-Sentinel; ``dataset``: those of the training tiles at hand,
            read when the datamodule is made. Without effect on a whole normalization.
        antialias: antialiased resizing.
        crop_scale: smallest and largest share of a tile's area that a training crop covers.
        years: first and last year to keep; None keeps all.
        missing: what to do about rows without a file: ``error``, or ``skip`` with a warning.
        max_unreadable: the largest bearable share of unreadable tiles.
        seed: of order and augmentation.

    Raises:
        ConfigError: if a band or the normalization is unknown, or a number is out of range.
    """

    def __init__(
        self,
        root: Path | str,
        *,
        bands: Sequence[str] = FMOW_SENTINEL_BANDS,
        image_size: int = 96,
        batch_size: int = 64,
        num_workers: int = 0,
        normalization: str | Normalization = "clip-uint8",
        statistics: Literal["reference", "dataset"] = "reference",
        antialias: bool = False,
        crop_scale: tuple[float, float] = (0.2, 1.0),
        years: tuple[int, int] | None = (2000, 2020),
        missing: Literal["error", "skip"] = "error",
        max_unreadable: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__(
            FMoWSentinel,
            SENTINEL2,
            bands,
            FMOW_SENTINEL_STATISTICS,
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
        self.years = years
        self.missing: Literal["error", "skip"] = missing
        if statistics == "dataset" and isinstance(normalization, str):
            self.normalize_by_dataset()

    def has_split(self, split: str) -> bool:
        """Whether there is a csv file for the split ``train``, ``val`` or ``test_gt`` (``test``).

        Raises:
            DataError: if the root is not a folder.
        """
        name = "test_gt" if split == "test" else split
        return name in SPLITS and name in find_layout(self.root).tables

    def open_split(self, split: str) -> TileSource:
        """Open the dataset of one split.

        Raises:
            DataError: as ``FMoWSentinel``.
        """
        return FMoWSentinel(
            self.root,
            split_name(split),
            self.bands,
            missing=self.missing,
            years=self.years,
            max_unreadable=self.max_unreadable,
        )
