"""Writes the bundled sample as a true fMoW-Sentinel tree, which is then read like any user's data."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.transform import from_origin
from rasterio.warp import transform_bounds
from shapely.geometry import box

from geoexplora.datasets import sample
from geoexplora.datasets.fmow_index import COLUMNS, FOLDER, tile_path
from geoexplora.errors import DataError

AREA_SPLITS: dict[str, tuple[int, ...]] = {"train": (0, 1, 2, 4), "val": (5,), "test_gt": (3, 6, 7)}
"""Area blocks of each split of the labelled tree: every class stands in each."""

UNLABELLED = "unlabelled"


def write_fmow_tree(
    root: Path | str,
    tile_size: int | tuple[int, int] = 16,
    labelled: bool = True,
    *,
    classes: Sequence[str] = sample.CLASSES,
    min_share: float = 0.5,
    stride: int | None = None,
    splits: Mapping[str, Sequence[int]] = AREA_SPLITS,
    limit: int | None = None,
    seed: int = 0,
) -> Path:
    """Write the sample as csv files, folders and 13-band GeoTIFFs of fMoW-Sentinel's layout.

    ``location_id`` is the number of the area block, ``image_id`` counts the tiles of a class in a block, and all
    tiles have the scene's timestamp.

    Args:
        root: receives ``<split>.csv`` and ``fmow-sentinel/``.
        tile_size: side in pixels, or the smallest and largest side of tiles of varying height and width.
        labelled: True: tiles mostly of one land-use class, split by area blocks; False: the whole scene as one
            category ``unlabelled`` in ``train.csv``.
        classes: the land-use classes of labelled tiles.
        min_share: the least share of a labelled tile that its class must cover.
        stride: distance between tiles; the (largest) side by default.
        splits: the area blocks of each split of labelled tiles.
        limit: keep at most so many tiles of a class and block (of a block without labels), evenly spread.
        seed: of the sizes of varying tiles.

    Returns:
        The root.

    Raises:
        DataError: if the root already holds such a tree or cannot be written.
        ConfigError: if a class is unknown or the tile size or stride does not fit the scene.
    """
    root = Path(root)
    if labelled:
        tiles = sample.labelled_tiles(tile_size, classes, min_share, stride, seed)
    else:
        tiles = sample.unlabelled_tiles(tile_size, stride, seed)
        splits = {"train": range(sample.BLOCKS[0] * sample.BLOCKS[1])}
    present = [str(root / f"{split}.csv") for split in splits if (root / f"{split}.csv").exists()]
    if present:
        raise DataError(f"{present[0]} exists already", "Give an empty folder, or remove the old tree.")
    kept = evenly(tiles, limit)
    try:
        # One environment around all files spares each of them its own.
        with rasterio.Env(GDAL_PAM_ENABLED=False):
            for split, blocks in splits.items():
                _write_split(root, split, tiles, kept[np.isin(tiles.blocks[kept], list(blocks))])
    except (OSError, rasterio.errors.RasterioError) as error:
        raise DataError(f"the sample cannot be written to {root}: {error}", "Choose a folder with space.") from error
    return root


def evenly(tiles: sample.Tiles, limit: int | None) -> NDArray[np.int64]:
    """Positions of the tiles to keep: at most so many of a class and block, evenly spread."""
    everything = np.arange(len(tiles))
    if limit is None:
        return everything
    kept = []
    for block in np.unique(tiles.blocks):
        for label in np.unique(tiles.labels):
            found = everything[(tiles.blocks == block) & (tiles.labels == label)]
            if len(found) > limit:
                found = found[np.linspace(0, len(found) - 1, limit).round().astype(np.int64)]
            kept.append(found)
    return np.sort(np.concatenate(kept))


def _write_split(root: Path, split: str, tiles: sample.Tiles, rows: NDArray[np.int64]) -> None:
    scene = sample.read_scene()
    numbers: Counter[tuple[str, int]] = Counter()
    root.mkdir(parents=True, exist_ok=True)
    with (root / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["", *COLUMNS, "polygon"])
        for line, row in enumerate(rows):
            top, left, height, width = (int(value) for value in tiles.windows[row])
            block, label = int(tiles.blocks[row]), int(tiles.labels[row])
            category = tiles.classes[label] if label >= 0 else UNLABELLED
            image_id = numbers[category, block]
            numbers[category, block] += 1
            west, north = scene.transform.c + left * sample.PIXEL, scene.transform.f - top * sample.PIXEL
            path = tile_path(root / FOLDER, split, category, block, image_id)
            path.parent.mkdir(parents=True, exist_ok=True)
            with rasterio.open(
                path, "w", driver="GTiff", width=width, height=height, count=len(scene.image), dtype="uint16",
                crs=scene.crs, transform=from_origin(west, north, sample.PIXEL, sample.PIXEL), compress="deflate",
            ) as tile:  # fmt: skip
                tile.write(scene.image[:, top : top + height, left : left + width])
            east, south = west + width * sample.PIXEL, north - height * sample.PIXEL
            bounds = transform_bounds(scene.crs, "EPSG:4326", west, south, east, north)
            table.writerow([line, category, block, image_id, f"{sample.TIMESTAMP}Z", box(*bounds).wkt])
