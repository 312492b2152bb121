"""What a dataset of raw tiles offers to the crops and loaders, and how a tile is read from a GeoTIFF."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import imagecodecs
import numpy as np
import rasterio
from numpy.typing import NDArray

from geoexplora.bands import Sensor
from geoexplora.errors import DataError

logger = logging.getLogger(__name__)

Array = NDArray[Any]


class Tile(NamedTuple):
    """One raw tile.

    Attributes:
        image: (C, h, w), in the sensor's units, in the file's own type; not necessarily contiguous.
        label: class index, or None without labels.
        unreadable: index of the tile that was asked for, where another one had to stand in for it; else -1.
    """

    image: Array
    label: int | None
    unreadable: int


class TileSource(Protocol):
    """A dataset of raw tiles, which the datamodules crop and normalize."""

    bands: tuple[str, ...]
    sensor: Sensor

    def __len__(self) -> int:
        """Number of tiles."""

    def read(self, index: int) -> Tile:
        """The raw tile of that index, or the one that stands in for it."""

    def note_unreadable(self, index: int) -> None:
        """Take note that the tile of that index could not be read."""


class UnusableTileError(Exception):
    """A tile cannot be read or holds no data; another one may stand in for it."""


def read_geotiff(path: Path, expected: Sequence[str], keep: Sequence[int], nodata: float) -> Array:
    """Read some bands of a small GeoTIFF.

    Tiles are decoded whole by imagecodecs, 5 to 10 times as fast as by GDAL (benchmarks/data_loading.py), whose
    opening of a file outweighs the reading. Whatever imagecodecs does not understand goes to rasterio.

    Args:
        path: the file.
        expected: names of all bands that the file must hold.
        keep: 0-based positions of the bands to return.
        nodata: a tile of nothing but this value is unusable.

    Returns:
        (C, h, w), in the file's own type; missing pixels of float files are NaN.

    Raises:
        UnusableTileError: if the file is missing, unreadable or truncated, or all its pixels are nodata or NaN.
        DataError: if the file holds another number of bands.
    """
    count = len(expected)
    image = _decode(path, count)
    if image is None:
        image = _read_with_gdal(path, count)
    image = image if len(keep) == count and list(keep) == list(range(count)) else image[list(keep)]
    if image.size == 0 or bool((image == nodata).all()):
        raise UnusableTileError("it holds nothing but nodata")
    if image.dtype.kind == "f" and not bool(np.isfinite(image).any()):
        raise UnusableTileError("it holds nothing but NaN")
    return image


def _decode(path: Path, count: int) -> Array | None:
    """All bands (C, h, w) by imagecodecs, or None where rasterio has to look."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UnusableTileError(error.strerror or str(error)) from error
    try:
        pixels = imagecodecs.tiff_decode(content)
    except (imagecodecs.TiffError, ValueError, RuntimeError, IndexError):
        return None
    if pixels.ndim == 2 and count == 1:
        return pixels[None]
    # Pixel-interleaved files come as (h, w, C), band-interleaved ones as (C, h, w).
    if pixels.ndim == 3 and (pixels.shape[0] == count) != (pixels.shape[2] == count):
        return pixels if pixels.shape[0] == count else np.moveaxis(pixels, -1, 0)
    return None


def _read_with_gdal(path: Path, count: int) -> Array:
    try:
        with warnings.catch_warnings(action="ignore", category=rasterio.errors.NotGeoreferencedWarning):
            opened = rasterio.open(path)
        with opened as file:
            found = file.count
            image: Array | None = file.read() if found == count else None
    except (rasterio.errors.RasterioError, OSError) as error:
        raise UnusableTileError(str(error)) from error
    if image is None:
        raise DataError(
            f"{path} has {found} band{'' if found == 1 else 's'}, not {count}",
            "All tiles must hold the same bands in the same order; remove or replace this one.",
        )
    return image


class UnreadableTiles:
    """Counts distinct unreadable tiles, names each once, and stops when they are too many.

    Args:
        total: number of tiles in the dataset.
        share: the largest bearable share; one unreadable tile is always borne.
    """

    def __init__(self, total: int, share: float) -> None:
        self.total = total
        self.share = share
        self.seen: dict[int, Path] = {}

    @property
    def limit(self) -> int:
        """The largest bearable number."""
        return max(1, int(self.share * self.total))

    def add(self, index: int, path: Path, reason: str = "") -> None:
        """Note one; warns the first time.

        Raises:
            DataError: if there are more distinct ones than bearable.
        """
        if index in self.seen:
            return
        self.seen[index] = path
        logger.warning(
            "%s cannot be used%s; the next readable tile stands in for it.", path, f" ({reason})" if reason else ""
        )
        if len(self.seen) > self.limit:
            raise too_many(list(self.seen.values()), self.total, self.share)


def too_many(paths: Sequence[Path], total: int, share: float) -> DataError:
    """The error for more unreadable tiles than bearable."""
    names = "".join(f"\n  {path}" for path in paths[:5])
    return DataError(
        f"{len(paths)} of {total} tiles ({len(paths) / total:.1%}) cannot be read or hold no data, "
        f"more than the bearable share of {share:.1%}; the first of them:{names}",
        "Copy or unpack these files again, or raise max_unreadable.",
    )
