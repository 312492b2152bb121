"""fMoW-Sentinel: Sentinel-2 tiles of functional map of the world locations (SatMAE, arXiv 2207.08051)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from geoexplora.bands import FMOW_SENTINEL_BANDS, FMOW_SENTINEL_STATISTICS, SENTINEL2
from geoexplora.datasets.fmow_index import (
    OFFICIAL_CLASSES,
    Table,
    find_layout,
    find_missing,
    read_table,
    split_name,
    table_path,
    tile_path,
)
from geoexplora.datasets.tile_dataset import Sample, TileDataset, fmow_classes, outside_years
from geoexplora.datasets.tiles import UnreadableTiles, read_geotiff
from geoexplora.errors import DataError, SplitNotFoundError

logger = logging.getLogger(__name__)


class FMoWSentinel(TileDataset):
    """fMoW-Sentinel, or any tree of the same layout.

    The csv file of a split decides which tiles belong to it; the tree may hold more files than it has rows::

        fmow-sentinel/<split>/<category>/<category>_<location_id>/<category>_<location_id>_<image_id>.tif

    Each tile is a GeoTIFF of all 13 Sentinel-2 bands; tile sizes vary. Samples are described in ``TileDataset``.

    Args:
        root: the folder that holds ``fmow-sentinel/``, or that folder; csv files beside or in it.
        split: ``train``, ``val`` or ``test_gt`` (``test`` means the same).
        bands: the bands to return, in this order.
        transforms: applied to each sample.
        missing: what to do about rows without a file: ``error``, or ``skip`` with a warning.
        years: first and last year to keep; None keeps all.
        max_unreadable: the largest bearable share of unreadable tiles; one is always borne.
        nodata: a tile of nothing but this value, or but what its own nodata tag names, counts as unreadable.

    Raises:
        SplitNotFoundError: if none of the files is there.
        DataError: if there is no csv file, it lacks a column or holds malformed values, no row is left after the
            filters, or files are missing.
        ConfigError: if a band is unknown.
    """

    sensor = SENTINEL2

    def __init__(
        self,
        root: Path | str,
        split: str = "train",
        bands: Sequence[str] = FMOW_SENTINEL_BANDS,
        transforms: Callable[[Sample], Sample] | None = None,
        *,
        missing: Literal["error", "skip"] = "error",
        years: tuple[int, int] | None = (2000, 2020),
        max_unreadable: float = 0.1,
        nodata: float = 0,
    ) -> None:
        self.root = Path(root)
        self.split = split_name(split)
        self.bands = SENTINEL2.select(bands)
        self.transforms = transforms
        self.nodata = nodata
        self._keep = SENTINEL2.indices(self.bands)
        self._fill = np.array(FMOW_SENTINEL_STATISTICS.select(self.bands).mean, dtype=np.float32)

        layout = find_layout(self.root)
        self._tiles = layout.tiles
        self._table_path = table_path(layout, self.split, self.root)
        table = read_table(self._table_path)
        found = {name for path in layout.tables.values() for name in read_table(path).categories}
        self.classes = fmow_classes(found)
        if self.classes != OFFICIAL_CLASSES and self.split == next(iter(layout.tables)):  # once for all splits
            logger.info("classes: the %d found in the csv files, not fMoW's 62", len(self.classes))

        rows = self._rows(table, years, missing)
        codes = np.array([self.classes.index(category) for category in table.categories], dtype=np.int64)
        self.labels: NDArray[np.int64] = codes[table.codes[rows]]
        self.location_ids: NDArray[np.int64] = table.location_ids[rows]
        self.image_ids: NDArray[np.int64] = table.image_ids[rows]
        self.timestamps: NDArray[np.datetime64] = table.timestamps[rows]
        self.unreadable = UnreadableTiles(len(rows), max_unreadable)

    def path(self, index: int) -> Path:
        """The file of a tile."""
        category = self.classes[self.labels[index]]
        location_id, image_id = int(self.location_ids[index]), int(self.image_ids[index])
        return tile_path(self._tiles, self.split, category, location_id, image_id)

    def load(self, index: int) -> NDArray[Any]:
        """The tile of that very index.

        Returns:
            (C, h, w) in the file's own type, or float32 if it has missing pixels: NaN, infinite, or of the value that
            the file's nodata tag names. These hold the mean of the tile's other pixels of the band; a band without any
            holds the mean published for fMoW-Sentinel.

        Raises:
            UnusableTileError: if it cannot be read or holds no data.
            DataError: if it has another number of bands.
        """
        return self._filled(read_geotiff(self.path(index), SENTINEL2.band_names, self._keep, self.nodata))

    def _filled(self, image: NDArray[Any]) -> NDArray[Any]:
        if image.dtype.kind != "f" or (valid := np.isfinite(image)).all():
            return image
        counts = valid.sum((1, 2))
        sums = np.where(valid, image, 0).sum((1, 2), dtype=np.float64)
        means = np.where(counts > 0, sums / np.maximum(counts, 1), self._fill)
        return np.where(valid, image, means.astype(np.float32)[:, None, None])

    def _rows(self, table: Table, years: tuple[int, int] | None, missing: str) -> NDArray[np.int64]:
        rows = np.arange(len(table.codes))
        dropped = []
        if years is not None:
            keep = ~outside_years(table.timestamps, years)
            dropped.append(f"{np.count_nonzero(~keep)} outside the years {years[0]} to {years[1]}")
            rows = rows[keep]
        absent = find_missing(self._tiles, self.split, table, rows)
        if absent.any():
            gone = rows[absent]
            if absent.all():
                raise SplitNotFoundError(
                    f"none of the {len(rows)} tiles that {self._table_path} names is there, such as "
                    f"{self._row_path(table, rows[0])}",
                    "Unpack them, or correct root.",
                )
            paths = "".join(f"\n  {self._row_path(table, row)}" for row in gone[:5])
            if missing == "error":
                raise DataError(
                    f"{len(gone)} of the {len(rows)} tiles that {self._table_path} names are missing; "
                    f"the first of them:{paths}",
                    "Unpack the missing part, correct root, or go on without them: --missing skip.",
                )
            dropped.append(f"{len(gone)} without a file")
            logger.warning(
                "%d of the %d tiles that %s names are missing and skipped; the first of them:%s",
                len(gone),
                len(rows),
                self._table_path,
                paths,
            )
            rows = rows[~absent]
        if rows.size == 0:
            raise DataError(
                f"no tile is left of the {len(table.codes)} rows of {self._table_path}"
                f"{': ' + ', '.join(dropped) if dropped else ''}",
                "Widen the filters (years), or check that root is the right folder.",
            )
        return rows

    def _row_path(self, table: Table, row: int) -> Path:
        category = table.categories[table.codes[row]]
        return tile_path(self._tiles, self.split, category, int(table.location_ids[row]), int(table.image_ids[row]))
