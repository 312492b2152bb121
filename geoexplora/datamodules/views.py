"""How the loaders see a dataset of raw tiles: cropped, normalized, resized, all of one size."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from geoexplora.datamodules.sampling import Key, generator
from geoexplora.datasets.tiles import Tile, TileSource
from geoexplora.transforms.crop import EvaluationCrop, TrainCrop, WholeTile

Sample = dict[str, Tensor]


def _sample(image: Tensor, tile: Tile, index: int) -> Sample:
    sample = {"image": image, "index": torch.tensor(index), "unreadable": torch.tensor(tile.unreadable)}
    if tile.label is not None:
        sample["label"] = torch.tensor(tile.label)
    return sample


class TrainView(Dataset[Sample]):
    """The augmented view: ``view[(epoch, index)]`` depends on nothing but seed, epoch and index.

    ``view[index]`` is ``view[(0, index)]``. Samples hold ``image`` (C, S, S), float32, ``index``, the one asked for,
    int64, ``unreadable``, int64, and ``label``, int64, where the source has labels; whole tiles also ``size`` (2,),
    int64, their height and width before.

    Args:
        source: the dataset of raw tiles.
        crop: the augmentation, or whole tiles for augmentation elsewhere.
        seed: of the augmentation.
    """

    def __init__(self, source: TileSource, crop: TrainCrop | WholeTile, seed: int = 0) -> None:
        self.source = source
        self.crop = crop
        self.seed = seed

    def __len__(self) -> int:
        """Number of tiles."""
        return len(self.source)

    def __getitem__(self, key: int | Key) -> Sample:
        """The sample of that index, as augmented in that epoch."""
        epoch, index = (0, key) if isinstance(key, int) else key
        tile = self.source.read(index)
        sample = _sample(self.crop(tile.image, generator(self.seed, epoch, index)), tile, index)
        if isinstance(self.crop, WholeTile):
            sample["size"] = torch.tensor(tile.image.shape[1:])
        return sample


class EvaluationView(Dataset[Sample]):
    """The view without augmentation; samples as in ``TrainView``.

    Where ``unreadable`` is not -1, image and label are those of the tile that stands in.

    Args:
        source: the dataset of raw tiles.
        crop: the evaluation's crop.
    """

    def __init__(self, source: TileSource, crop: EvaluationCrop) -> None:
        self.source = source
        self.crop = crop

    @property
    def labels(self) -> NDArray[np.int64]:
        """(N,) class indices."""
        return self._array("labels")

    @property
    def location_ids(self) -> NDArray[np.int64]:
        """(N,) locations, unique only within a class."""
        return self._array("location_ids")

    @property
    def image_ids(self) -> NDArray[np.int64]:
        """(N,) images, unique only within a class and location."""
        return self._array("image_ids")

    def _array(self, name: str) -> NDArray[np.int64]:
        array: Any = getattr(self.source, name)
        return np.asarray(array, dtype=np.int64)

    def __len__(self) -> int:
        """Number of tiles."""
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        """The sample of that index."""
        tile = self.source.read(index)
        return _sample(self.crop(tile.image), tile, index)
