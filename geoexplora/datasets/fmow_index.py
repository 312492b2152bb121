"""Reads the csv files of fMoW-Sentinel into arrays."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from geoexplora.errors import DataError

COLUMNS = ("category", "location_id", "image_id", "timestamp")
"""What a csv must hold; ``polygon`` and the unnamed index column are not needed."""

SPLITS = ("train", "val", "test_gt")
"""Names of the official splits' csv files and folders."""

FOLDER = "fmow-sentinel"

OFFICIAL_CLASSES = (
    "airport", "airport_hangar", "airport_terminal", "amusement_park", "aquaculture", "archaeological_site", "barn",
    "border_checkpoint", "burial_site", "car_dealership", "construction_site", "crop_field", "dam",
    "debris_or_rubble", "educational_institution", "electric_substation", "factory_or_powerplant", "fire_station",
    "flooded_road", "fountain", "gas_station", "golf_course", "ground_transportation_station", "helipad", "hospital",
    "impoverished_settlement", "interchange", "lake_or_pond", "lighthouse", "military_facility",
    "multi-unit_residential", "nuclear_powerplant", "office_building", "oil_or_gas_facility", "park",
    "parking_lot_or_garage", "place_of_worship", "police_station", "port", "prison", "race_track", "railway_bridge",
    "recreational_facility", "road_bridge", "runway", "shipyard", "shopping_mall", "single-unit_residential",
    "smokestack", "solar_farm", "space_facility", "stadium", "storage_tank", "surface_mine", "swimming_pool",
    "toll_booth", "tower", "tunnel_opening", "waste_disposal", "water_treatment_facility", "wind_farm", "zoo",
)  # fmt: skip
"""The 62 categories of fMoW without ``false_detection``, alphabetical."""


@dataclass(frozen=True)
class Table:
    """The rows of one csv file, as read-only arrays of equal length.

    Attributes:
        categories: the distinct categories, sorted.
        codes: position of each row's category in ``categories``.
        location_ids: unique only within category and split.
        image_ids: under 100 an acquisition, 100 and up a six-month composite.
        timestamps: UTC, to the second.
    """

    categories: tuple[str, ...]
    codes: NDArray[np.int64]
    location_ids: NDArray[np.int64]
    image_ids: NDArray[np.int64]
    timestamps: NDArray[np.datetime64]


@dataclass(frozen=True)
class Layout:
    """Where a tree keeps its parts.

    Attributes:
        tables: the csv file of each split that has one.
        tiles: the folder that holds the splits' folders.
    """

    tables: dict[str, Path]
    tiles: Path


def split_name(split: str) -> str:
    """The official name of a split; ``test`` is ``test_gt``.

    Raises:
        DataError: if there is no such split.
    """
    name = "test_gt" if split == "test" else split
    if name not in SPLITS:
        raise DataError(f"unknown split {split!r}", "The splits are train, val and test_gt (or test).")
    return name


def find_layout(root: Path) -> Layout:
    """Find csv files and tiles: the root may hold ``fmow-sentinel/`` or be that folder.

    Raises:
        DataError: if the root is not a folder, or no csv file is there.
    """
    if not root.is_dir():
        raise DataError(
            f"the data folder {root} does not exist" if not root.exists() else f"{root} is not a folder",
            f"Give the folder that holds {FOLDER}/ and the csv files as root.",
        )
    inner = root / FOLDER
    tiles = inner if inner.is_dir() else root
    # A root that is itself fmow-sentinel/ may have its csv files beside it.
    places = [root, inner, root.parent] if tiles is root else [root, inner]
    tables = {}
    for split in SPLITS:
        found = [place / f"{split}.csv" for place in places if (place / f"{split}.csv").is_file()]
        if found:
            tables[split] = found[0]
    return Layout(tables, tiles)


def table_path(layout: Layout, split: str, root: Path) -> Path:
    """The csv file of a split.

    Raises:
        DataError: if there is none; says where it was looked for.
    """
    if split in layout.tables:
        return layout.tables[split]
    places = [root, layout.tiles] if layout.tiles != root else [root, root / FOLDER, root.parent]
    looked = ", ".join(str(place / f"{split}.csv") for place in places)
    others = f" There is only {', '.join(path.name for path in layout.tables.values())}." if layout.tables else ""
    raise DataError(
        f"no csv file for the split {split!r}: looked for {looked}.{others}",
        f"fMoW-Sentinel comes with train.csv, val.csv and test_gt.csv; put them beside or into {FOLDER}/, "
        "or point root at the folder that holds them.",
    )


