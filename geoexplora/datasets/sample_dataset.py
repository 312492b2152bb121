"""The bundled sample as a source of tiles: labelled, with masks of land use, or neither."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torchgeo.datasets import NonGeoDataset

from geoexplora.bands import SENTINEL2
from geoexplora.datasets import sample
from geoexplora.datasets.plot import plot_tile
from geoexplora.datasets.tiles import TargetKind, Tile
from geoexplora.errors import ConfigError, DataError

Sample = dict[str, Any]
SampleTarget = Literal["none", "class", "mask"]

COUNT = sample.BLOCKS[0] * sample.BLOCKS[1]
"""Number of area blocks."""


class SampleTiles(NonGeoDataset):
    """Tiles of the bundled Sentinel-2 scene; see ``geoexplora.datasets.tiles.TileSource``.

    A sample holds ``image`` (C, h, w), float32, reflectance x 10000, and ``label``, int64, or ``mask`` (h, w), int64.

    Args:
        target: ``class``: tiles mostly of one land use, and which; ``mask``: tiles where any is known, and the land
            use of each pixel, ``geoexplora.datasets.sample.IGNORE`` where it is not known; ``none``: all tiles.
        blocks: the area blocks that the tiles lie in.
        bands: the bands to return, in this order.
        tile_size: side of a tile in pixels.
        transforms: applied to each sample.

    Attributes:
        labels: (N,) class indices; -1 for masks and without labels.
        location_ids: (N,) numbers of the area blocks.
        image_ids: (N,) positions of the tiles' upper left pixels, counted row by row.

    Raises:
        ConfigError: if the target or a band is unknown, or the tile size does not fit the area blocks.
        DataError: if no tile is left.
    """

    sensor = SENTINEL2

    def __init__(
        self,
        target: SampleTarget,
        blocks: Sequence[int],
        bands: Sequence[str] = SENTINEL2.band_names,
        tile_size: int = 16,
        transforms: Callable[[Sample], Sample] | None = None,
    ) -> None:
        if target not in {"none", "class", "mask"}:
            raise ConfigError(f"the sample has no target {target!r}", "Known: none, class, mask.")
        self.target: TargetKind = target
        self.classes: tuple[str, ...] = () if target == "none" else sample.CLASSES
        self.bands = SENTINEL2.select(bands)
        self.transforms = transforms
        self._keep = list(SENTINEL2.indices(self.bands))
        tiles = sample.labelled_tiles(tile_size) if target == "class" else sample.unlabelled_tiles(tile_size)
        kept = np.isin(tiles.blocks, list(blocks))
        self._mask = sample.class_mask() if target == "mask" else None
        if self._mask is not None:
            known = self._mask != sample.IGNORE
            kept &= np.array([known[t : t + h, x : x + w].any() for t, x, h, w in tiles.windows.tolist()])
        if not kept.any():
            raise DataError(
                f"no tile of {tile_size} px with known land use lies in the sample's area blocks "
                f"{', '.join(map(str, blocks))}",
                "Take smaller tiles.",
            )
        self._windows = tiles.windows[kept]
        self.labels = tiles.labels[kept]
        self.location_ids = tiles.blocks[kept]
        self.image_ids = self._windows[:, 0] * sample.read_scene().image.shape[2] + self._windows[:, 1]

    def __len__(self) -> int:
        """Number of tiles."""
        return len(self._windows)

    def path(self, index: int) -> Path:
        """Where in the scene a tile lies."""
        top, left, _, _ = self._windows[index].tolist()
        return Path(f"tile of the sample at row {top}, column {left}")

    def read(self, index: int) -> Tile:
        """Cut a tile out of the scene.

        Args:
            index: of the tile; negative ones count from the end.

        Returns:
            The tile, (C, h, w), uint16.

        Raises:
            IndexError: if there is no such tile.
        """
        top, left, height, width = self._windows[index].tolist()
        rows, columns = slice(top, top + height), slice(left, left + width)
        image = sample.read_scene().image[self._keep, rows, columns]
        if self._mask is not None:
            return Tile(image, self._mask[rows, columns], -1)
        return Tile(image, int(self.labels[index]) if self.target == "class" else None, -1)

    def note_unreadable(self, index: int) -> None:
        """Never called: the bundled scene can be read."""

    def fingerprint(self) -> bytes:
        """Where the tiles lie, and a digest of the scene."""
        return self._windows.tobytes() + hashlib.sha256(sample.read_scene().image.tobytes()).digest()

    def __getitem__(self, index: int) -> Sample:
        """A sample with ``image`` and ``label`` or ``mask``."""
        tile = self.read(index)
        found: Sample = {"image": torch.from_numpy(tile.image.astype(np.float32))}
        if tile.target is not None:
            name = "mask" if self.target == "mask" else "label"
            found[name] = torch.as_tensor(tile.target, dtype=torch.int64)
        return self.transforms(found) if self.transforms is not None else found

    def plot(self, sample: Sample, suptitle: str | None = None) -> Figure:
        """Plot a sample; its class is the title."""
        title = self.classes[int(sample["label"])] if "label" in sample else None
        return plot_tile(sample["image"], self.bands, self.sensor, title, suptitle)


@lru_cache(maxsize=COUNT)
def area_splits(fold: int) -> dict[str, tuple[int, ...]]:
    """Area blocks of the splits: one to test on, two to validate on, five to learn from.

    Of all pairs of blocks to validate on, the one is taken whose rarest class has the most labelled tiles, and of
    these the first: where it can be, all classes are learned, and all are validated.

    Args:
        fold: the block to test on, from 0.

    Raises:
        ConfigError: if there is no such block.
    """
    if not 0 <= fold < COUNT:
        raise ConfigError(f"the sample has no fold {fold}", f"Its area blocks are 0 to {COUNT - 1}.")
    tiles = sample.labelled_tiles()
    counts: NDArray[np.int64] = np.zeros((COUNT, len(sample.CLASSES)), dtype=np.int64)
    np.add.at(counts, (tiles.blocks, tiles.labels), 1)
    others = [block for block in range(COUNT) if block != fold]

    def rarest(pair: tuple[int, ...]) -> int:
        learned = [block for block in others if block not in pair]
        return int(min(counts[learned].sum(0).min(), counts[list(pair)].sum(0).min()))

    val = max(combinations(others, 2), key=rarest)
    train = tuple(block for block in others if block not in val)
    return {"train": train, "val": val, "test_gt": (fold,)}
