"""The natural photographs that scikit-image and scikit-learn ship in their wheels: nothing to download."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torchgeo.datasets import NonGeoDataset

from geoexplora.bands import RGB
from geoexplora.datasets.plot import plot_tile
from geoexplora.datasets.tiles import TargetKind, Tile
from geoexplora.errors import ConfigError

Sample = dict[str, Any]

COLOUR = ("astronaut", "chelsea", "coffee", "rocket", "motorcycle-left", "motorcycle-right", "china", "flower")
GREY = ("brick", "camera", "coins", "grass", "gravel")
NAMES = COLOUR + GREY
"""The photographs; microscopy, medical and astronomical pictures and drawings are left out."""


@lru_cache(maxsize=1)
def load_photographs() -> tuple[NDArray[np.uint8], ...]:
    """The photographs of ``NAMES``, each (3, h, w), uint8, red, green, blue (equal in the grey ones); read-only."""
    # Imported here: both packages are slow to import, and few runs need them.
    from sklearn.datasets import load_sample_images

    data: Any = importlib.import_module("skimage.data")
    left, right, _ = data.stereo_motorcycle()
    shipped = [data.astronaut(), data.chelsea(), data.coffee(), data.rocket(), left, right]
    grey = [data.brick(), data.camera(), data.coins(), data.grass(), data.gravel()]
    photographs = []
    for picture in [*shipped, *load_sample_images().images, *grey]:
        pixels = np.asarray(picture, dtype=np.uint8)
        if pixels.ndim == 2:
            pixels = np.stack([pixels] * 3, axis=-1)
        photograph = np.ascontiguousarray(np.moveaxis(pixels, -1, 0))
        photograph.setflags(write=False)
        photographs.append(photograph)
    return tuple(photographs)


class Photographs(NonGeoDataset):
    """Whole photographs, over and over: random crops make them a training set. There are no labels.

    A sample holds ``image`` (3, h, w), float32 digital numbers 0 to 255, and ``unreadable``, always -1.

    Args:
        length: nominal number of samples, that is of crops in an epoch.
        bands: the bands to return, in this order.
        transforms: applied to each sample.

    Raises:
        ConfigError: if the length is not positive or a band is unknown.
    """

    sensor = RGB
    target: TargetKind = "none"
    classes: tuple[str, ...] = ()

    def __init__(
        self,
        length: int = 4096,
        bands: Sequence[str] = RGB.band_names,
        transforms: Callable[[Sample], Sample] | None = None,
    ) -> None:
        if length < 1:
            raise ConfigError(f"a length of {length} photographs is not positive", "Give at least 1.")
        self.bands = RGB.select(bands)
        self.transforms = transforms
        self.length = length
        self._keep = list(RGB.indices(self.bands))
        self._photographs = load_photographs()

    def __len__(self) -> int:
        """Nominal number of samples."""
        return self.length

    def path(self, index: int) -> Path:
        """The name of the photograph that stands at an index."""
        return Path(NAMES[range(len(self))[index] % len(NAMES)])

    def read(self, index: int) -> Tile:
        """The photograph that stands at an index, (C, h, w), uint8.

        Raises:
            IndexError: if the index is out of range.
        """
        photograph = self._photographs[range(len(self))[index] % len(NAMES)]
        whole = self._keep == list(range(len(photograph)))
        return Tile(photograph if whole else photograph[self._keep], None, -1)

    def note_unreadable(self, index: int) -> None:
        """Never called: what a wheel ships can be read."""

    def fingerprint(self) -> bytes:
        """The names of the photographs."""
        return " ".join(NAMES).encode()

    def __getitem__(self, index: int) -> Sample:
        """A sample with ``image`` and ``unreadable``."""
        sample: Sample = {
            "image": torch.from_numpy(self.read(index).image.astype(np.float32)),
            "unreadable": torch.tensor(-1),
        }
        return self.transforms(sample) if self.transforms is not None else sample

    def plot(self, sample: Sample, suptitle: str | None = None) -> Figure:
        """Plot a sample."""
        return plot_tile(sample["image"], self.bands, self.sensor, None, suptitle)