def read_table(path: Path) -> Table:
    """Read a csv file; repeated calls share one result as long as the file does not change.

    Raises:
        DataError: if the file is unreadable or empty, lacks a column, or holds malformed ids or timestamps.
    """
    state = path.stat()
    return _read_table(path, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=8)
def _read_table(path: Path, changed: int, size: int) -> Table:
    try:
        names = [str(name) for name in pd.read_csv(path, nrows=0).columns]
        missing = [column for column in COLUMNS if column not in names]
        if missing:
            found = ", ".join(name for name in names if not name.startswith("Unnamed"))
            raise DataError(
                f"{path} has no column {', '.join(missing)}; it has {found or 'none'}",
                f"The csv files of fMoW-Sentinel have the columns {', '.join(COLUMNS)}, polygon.",
            )
        frame = pd.read_csv(path, usecols=list(COLUMNS), dtype=str, keep_default_na=False).fillna("")
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError, OSError) as error:
        raise DataError(f"{path} cannot be read as csv: {error}", "Download or write it again.") from error
    codes, categories = pd.factorize(frame["category"], sort=True)
    _refuse(path, "category", frame["category"], frame["category"].str.strip() == "")
    table = Table(
        tuple(str(category) for category in categories),
        codes.astype(np.int64),
        _integers(path, frame["location_id"]),
        _integers(path, frame["image_id"]),
        _timestamps(path, frame["timestamp"]),
    )
    for array in (table.codes, table.location_ids, table.image_ids, table.timestamps):
        array.setflags(write=False)
    return table


def _integers(path: Path, column: pd.Series[str]) -> NDArray[np.int64]:
    numbers = pd.to_numeric(column, errors="coerce").to_numpy(dtype=np.float64)
    _refuse(path, str(column.name), column, ~(np.isfinite(numbers) & (numbers >= 0) & (numbers == np.floor(numbers))))
    integers: NDArray[np.int64] = numbers.astype(np.int64)
    return integers


def _timestamps(path: Path, column: pd.Series[str]) -> NDArray[np.datetime64]:
    # Fractional seconds stand in some rows only, so each row is parsed by itself.
    times = pd.to_datetime(column, format="ISO8601", utc=True, errors="coerce")
    _refuse(path, "timestamp", column, times.isna())
    seconds: NDArray[np.datetime64] = times.dt.tz_localize(None).to_numpy(dtype="datetime64[s]")
    return seconds


def _refuse(path: Path, name: str, column: pd.Series[str], bad: NDArray[np.bool_] | pd.Series[bool]) -> None:
    rows = np.flatnonzero(np.asarray(bad))
    if rows.size:
        # A csv line: one for the header, and counted from one.
        examples = ", ".join(f"{column.iloc[row]!r} in line {row + 2}" for row in rows[:5])
        wanted = {"timestamp": "Timestamps look like 2017-02-16T10:21:01Z.", "category": "Each row needs a category."}
        raise DataError(
            f"{path} has {rows.size} malformed {name} value{'' if rows.size == 1 else 's'}: {examples}",
            wanted.get(name, "Ids are whole numbers of at least 0."),
        )


def tile_path(tiles: Path, split: str, category: str, location_id: int, image_id: int) -> Path:
    """The official path of a tile."""
    place = f"{category}_{location_id}"
    return tiles / split / category / place / f"{place}_{image_id}.tif"


def find_missing(tiles: Path, split: str, table: Table, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which of the rows have no file.

    Lists each location's folder once, which on a network file system is far cheaper than asking for each file.

    Returns:
        Boolean array, one per row given.
    """
    order = np.lexsort((table.location_ids[rows], table.codes[rows]))
    # Plain lists: numpy's scalars would take most of the time.
    codes, places, images = (
        column[rows][order].tolist() for column in (table.codes, table.location_ids, table.image_ids)
    )
    here: tuple[int, int] | None = None
    names: frozenset[str] = frozenset()
    stem = ""
    absent = []
    for code, place, image in zip(codes, places, images, strict=True):
        if (code, place) != here:
            here = (code, place)
            category = table.categories[code]
            stem = f"{category}_{place}"
            names = _names(tiles / split / category / stem)
        absent.append(f"{stem}_{image}.tif" not in names)
    missing = np.zeros(len(rows), dtype=np.bool_)
    missing[order] = absent
    return missing


def _names(folder: Path) -> frozenset[str]:
    try:
        with os.scandir(folder) as entries:
            return frozenset(entry.name for entry in entries)
    except OSError:
        return frozenset()
