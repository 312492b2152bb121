"""The bundled sample: one real 13-band Sentinel-2 scene with land-use polygons, cut into tiles.

The labels are land use and hold only for small patches. Neighbouring patches look alike: split by the area blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import geopandas
import numpy as np
import rasterio
from affine import Affine
from numpy.typing import NDArray
from rasterio.features import rasterize

from geoexplora.bands import SENTINEL2
from geoexplora.errors import ConfigError

CLASSES = ("farm", "forest", "meadow", "residential", "water")
"""Land-use classes with enough patches to learn from."""

BLOCKS = (2, 4)
"""Rows and columns of the area blocks, 3840 m wide each."""

IGNORE = 255
"""What a mask holds where no land use is known."""

TIMESTAMP = np.datetime64("2017-02-16T10:21:01")
"""When the scene was taken (UTC)."""

PIXEL = 10
"""Metres; the bands of 20 and 60 m are resampled to it."""


class Scene(NamedTuple):
    """A whole scene.

    Attributes:
        image: (13, 768, 1536), uint16, reflectance x 10000, bands in the order of the product.
        transform: from pixel to map coordinates.
        crs: the map's reference system.
    """

    image: NDArray[np.uint16]
    transform: Affine
    crs: Any


@dataclass(frozen=True)
class Tiles:
    """Windows of the scene that lie each within one area block.

    Attributes:
        windows: (N, 4) top, left, height, width, in pixels.
        labels: (N,) position in ``classes``, or -1 without labels.
        blocks: (N,) number of the area block, row by row from 0.
        classes: names of the classes.
    """

    windows: NDArray[np.int64]
    labels: NDArray[np.int64]
    blocks: NDArray[np.int64]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        """Number of tiles."""
        return len(self.windows)

    def images(self) -> list[NDArray[np.uint16]]:
        """The pixels of each tile, (13, h, w)."""
        image = read_scene().image
        return [image[:, top : top + height, left : left + width] for top, left, height, width in self.windows]


def folder() -> Path:
    """Where the sample lies."""
    return Path(str(files("geoexplora").joinpath("sample", "s2l1c")))


def source_weights() -> Path:
    """The run folder of the demo's source weights: a small MAE on natural photographs (README beside it)."""
    return Path(str(files("geoexplora").joinpath("sample", "source")))


@lru_cache(maxsize=1)
def read_scene() -> Scene:
    """Read the scene, all bands on the 10 m grid.

    Coarser bands are resampled by nearest neighbour, which keeps the measured values.

    Returns:
        The scene; its image is shared between calls and read-only.
    """
    bands = []
    with rasterio.open(_band_file("B2")) as reference:
        shape, transform, crs = reference.shape, reference.transform, reference.crs
    for name in SENTINEL2.band_names:
        with rasterio.open(_band_file(name)) as file:
            pixels = file.read(1)
        factor = shape[0] // pixels.shape[0]
        bands.append(pixels.repeat(factor, axis=0).repeat(factor, axis=1))
    image: NDArray[np.uint16] = np.stack(bands)
    image.setflags(write=False)
    return Scene(image, transform, crs)


def _band_file(name: str) -> Path:
    padded = name if len(name) > 2 else f"{name[0]}0{name[1]}"
    return folder() / f"T33UUU_20170216T102101_{padded}.jp2"


@lru_cache(maxsize=4)
def _land_use(classes: tuple[str, ...]) -> NDArray[np.uint8]:
    """(768, 1536): 0 without a class, else 1 + the class's position."""
    scene = read_scene()
    polygons = geopandas.read_file(folder() / "landuse.gpkg").to_crs(scene.crs)
    unknown = sorted(set(classes) - set(polygons["fclass"]))
    if unknown or not classes:
        raise ConfigError(
            f"the sample has no land use {', '.join(unknown)}" if unknown else "no land-use class is named",
            f"It has: {', '.join(sorted(set(polygons['fclass'])))}.",
        )
    # Where polygons overlap, the smaller one says more about the place: it is drawn last.
    polygons = polygons.assign(area=polygons.area).sort_values("area", ascending=False, kind="stable")
    shapes = [
        (shape, classes.index(name) + 1 if name in classes else 0)
        for shape, name in zip(polygons.geometry, polygons["fclass"], strict=True)
        if shape is not None and not shape.is_empty
    ]
    burned: NDArray[np.uint8] = rasterize(
        shapes, out_shape=scene.image.shape[1:], transform=scene.transform, fill=0, dtype="uint8"
    )
    return burned


