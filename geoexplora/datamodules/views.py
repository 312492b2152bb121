"""How the loaders see a dataset of raw tiles: cropped, normalized, resized, all of one size."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from geoexplora.datamodules.sampling import Key, generator
from geoexplora.datamodules.targets import check_target
from geoexplora.datasets.tiles import Target, Tile, TileSource
from geoexplora.transforms.crop import EvaluationCrop, TrainCrop, WholeTile

Sample = dict[str, Tensor]


def _numbers(tile: Tile, index: int) -> Sample:
    return {"index": torch.tensor(index), "unreadable": torch.tensor(tile.unreadable)}


def _label(target: Target) -> Sample:
    if target is None:
        return {}
    if isinstance(target, np.ndarray):
        return {"label": torch.from_numpy(target.astype(np.int64))}
    return {"label": torch.tensor(target)}


class TrainView(Dataset[Sample]):
    """The augmented view: ``view[(epoch, index)]`` depends on nothing but seed, epoch and index.

    ``view[index]`` is ``view[(0, index)]``. Samples hold ``image`` (C, S, S), float32, ``index``, the one asked for,
    int64, ``unreadable``, int64, and by the source's kind of target ``label``, int64 (a class) or (K,), int64 (several)
    or float32 (a number), or ``mask`` (S, S), int64; whole tiles also ``size`` (2,), int64, their height and width
    before.

    Args:
        source: the dataset of raw tiles.
        crop: the augmentation, or whole tiles for augmentation elsewhere.
        seed: of the augmentation.
        ignore_index: the value of a mask that is no class.
        unlabelled: leave targets out.
        num_classes: number of classes; None: as many as the source tells.
    """

    def __init__(
        self,
        source: TileSource,
        crop: TrainCrop | WholeTile,
        seed: int = 0,
        ignore_index: int | None = None,
        unlabelled: bool = False,
        num_classes: int | None = None,
    ) -> None:
        self.source = source
        self.crop = crop
        self.seed = seed
        self.ignore_index = ignore_index
        self.unlabelled = unlabelled
        self.num_classes = num_classes

    def __len__(self) -> int:
        """Number of tiles."""
        return len(self.source)

    def __getitem__(self, key: int | Key) -> Sample:
        """The sample of that index, as augmented in that epoch.

        Raises:
            DataError: if its target is not what the source says; see ``check_target``.
        """
        epoch, index = (0, key) if isinstance(key, int) else key
        tile = self.source.read(index)
        draws = generator(self.seed, epoch, index)
        target: Target = None
        if not self.unlabelled:
            target = check_target(tile, self.source, index, self.ignore_index, self.num_classes)
        sample: Sample
        if isinstance(target, np.ndarray) and self.source.target == "mask":
            image, mask = self.crop.with_mask(tile.image, target, draws)
            sample = {"image": image, **_numbers(tile, index), "mask": mask}
        else:
            sample = {"image": self.crop(tile.image, draws), **_numbers(tile, index), **_label(target)}
        if isinstance(self.crop, WholeTile):
            sample["size"] = torch.tensor(tile.image.shape[1:])
        return sample


class EvaluationView(Dataset[Sample]):
    """The view without augmentation; samples as in ``TrainView``.

    Where ``unreadable`` is not -1, image and target are those of the tile that stands in.

    Args:
        source: the dataset of raw tiles.
        crop: the evaluation's crop; tiles with masks are taken whole.
        ignore_index: the value of a mask that is no class.
        unlabelled: leave targets out.
        num_classes: number of classes; None: as many as the source tells.
    """

    def __init__(
        self,
        source: TileSource,
        crop: EvaluationCrop,
        ignore_index: int | None = None,
        unlabelled: bool = False,
        num_classes: int | None = None,
    ) -> None:
        self.source = source
        self.crop = crop
        self.ignore_index = ignore_index
        self.unlabelled = unlabelled
        self.num_classes = num_classes

    @property
    def labels(self) -> NDArray[np.int64]:
        """(N,) class indices, -1 where they are not listed."""
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
        """The sample of that index.

        Raises:
            DataError: if its target is not what the source says; see ``check_target``.
        """
        tile = self.source.read(index)
        target: Target = None
        if not self.unlabelled:
            target = check_target(tile, self.source, index, self.ignore_index, self.num_classes)
        if isinstance(target, np.ndarray) and self.source.target == "mask":
            image, mask = self.crop.with_mask(tile.image, target)
            return {"image": image, **_numbers(tile, index), "mask": mask}
        return {"image": self.crop(tile.image), **_numbers(tile, index), **_label(target)}
