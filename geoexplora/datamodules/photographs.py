"""Datamodule of the natural photographs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from geoexplora.bands import IMAGENET_STATISTICS, RGB
from geoexplora.datamodules.tiles import TilesDataModule
from geoexplora.datasets.photographs import Photographs
from geoexplora.datasets.tiles import TileSource
from geoexplora.errors import DataError
from geoexplora.transforms.normalization import Normalization


class PhotographsDataModule(TilesDataModule):
    """Random crops of the photographs in scikit-image's and scikit-learn's wheels; see ``TilesDataModule``.

    There are no labels and no splits but ``train``.

    Args:
        root: ignored: the photographs come with the packages.
        bands: the bands to read, in this order.
        image_size: side of the network's input in pixels.
        batch_size: size of a batch on one device.
        num_workers: loader processes; 0 reads in the main one.
        normalization: one of ``geoexplora.transforms.METHODS``, or a whole normalization, as stored with weights.
        antialias: antialiased resizing; crops are mostly larger than the input, so this matters here.
        crop_scale: smallest and largest share of a photograph's area (about 0.3 megapixels) that a crop covers.
        length: crops in an epoch.
        seed: of order and augmentation.
        **kwargs: ignored: what other datamodules take (years, missing, max_unreadable).

    Raises:
        ConfigError: if a band or the normalization is unknown, or a number is out of range.
    """

    def __init__(
        self,
        root: Path | str | None = None,
        *,
        bands: Sequence[str] = RGB.band_names,
        image_size: int = 32,
        batch_size: int = 64,
        num_workers: int = 0,
        normalization: str | Normalization = "clip-uint8",
        antialias: bool = True,
        crop_scale: tuple[float, float] = (0.01, 0.5),
        length: int = 4096,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            Photographs,
            RGB,
            bands,
            IMAGENET_STATISTICS,
            image_size=image_size,
            batch_size=batch_size,
            num_workers=num_workers,
            normalization=normalization,
            antialias=antialias,
            crop_scale=crop_scale,
            seed=seed,
        )
        self.length = length

    def has_split(self, split: str) -> bool:
        """Only ``train``."""
        return split == "train"

    def open_split(self, split: str) -> TileSource:
        """Open the photographs.

        Raises:
            DataError: if the split is not ``train``.
        """
        if not self.has_split(split):
            raise DataError(
                f"the photographs have no split {split!r}", "They have no labels and only train; turn the probe off."
            )
        return Photographs(self.length, self.bands)
