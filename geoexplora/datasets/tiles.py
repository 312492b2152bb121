"""What a dataset of raw tiles offers to the crops and loaders, and how a tile is read from a GeoTIFF."""

from __future__ import annotations

import logging
import struct
import warnings
from array import array
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import imagecodecs
import numpy as np
import rasterio
from numpy.typing import NDArray

from geoexplora.bands import Sensor
from geoexplora.errors import DataError

logger = logging.getLogger(__name__)

Array = NDArray[Any]
TargetKind = Literal["none", "class", "multilabel", "mask", "value"]
"""What a dataset says of its tiles: nothing, one of its classes, which of its classes, the class of each pixel, or a
real number."""

Target = int | float | Array | None

# Tags of a TIFF file, and the types they come in.
_WIDTH, _HEIGHT, _SAMPLES, _PLANAR, _NODATA = 256, 257, 277, 284, 42113
_ASCII, _SHORT, _LONG = 2, 3, 4


class Tile(NamedTuple):
    """One raw tile.

    Attributes:
        image: (C, h, w), in the sensor's units, in the file's own type; not necessarily contiguous.
        target: by the source's kind: a class index; (K,) 0 or 1 for each class; (h, w) class indices, in any integer
            type; a real number; None.
        unreadable: index of the tile that was asked for, where another one had to stand in for it; else -1.
    """

    image: Array
    target: Target
    unreadable: int


class TileSource(Protocol):
    """A dataset of raw tiles, which the datamodules crop and normalize.

    Attributes:
        bands: names of the bands of an image.
        sensor: the sensor that the bands belong to.
        target: the kind of all tiles' targets.
        classes: names of the K classes; empty where the target knows none, or the dataset does not tell.
    """

    bands: tuple[str, ...]
    sensor: Sensor
    target: TargetKind
    classes: tuple[str, ...]

    def __len__(self) -> int:
        """Number of tiles."""

    def path(self, index: int) -> Path:
        """The file of a tile, or what names it in messages."""

    def read(self, index: int) -> Tile:
        """The raw tile of that index, or the one that stands in for it."""

    def note_unreadable(self, index: int) -> None:
        """Take note that the tile of that index could not be read."""

    def fingerprint(self) -> bytes:
        """What the tiles' pixels depend on, so that what was computed from others is not taken for theirs."""


def file_states(paths: Iterable[Path]) -> bytes:
    """Sizes and times of last change (ns) of files in order, -1 for those that are not there; not where they lie."""
    states = array("q")
    for path in paths:
        try:
            state = path.stat()
        except OSError:
            states.extend((-1, -1))
        else:
            states.extend((state.st_size, state.st_mtime_ns))
    return states.tobytes()


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
        (C, h, w), in the file's own type. Missing pixels, those of the value that the file's own nodata tag names,
        are NaN; an integer file that has some comes as float32.

    Raises:
        UnusableTileError: if the file is missing, unreadable or truncated, or all its pixels are nodata or NaN.
        DataError: if the file holds another number of bands.
    """
    count = len(expected)
    image, tag = _decode(path, count) or _read_with_gdal(path, count)
    image = image if len(keep) == count and list(keep) == list(range(count)) else image[list(keep)]
    missing = _missing(image, tag)
    unusable = image == nodata if missing is None else missing | (image == nodata)
    if bool(unusable.all()):  # also true of an image without pixels
        raise UnusableTileError("it holds nothing but nodata or NaN")
    if missing is None or not bool(missing.any()):
        return image
    return np.where(missing, np.float32(np.nan), image.astype(np.float32, copy=False))


def _missing(image: Array, tag: str | float | None) -> NDArray[np.bool_] | None:
    """Which pixels are missing; None where none can be."""
    missing = ~np.isfinite(image) if image.dtype.kind == "f" else None
    if tag is None:
        return missing
    try:
        value = float(tag)
    except ValueError:
        return missing
    # A float32 file's tag has the digits of a float64. An integer file's tag may be a value that it cannot hold.
    equal: NDArray[np.bool_] = image == (image.dtype.type(value) if image.dtype.kind == "f" else value)
    return equal if missing is None else missing | equal


def _decode(path: Path, count: int) -> tuple[Array, str | None] | None:
    """All bands (C, h, w) by imagecodecs and the nodata tag, or None where rasterio has to look."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UnusableTileError(error.strerror or str(error)) from error
    try:
        header = _read_header(content)
        if header.get(_SAMPLES, 1) != count:
            return None
        pixels = imagecodecs.tiff_decode(content)
        height, width = int(header[_HEIGHT]), int(header[_WIDTH])
        # Pixel-interleaved files come as (h, w, C), band-interleaved ones (2) as (C, h, w).
        if header.get(_PLANAR, 1) == 2:
            image = pixels.reshape(count, height, width)
        else:
            image = np.moveaxis(pixels.reshape(height, width, count), -1, 0)
    except (imagecodecs.TiffError, struct.error, KeyError, ValueError, RuntimeError, IndexError):
        return None
    tag = header.get(_NODATA)
    return image, None if tag is None else str(tag)


