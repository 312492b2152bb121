"""TorchGeo's datasets as sources of raw tiles: bands by name, and what is said of the images."""

from __future__ import annotations

import os
import random
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from numpy.typing import NDArray
from rasterio.errors import RasterioError
from torch import Tensor
from torchgeo.datasets import NonGeoDataset, So2Sat

from geoexplora.bands import Sensor
from geoexplora.datasets.file_tree import FileTree
from geoexplora.datasets.tiles import Array, Target, Tile, UnreadableTiles, UnusableTileError, file_states
from geoexplora.datasets.torchgeo_channels import Channels
from geoexplora.datasets.torchgeo_targets import class_names, listed_labels, read_target, target_kind
from geoexplora.errors import ConfigError, DataError


class TorchGeoTiles:
    """The images of a TorchGeo dataset as raw tiles.

    The dataset's samples need an ``image`` (C, h, w) of any real type; sizes may vary. Bands are matched by name.
    The samples tell the kind of target (``target_kind``); boxes are none. TorchGeo knows no locations: to
    ``location_ids`` all tiles lie at one. Where a dataset draws one of an image's seasons at random, it is always the
    same one.

    Args:
        dataset: the dataset.
        bands: the bands to return, in this order; None: all of the sensor's that it has, in the sensor's order.
        sensor: the sensor that the bands belong to; None: as the dataset's band names, or its three channels, say.
        max_unreadable: the largest bearable share of unreadable images; one is always borne.
        tree: what lies under the dataset's root, where several splits share it; None: of this dataset alone.

    Attributes:
        target: the kind of target.
        classes: names of the classes; empty where the target knows none.
        labels: (N,) class indices; -1 where they are not listed, as in class folders, and only reading a tile tells.
        location_ids: (N,) zeros.
        image_ids: (N,) what tells the images apart: checksums of the files' names where they are known.

    Raises:
        DataError: if there is no readable image, one of another shape or number of bands than expected, or a listed
            label is none of the classes.
        ConfigError: if the samples hold no image, the bands cannot be named, or a wanted one is not there.
    """

    def __init__(
        self,
        dataset: NonGeoDataset,
        bands: Sequence[str] | None = None,
        sensor: Sensor | None = None,
        *,
        max_unreadable: float = 0.1,
        tree: FileTree | None = None,
    ) -> None:
        self.dataset = dataset
        self.name = type(dataset).__name__
        if len(dataset) == 0:
            raise DataError(f"TorchGeo's {self.name} has no image", "Check that --root is the right folder.")
        self.unreadable = UnreadableTiles(len(dataset), max_unreadable)
        self._first, sample = self.unreadable.first_readable(0, self._sample, self.path)
        self._tree = tree or FileTree(Path(self._root))
        self._channels = Channels.of(dataset, len(sample["image"]), sensor)
        self.sensor, there = self._channels.sensor, self._channels.bands
        self.bands = self.sensor.select(there if bands is None else bands)
        gone = [band for band in self.bands if band not in there]
        if gone:
            raise ConfigError(
                f"TorchGeo's {self.name} has no band {', '.join(gone)}", f"Set --bands to some of: {','.join(there)}."
            )
        self._keep = self._channels.indices(self.bands)
        self._rescaling = self._channels.rescaling(self.bands)

        names = class_names(dataset)
        self.target = target_kind(dataset, sample, names)
        self.classes: tuple[str, ...] = names if self.target in {"class", "multilabel", "mask"} else ()
        listed = listed_labels(dataset, names) if self.target == "class" else None
        self.labels = np.full(len(dataset), -1, dtype=np.int64) if listed is None else listed
        self.location_ids = np.zeros(len(dataset), dtype=np.int64)
        self.image_ids = _image_ids(dataset)

    def __len__(self) -> int:
        """Number of tiles."""
        return len(self.dataset)

    def path(self, index: int) -> Path:
        """The file of a tile where the dataset lists its files, else its number in the form of one."""
        listed = self._listed(index)
        return Path(listed[0]) if listed else Path(f"image {index} of {self.name}")

    def read(self, index: int) -> Tile:
        """Read a raw tile, or the next readable one in its stead, without taking note of it.

        Args:
            index: of the tile; negative ones count from the end.

        Returns:
            The tile, (C, h, w), in the type that TorchGeo gives. Pixels that are NaN or infinite hold the mean of the
            band's other pixels; a tile with a band of nothing else counts as unreadable.

        Raises:
            DataError: if image or target are not what they should be, or more in a row than bearable are unreadable.
            IndexError: if there is no such tile.
        """
        wanted = range(len(self))[index]
        at, (image, target) = self.unreadable.first_readable(wanted, self._load, self.path)
        return Tile(image, target, wanted if at != wanted else -1)

    def note_unreadable(self, index: int) -> None:
        """Count an unreadable tile, and name it with the reason, found by looking at it again.

        Raises:
            DataError: if more distinct tiles than bearable were unreadable.
        """
        self.unreadable.look_again(index, self._load, self.path(index))

    def fingerprint(self) -> bytes:
        """What the tiles' pixels depend on: names below the root, sizes and times of the files that the dataset lists.

        So2Sat has one file for all. Where other datasets list no files, all under the root count, and its place.
        """
        if isinstance(self.dataset, So2Sat):
            return file_states([Path(self.dataset.fn)])
        first = self.path(self._first)  # was read, so it is there if it is a file
        folder = next((folder for folder in ("", self._root) if Path(folder, first).is_file()), None)
        if folder is None:
            return self._tree.state
        files = [file for index in range(len(self)) for file in self._listed(index)]
        names = "\n".join(file.removeprefix(self._root).lstrip(os.sep) for file in files)
        return os.fsencode(names) + file_states(Path(folder, file) for file in files)

    @property
    def _root(self) -> str:
        return str(getattr(self.dataset, "root", ""))

    def _listed(self, index: int) -> tuple[str, ...]:
        """What the dataset lists of a tile: its image's file, and what else may be one; empty where it lists none."""
        for attribute in ("samples", "files", "folders"):
            listed = getattr(self.dataset, attribute, None)
            entry: Any = listed[index] if isinstance(listed, list | tuple) and len(listed) == len(self) else None
            named = entry if isinstance(entry, dict) else {"image": entry[0] if isinstance(entry, tuple) else entry}
            image = named.get("image", named.get("s2"))
            if isinstance(image, str | Path):
                others = (one for one in named.values() if one is not image and isinstance(one, str | Path))
                return (str(image), *map(str, others))
        return ()

    def _load(self, index: int) -> tuple[Array, Target]:
        """The wanted bands of a tile, in the sensor's units, and its target."""
        sample = self._sample(index)
        listed = int(self.labels[index])
        target = read_target(sample, self.target, self.path(index)) if listed < 0 else listed
        return self._image(sample["image"].numpy(), index), target

    def _image(self, image: Array, index: int) -> Array:
        if len(image) != len(self._channels.names):
            raise DataError(
                f"{self.path(index)} has {len(image)} bands, not {len(self._channels.names)}",
                "All tiles must hold the same bands in the same order; remove or replace this one.",
            )
        if self._keep != list(range(len(image))):
            image = image[self._keep]
        return self._filled(image if self._rescaling is None else image * self._rescaling[0] + self._rescaling[1])

    def _filled(self, image: Array) -> Array:
        if image.dtype.kind != "f" or (valid := np.isfinite(image)).all():
            return image
        counts = valid.sum((1, 2))
        if not counts.all():
            raise UnusableTileError(f"band {self.bands[int(counts.argmin())]} holds nothing but NaN")
        means = np.where(valid, image, 0).sum((1, 2), dtype=np.float64) / counts
        return np.where(valid, image, means.astype(image.dtype)[:, None, None])

    def _sample(self, index: int) -> dict[str, Any]:
        """What the dataset gives, known to hold an ``image`` (C, h, w)."""
        state = random.getstate()
        random.seed(index)  # of the datasets that draw a season
        try:
            sample: dict[str, Any] = self.dataset[index]
        except (OSError, RasterioError, SyntaxError) as error:  # Pillow calls a broken PNG a syntax error
            raise UnusableTileError(self._reason(error, index)) from error
        except (RuntimeError, LookupError, ValueError, TypeError) as error:
            raise DataError(
                f"TorchGeo's {self.name} cannot make an image of {self.path(index)}: {error}",
                "Check that this file is of the dataset's format; remove or replace it.",
            ) from error
        finally:
            random.setstate(state)
        image = sample.get("image")
        if not isinstance(image, Tensor):
            raise ConfigError(
                f"the samples of TorchGeo's {self.name} hold {', '.join(sample) or 'nothing'}, no image",
                "Name a dataset whose samples have an image.",
            )
        if image.ndim != 3:
            series = " (a time series)" if image.ndim == 4 else ""
            raise ConfigError(
                f"an image of TorchGeo's {self.name} has the shape {tuple(image.shape)}{series}",
                "Only images of bands x height x width can be read: name another dataset.",
            )
        return sample

    def _reason(self, error: Exception, index: int) -> str:
        if isinstance(error, PIL.UnidentifiedImageError):
            return "it is no image of a known format"
        text = str(getattr(error, "strerror", None) or error.__cause__ or error)
        return text.removeprefix(f"'{self.path(index)}' ").rstrip(".")


def _image_ids(dataset: NonGeoDataset) -> NDArray[np.int64]:
    samples = getattr(dataset, "samples", None)
    if not samples:
        return np.arange(len(dataset), dtype=np.int64)
    root = str(getattr(dataset, "root", ""))
    return np.array([zlib.crc32(str(path).removeprefix(root).encode()) for path, _ in samples], dtype=np.int64)
