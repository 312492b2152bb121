"""Datamodule of any TorchGeo dataset of image chips."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from geoexplora.bands import Statistics
from geoexplora.datamodules.tiles import TilesDataModule
from geoexplora.datasets.file_tree import FileTree
from geoexplora.datasets.statistics import band_statistics
from geoexplora.datasets.tiles import TileSource
from geoexplora.datasets.torchgeo_opening import find_class, find_splits, open_torchgeo
from geoexplora.datasets.torchgeo_source import TorchGeoTiles
from geoexplora.errors import DataError
from geoexplora.torchgeo_facts import FACTS
from geoexplora.transforms.normalization import Normalization

logger = logging.getLogger(__name__)


class TorchGeoDataModule(TilesDataModule):
    """A ``NonGeoDataset`` of TorchGeo whose samples have an ``image``; see ``TilesDataModule``, ``TorchGeoTiles``.

    Training reads the class's split ``train`` where it has one, else the class's default; ``val`` serves the kNN probe
    where the class has that split and lists its labels. Nothing is downloaded.

    TorchGeo publishes no statistics that fit every dataset, so those of the training images at hand are taken, also
    where ``reference`` is asked for. The pixel values stay as TorchGeo gives them; those of So2Sat and SSL4EO-L are
    brought to the sensor's units.

    Args:
        root: what the dataset's constructor takes as ``root``.
        name: name of the dataset's class, such as ``RESISC45``.
        bands: the bands to read, in this order; None: all of the sensor's that the dataset has, in the sensor's order.
        image_size: side of the network's input in pixels.
        batch_size: size of a batch on one device.
        num_workers: loader processes; 0 reads in the main one.
        normalization: one of ``geoexplora.transforms.METHODS``, or a whole normalization, as stored with weights.
        statistics: ``dataset``: those of up to 2048 training images, read when the datamodule is made; ``reference``:
            the same, with a line in the log. Without effect on a whole normalization.
        antialias: antialiased resizing.
        crop_scale: smallest and largest share of an image's area that a training crop covers.
        max_unreadable: the largest bearable share of unreadable images.
        seed: of order and augmentation.
        **kwargs: ignored: what other datamodules take (years, missing: TorchGeo's class decides what belongs to it).

    Raises:
        ConfigError: if there is no such dataset, it cannot serve as a source of tiles, a band or the normalization is
            unknown, or a number is out of range.
        DataError: if the dataset is not there or not what it should be.
    """

    def __init__(
        self,
        root: Path | str,
        *,
        name: str,
        bands: Sequence[str] | None = None,
        image_size: int = 96,
        batch_size: int = 64,
        num_workers: int = 0,
        normalization: str | Normalization = "clip-uint8",
        statistics: Literal["reference", "dataset"] = "dataset",
        antialias: bool = False,
        crop_scale: tuple[float, float] = (0.2, 1.0),
        max_unreadable: float = 0.1,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        self._class = find_class(name)
        self.root = Path(root)
        self._tree = FileTree(self.root)
        train = TorchGeoTiles(
            open_torchgeo(self._class, self.root, "train"), bands, max_unreadable=max_unreadable, tree=self._tree
        )
        if isinstance(normalization, str):
            if statistics == "reference":
                logger.info(
                    "no reference statistics are known for TorchGeo's %s; taking those of its training images", name
                )
            normalization = Normalization.from_statistics(normalization, band_statistics(train, train.bands))
        super().__init__(
            self._class,
            train.sensor,
            train.bands,
            Statistics(normalization.bands, normalization.mean, normalization.std),
            image_size=image_size,
            batch_size=batch_size,
            num_workers=num_workers,
            normalization=normalization,
            antialias=antialias,
            crop_scale=crop_scale,
            seed=seed,
            max_unreadable=max_unreadable,
        )
        self._sources["train"] = train
        self.classes = train.classes
        facts = FACTS.get(name)
        self.ignore_index = facts.ignore_index if facts else None

    def has_split(self, split: str) -> bool:
        """Whether the class has the split ``train``, ``val`` or ``test_gt`` (``test``); not whether it is there."""
        return ("test_gt" if split == "test" else split) in find_splits(self._class)

    def open_split(self, split: str) -> TileSource:
        """Open one split.

        Raises:
            DataError: if the class has no such split, or it is not there.
        """
        if not self.has_split(split):
            raise DataError(
                f"TorchGeo's {self._class.__name__} has no split {split!r}",
                f"It has: {', '.join(find_splits(self._class))}.",
            )
        dataset = open_torchgeo(self._class, self.root, "test_gt" if split == "test" else split)
        return TorchGeoTiles(dataset, self.bands, self.sensor, max_unreadable=self.max_unreadable, tree=self._tree)
