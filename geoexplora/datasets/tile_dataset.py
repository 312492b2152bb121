"""What datasets of tile files share: the next readable tile stands in for an unreadable one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor
from torchgeo.datasets import NonGeoDataset

from geoexplora.bands import Sensor
from geoexplora.datasets.fmow_index import OFFICIAL_CLASSES
from geoexplora.datasets.plot import plot_tile
from geoexplora.datasets.tiles import TargetKind, Tile, UnreadableTiles, file_states

Sample = dict[str, Any]


class TileDataset(NonGeoDataset, ABC):
    """Labelled tiles, each in a file; see ``geoexplora.datasets.tiles.TileSource``.

    A sample holds ``image`` (C, h, w), float32 in the sensor's units, ``label``, int64, and ``unreadable``, int64: -1,
    or the index that was asked for if that tile could not be read and the next readable one stands in for it.

    Only arrays are held, so that loader workers share the memory of their parent.
    """

    sensor: Sensor
    bands: tuple[str, ...]
    target: TargetKind = "class"
    classes: tuple[str, ...]
    labels: NDArray[np.int64]
    location_ids: NDArray[np.int64]
    image_ids: NDArray[np.int64]
    timestamps: NDArray[np.datetime64]
    unreadable: UnreadableTiles
    transforms: Callable[[Sample], Sample] | None

    @abstractmethod
    def path(self, index: int) -> Path:
        """The file of a tile."""

    @abstractmethod
    def load(self, index: int) -> NDArray[Any]:
        """The tile of that very index, (C, h, w), in the file's own type.

        Raises:
            UnusableTileError: if it cannot be read or holds no data.
        """

    def __len__(self) -> int:
        """Number of tiles."""
        return len(self.labels)

    def read(self, index: int) -> Tile:
        """Read a raw tile, or the next readable one in its stead, without taking note of it.

        Args:
            index: of the tile; negative ones count from the end.

        Returns:
            The tile, (C, h, w).

        Raises:
            DataError: if more tiles in a row than bearable are unreadable.
            IndexError: if there is no such tile.
        """
        wanted = range(len(self))[index]
        at, image = self.unreadable.first_readable(wanted, self.load, self.path)
        return Tile(image, int(self.labels[at]), -1 if at == wanted else wanted)

    def note_unreadable(self, index: int) -> None:
        """Count an unreadable tile, and name it with the reason.

        A loader's main process calls this for what its workers met; reading samples directly does so by itself. Only
        the index comes from a worker: the reason is found by looking at the file again, once.

        Raises:
            DataError: if more distinct tiles than bearable were unreadable.
        """
        self.unreadable.look_again(index, self.load, self.path(index))

    def fingerprint(self) -> bytes:
        """Sizes and times of the tiles' files: what their pixels depend on."""
        return file_states(map(self.path, range(len(self))))

    def __getitem__(self, index: int) -> Sample:
        """A sample with ``image``, ``label`` and ``unreadable``.

        Raises:
            DataError: as ``read`` and ``note_unreadable``.
        """
        tile = self.read(index)
        if tile.unreadable >= 0:
            self.note_unreadable(tile.unreadable)
        sample: Sample = {
            "image": torch.from_numpy(np.ascontiguousarray(tile.image, dtype=np.float32)),
            "label": torch.tensor(tile.target),
            "unreadable": torch.tensor(tile.unreadable),
        }
        return self.transforms(sample) if self.transforms is not None else sample

    def plot(self, sample: Sample, show_titles: bool = True, suptitle: str | None = None) -> Figure:
        """Plot a sample in true colour, or its first band in grey where red, green and blue are not all there.

        Args:
            sample: as returned by ``__getitem__``; a ``prediction`` in it is named in the title.
            show_titles: whether to name the class above the picture.
            suptitle: a title for the whole figure.

        Returns:
            The figure.
        """
        title = None
        if show_titles:
            title = self._class(sample.get("label"))
            if "prediction" in sample:
                title = f"{title}\npredicted: {self._class(sample['prediction'])}"
        return plot_tile(sample["image"], self.bands, self.sensor, title, suptitle)

    def _class(self, label: Tensor | int | None) -> str:
        return "" if label is None else self.classes[int(label)]


def fmow_classes(found: set[str]) -> tuple[str, ...]:
    """FMoW's 62 classes if all that were found are among them, else those that were found, sorted."""
    return OFFICIAL_CLASSES if found <= set(OFFICIAL_CLASSES) else tuple(sorted(found))


def outside_years(timestamps: NDArray[np.datetime64], years: tuple[int, int]) -> NDArray[np.bool_]:
    """Which timestamps lie before the first or after the last year."""
    year = timestamps.astype("datetime64[Y]").astype(np.int64) + 1970
    outside: NDArray[np.bool_] = (year < years[0]) | (year > years[1])
    return outside
