"""Writes the bundled sample as a true fMoW-RGB tree, which is then read like any user's data."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import imagecodecs
import numpy as np
from numpy.typing import NDArray

from geoexplora.bands import SENTINEL2
from geoexplora.datasets import sample
from geoexplora.datasets.fmow_rgb_tree import FOLDERS, VARIANTS
from geoexplora.datasets.sample_tree import AREA_SPLITS, evenly
from geoexplora.errors import DataError

WHITE = 3558
"""Reflectance x 10000 that becomes 255, as in ESA's true-colour images of Sentinel-2."""

QUALITY = 90
COARSE = 4
"""By how much ``_msrgb`` images are smaller than ``_rgb`` images."""


def write_fmow_rgb_tree(
    root: Path | str,
    tile_size: int | tuple[int, int] = 32,
    *,
    margin: int = 16,
    classes: Sequence[str] = sample.CLASSES,
    splits: Mapping[str, Sequence[int]] = AREA_SPLITS,
    limit: int | None = None,
    seed: int = 0,
) -> Path:
    """Write the sample's land-use tiles in true colour, as JPEG and JSON files of fMoW-RGB's layout.

    A bounding box is a tile mostly of one class; its image shows more of the surroundings. ``location_id`` is the
    number of the area block, ``image_id`` counts the tiles of a class in a block.

    Args:
        root: receives ``fmow-rgb/``.
        tile_size: side of the boxes in pixels, or the smallest and largest of boxes of varying height and width.
        margin: how much an image is larger than its box, at each side that does not end the scene.
        classes: the land-use classes.
        splits: the area blocks of each split.
        limit: keep at most so many boxes of a class and block, evenly spread.
        seed: of the sizes of varying boxes.

    Returns:
        The root.

    Raises:
        DataError: if the root already holds such a tree or cannot be written.
        ConfigError: if a class is unknown or the tile size does not fit the scene.
    """
    root = Path(root)
    if (root / FOLDERS[0]).exists():
        raise DataError(f"{root / FOLDERS[0]} exists already", "Give an empty folder, or remove the old tree.")
    tiles = sample.labelled_tiles(tile_size, classes, seed=seed)
    kept = evenly(tiles, limit)
    numbers: Counter[tuple[str, int]] = Counter()
    try:
        for split, blocks in splits.items():
            for row in kept[np.isin(tiles.blocks[kept], list(blocks))]:
                category, block = tiles.classes[tiles.labels[row]], int(tiles.blocks[row])
                place = f"{category}_{block}"
                stem = root / FOLDERS[0] / split / category / place / f"{place}_{numbers[category, block]}"
                numbers[category, block] += 1
                _write_image(stem, category, *(int(value) for value in tiles.windows[row]), margin=margin)
    except OSError as error:
        raise DataError(f"the sample cannot be written to {root}: {error}", "Choose a folder with space.") from error
    return root


@lru_cache(maxsize=1)
def _true_colour() -> NDArray[np.uint8]:
    """(768, 1536, 3)."""
    bands = sample.read_scene().image[list(SENTINEL2.indices(("red", "green", "blue")))]
    return np.moveaxis(np.clip(bands.astype(np.float32) / WHITE * 255, 0, 255).astype(np.uint8), 0, -1)


def _write_image(stem: Path, category: str, top: int, left: int, height: int, width: int, *, margin: int) -> None:
    upper, start = max(top - margin, 0), max(left - margin, 0)
    whole = _true_colour()[upper : top + height + margin, start : left + width + margin]
    stem.parent.mkdir(parents=True, exist_ok=True)
    for variant in VARIANTS:
        factor = COARSE if variant == "msrgb" else 1
        picture = np.ascontiguousarray(whole[::factor, ::factor])
        box = [side // factor for side in (left - start, top - upper, width, height)]
        stem.with_name(f"{stem.name}_{variant}.jpg").write_bytes(imagecodecs.jpeg8_encode(picture, level=QUALITY))
        metadata = {
            "gsd": float(sample.PIXEL * factor),
            "utm": "33U",
            "timestamp": f"{sample.TIMESTAMP}Z",
            "cloud_cover": 0,
            "country_code": "DEU",
            "img_width": picture.shape[1],
            "img_height": picture.shape[0],
            "bounding_boxes": [{"ID": -1, "category": category, "box": box}],
        }
        stem.with_name(f"{stem.name}_{variant}.json").write_text(json.dumps(metadata))