def _read_header(content: bytes) -> dict[int, int | str]:
    """Size, layout and nodata tag of a classic TIFF's first image; empty for anything else.

    Imagecodecs tells none of these, and tifffile's parsing of all tags takes a third of the time of decoding.
    """
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(content[:4])
    if order is None:
        return {}
    (start,) = struct.unpack_from(f"{order}I", content, 4)
    (entries,) = struct.unpack_from(f"{order}H", content, start)
    found: dict[int, int | str] = {}
    for position in range(start + 2, start + 2 + 12 * entries, 12):
        tag, kind, length = struct.unpack_from(f"{order}HHI", content, position)
        if tag == _NODATA and kind == _ASCII:
            at = position + 8 if length <= 4 else struct.unpack_from(f"{order}I", content, position + 8)[0]
            found[tag] = content[at : at + length].decode("latin-1").strip(" \0")
        elif tag in {_WIDTH, _HEIGHT, _SAMPLES, _PLANAR} and kind in {_SHORT, _LONG}:
            (found[tag],) = struct.unpack_from(order + ("H" if kind == _SHORT else "I"), content, position + 8)
    return found


def _read_with_gdal(path: Path, count: int) -> tuple[Array, float | None]:
    try:
        with warnings.catch_warnings(action="ignore", category=rasterio.errors.NotGeoreferencedWarning):
            opened = rasterio.open(path)
        with opened as file:
            found = file.count
            image: Array | None = file.read() if found == count else None
            nodata: float | None = file.nodata
    except (rasterio.errors.RasterioError, OSError) as error:
        reason = str(error.__cause__ or error).removeprefix(f"'{path}' ")  # whoever tells the reason names the file
        raise UnusableTileError(reason.rstrip(".")) from error
    if image is None:
        raise DataError(
            f"{path} has {found} band{'' if found == 1 else 's'}, not {count}",
            "All tiles must hold the same bands in the same order; remove or replace this one.",
        )
    return image, nodata


class UnreadableTiles:
    """Counts distinct unreadable tiles, names each once, and stops when they are too many.

    Args:
        total: number of tiles in the dataset.
        share: the largest bearable share; one unreadable tile is always borne.
    """

    def __init__(self, total: int, share: float) -> None:
        self.total = total
        self.share = share
        self.seen: dict[int, str] = {}

    @property
    def limit(self) -> int:
        """The largest bearable number."""
        return max(1, int(self.share * self.total))

    def first_readable[Loaded](
        self, wanted: int, load: Callable[[int], Loaded], path: Callable[[int], Path]
    ) -> tuple[int, Loaded]:
        """The first tile from the wanted one on that can be read.

        Args:
            wanted: index of the tile that was asked for.
            load: reads the tile of an index, or raises ``UnusableTileError``.
            path: names its file.

        Returns:
            Its index and what was read.

        Raises:
            DataError: if more tiles in a row than bearable cannot be read.
        """
        bad: list[str] = []
        while len(bad) <= self.limit and len(bad) < self.total:
            at = (wanted + len(bad)) % self.total
            try:
                return at, load(at)
            except UnusableTileError as error:
                bad.append(f"{path(at)} ({error})")
        raise too_many(bad, self.total, self.share)

    def look_again(self, index: int, load: Callable[[int], object], path: Path) -> None:
        """Note one whose reason is not known here: only its index comes from a worker.

        Args:
            index: of the tile.
            load: as for ``first_readable``; called once for each tile.
            path: its file.

        Raises:
            DataError: if there are more distinct ones than bearable.
        """
        if index in self.seen:
            return
        reason = "it could not be read at first"
        try:
            load(index)
        except UnusableTileError as error:
            reason = str(error)
        self.add(index, path, reason)

    def add(self, index: int, path: Path, reason: str) -> None:
        """Note one; warns the first time.

        Args:
            index: of the tile.
            path: its file.
            reason: why it cannot be used.

        Raises:
            DataError: if there are more distinct ones than bearable.
        """
        if index in self.seen:
            return
        self.seen[index] = f"{path} ({reason})"
        logger.warning("%s cannot be used (%s); the next readable tile stands in for it.", path, reason)
        if len(self.seen) > self.limit:
            raise too_many(list(self.seen.values()), self.total, self.share)


def too_many(tiles: Sequence[str], total: int, share: float) -> DataError:
    """The error for more unreadable tiles than bearable, given their files with the reasons."""
    names = "".join(f"\n  {tile}" for tile in tiles[:5])
    return DataError(
        f"{len(tiles)} of {total} tiles ({len(tiles) / total:.1%}) cannot be read or hold no data, "
        f"more than the bearable share of {share:.1%}; the first of them:{names}",
        "Copy or unpack these files again, or raise max_unreadable.",
    )