def class_mask(classes: Sequence[str] = CLASSES) -> NDArray[np.uint8]:
    """The land use of each pixel of the scene.

    Args:
        classes: the land-use classes.

    Returns:
        (768, 1536), position in ``classes``, ``IGNORE`` where no polygon of theirs lies.

    Raises:
        ConfigError: if a class is unknown.
    """
    land_use = _land_use(tuple(classes))
    return np.where(land_use == 0, np.uint8(IGNORE), land_use - 1)


def unlabelled_tiles(tile_size: int | tuple[int, int] = 16, stride: int | None = None, seed: int = 0) -> Tiles:
    """Cut the whole scene into tiles.

    Args:
        tile_size: side in pixels, or the smallest and largest side: then height and width of each tile are drawn
            between them, as tile sizes vary in fMoW-Sentinel.
        stride: distance between the tiles' upper left corners; the (largest) side by default.
        seed: of the drawn sizes.

    Returns:
        The tiles, row by row within each area block; all labels are -1.

    Raises:
        ConfigError: if the size or stride does not fit the area blocks.
    """
    low, high = (tile_size, tile_size) if isinstance(tile_size, int) else tile_size
    step = high if stride is None else stride
    height, width = (side // count for side, count in zip(read_scene().image.shape[1:], BLOCKS, strict=True))
    if not 1 <= low <= high <= min(height, width):
        raise ConfigError(
            f"a tile size of {tile_size} does not fit the sample",
            f"Tiles lie within area blocks of {height} x {width} pixels; a range is given as smallest, largest.",
        )
    if step < 1:
        raise ConfigError(f"a stride of {step} is not positive", "Give at least 1.")
    generator = np.random.default_rng(seed)
    windows, blocks = [], []
    for block in range(BLOCKS[0] * BLOCKS[1]):
        top, left = block // BLOCKS[1] * height, block % BLOCKS[1] * width
        for row in range(top, top + height - high + 1, step):
            for column in range(left, left + width - high + 1, step):
                h, w = generator.integers(low, high + 1, 2)
                windows.append((row, column, h, w))
                blocks.append(block)
    count = len(windows)
    return Tiles(np.array(windows, np.int64), np.full(count, -1, np.int64), np.array(blocks, np.int64), ())


def labelled_tiles(
    tile_size: int | tuple[int, int] = 16,
    classes: Sequence[str] = CLASSES,
    min_share: float = 0.5,
    stride: int | None = None,
    seed: int = 0,
) -> Tiles:
    """Cut out the tiles that lie for the most part in one class of land use.

    Args:
        tile_size: see ``unlabelled_tiles``.
        classes: the land-use classes.
        min_share: the least share of a tile's pixels that its class must cover.
        stride: see ``unlabelled_tiles``.
        seed: of the drawn sizes.

    Returns:
        The tiles; a label is the class that covers most of its tile.

    Raises:
        ConfigError: if a class is unknown, or the size or stride does not fit the area blocks.
    """
    names = tuple(classes)
    tiles = unlabelled_tiles(tile_size, stride, seed)
    land_use = _land_use(names)
    labels = np.full(len(tiles), -1, np.int64)
    for number, (top, left, height, width) in enumerate(tiles.windows):
        counts = np.bincount(land_use[top : top + height, left : left + width].ravel(), minlength=len(names) + 1)[1:]
        best = int(counts.argmax())
        if counts[best] >= max(1, min_share * height * width):
            labels[number] = best
    keep = labels >= 0
    return Tiles(tiles.windows[keep], labels[keep], tiles.blocks[keep], names)
