"""Datamodule of the bundled sample."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from geoexplora.bands import FMOW_SENTINEL_BANDS, FMOW_SENTINEL_STATISTICS, SENTINEL2
from geoexplora.datamodules.tiles import TilesDataModule
from geoexplora.datasets.sample import IGNORE
from geoexplora.datasets.sample_dataset import COUNT, SampleTarget, SampleTiles, area_splits
from geoexplora.datasets.tiles import TileSource
from geoexplora.errors import DataError
from geoexplora.transforms.normalization import Normalization


class SampleDataModule(TilesDataModule):
    """Tiles of the bundled Sentinel-2 scene, labelled by land use; see ``TilesDataModule``, ``SampleTiles``.

    Splits follow the scene's eight area blocks, since neighbouring tiles look alike: one block to test on, two to
    validate on, five to learn from (``area_splits``). Training without labels (``unlabelled``) reads all tiles of
    these five. Without targets the whole scene is one split ``train``. A mask's pixels without known land use hold
    255, the ``ignore_index``.

    Args:
        root: ignored: the scene comes with the package.
        target: ``class``, ``mask`` or ``none``.
        tile_size: side of a tile in pixels.
        fold: the area block to test on, 0 to 7.
        bands: the bands to read, in this order.
        image_size: side of the network's input in pixels.
        batch_size: size of a batch on one device.
        num_workers: loader processes; 0 reads in the main one.
        normalization: one of ``geoexplora.transforms.METHODS``, or a whole normalization, as stored with weights.
        statistics: ``reference``: those published for fMoW-Sentinel; ``dataset``: those of the training tiles. Without
            effect on a whole normalization.
        antialias: antialiased resizing.
        crop_scale: smallest and largest share of a tile's area that a training crop covers.
        seed: of order and augmentation.
        **kwargs: ignored: what other datamodules take (years, missing, max_unreadable).

    Raises:
        ConfigError: if the target, a band, the fold or the normalization is unknown, or a number is out of range.
    """

    def __init__(
        self,
        root: Path | str | None = None,
        *,
        target: SampleTarget = "class",
        tile_size: int = 16,
        fold: int = 0,
        bands: Sequence[str] = FMOW_SENTINEL_BANDS,
        image_size: int = 96,
        batch_size: int = 64,
        num_workers: int = 0,
        normalization: str | Normalization = "clip-uint8",
        statistics: Literal["reference", "dataset"] = "reference",
        antialias: bool = False,
        crop_scale: tuple[float, float] = (0.2, 1.0),
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            SampleTiles,
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
        )
        self._target: SampleTarget = target
        self.tile_size = tile_size
        self._blocks = {"train": tuple(range(COUNT))} if target == "none" else area_splits(fold)
        self.ignore_index = IGNORE if target == "mask" else None
        if statistics == "dataset" and isinstance(normalization, str):
            self.normalize_by_dataset()

    def has_split(self, split: str) -> bool:
        """Whether there is a split ``train``, ``val`` or ``test_gt`` (``test``)."""
        return ("test_gt" if split == "test" else split) in self._blocks

    @property
    def training_source(self) -> TileSource:
        """Without labels all tiles of the training areas, not only those of known land use."""
        if not self.unlabelled:
            return self.source("train")
        if "unlabelled" not in self._sources:
            self._sources["unlabelled"] = SampleTiles("none", self._blocks["train"], self.bands, self.tile_size)
        return self._sources["unlabelled"]

    def open_split(self, split: str) -> TileSource:
        """Open one split.

        Raises:
            DataError: if there is no such split.
        """
        if not self.has_split(split):
            raise DataError(f"the sample has no split {split!r}", f"It has: {', '.join(self._blocks)}.")
        blocks = self._blocks["test_gt" if split == "test" else split]
        return SampleTiles(self._target, blocks, self.bands, self.tile_size)
