"""Reads SatMAE's list files of fMoW-RGB, ``train_62classes.csv`` and the like."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pandas as pd

from geoexplora.datasets.fmow_rgb_annotations import NAME, Found, Row, Samples, gather, parse_time, read_annotation
from geoexplora.datasets.fmow_rgb_boxes import Box, Crop
from geoexplora.datasets.fmow_rgb_tree import FOLDERS, SPLITS, THREADS, Variant, names_in
from geoexplora.datasets.index_cache import cached, signature
from geoexplora.errors import DataError

LISTS = {"train": "train_62classes.csv", "val": "val_62classes.csv", "test_gt": "test_62classes.csv"}
"""SatMAE's list of each split that has one."""

WHOLE: Box = (0, 0, 0, 0)
"""Stands for the whole image."""

_COLUMNS = "label, path of the image, timestamp"
_TOPS = {*SPLITS, "test", "seq"}


@dataclass(frozen=True)
class Entries:
    """The rows of a list.

    Attributes:
        labels: names of the categories.
        paths: as they stand in the list.
        timestamps: as they stand in the list.
    """

    labels: tuple[str, ...]
    paths: tuple[str, ...]
    timestamps: tuple[str, ...]


def find_lists(root: Path, base: Path) -> dict[str, Path]:
    """The list of each split that has one, in the root, the folder of the splits, or beside that."""
    places = [root, base.parent if base == root else base]
    found = {}
    for split, name in LISTS.items():
        files = [place / name for place in places if (place / name).is_file()]
        if files:
            found[split] = files[0]
    return found


def read_list(path: Path) -> Entries:
    """Read a list: columns by position, with or without a header or an index column in front.

    Labels are names. SatMAE's numbers are taken only as far as the paths tell what they mean: each number must stand
    for one ``<category>/<category>_<location>/`` folder's category, and each category for one number.

    Raises:
        DataError: if it cannot be read, its columns are others, a value is malformed, or numbers cannot be told apart.
    """
    try:
        frame = pd.read_csv(path, header=None, dtype=str, keep_default_na=False, skipinitialspace=True).fillna("")
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError, OSError) as error:
        raise DataError(f"{path} cannot be read as csv: {error}", "Download or write it again.") from error
    last = frame.iloc[-1].tolist()
    at = next((number for number, value in enumerate(last) if _is_image(value)), -1)
    if at not in {1, 2} or frame.shape[1] < at + 2:
        raise DataError(
            f"{path} has other columns than {_COLUMNS}: its last line is {','.join(last)!r}",
            f"The lists have the columns {_COLUMNS}, in this order, and at most an index in front.",
        )
    first = 0 if _is_image(frame.iloc[0, at]) else 1
    labels, paths, timestamps = ([str(value).strip() for value in frame.iloc[first:, at + n]] for n in (-1, 0, 1))
    _refuse(path, first, "path", "A path ends with .jpg.", paths, lambda value: not _is_image(value))
    _refuse(path, first, "label", "Each row needs a label.", labels, lambda value: not value)
    if any(label.isdigit() for label in labels):
        labels = _names_of_numbers(path, labels, paths)
    return Entries(tuple(labels), tuple(paths), tuple(timestamps))


def _is_image(value: str) -> bool:
    return value.strip().lower().endswith((".jpg", ".jpeg"))


def _refuse(
    path: Path, first: int, name: str, remedy: str, values: Sequence[str], wrong: Callable[[str], bool]
) -> None:
    bad = [(row, value) for row, value in enumerate(values) if wrong(value)]
    if bad:
        examples = ", ".join(f"{value!r} in line {row + first + 1}" for row, value in bad[:5])
        raise DataError(f"{path} has {len(bad)} malformed {name}{'s' if len(bad) > 1 else ''}: {examples}", remedy)


def _names_of_numbers(path: Path, labels: Sequence[str], paths: Sequence[str]) -> list[str]:
    names = [_category(image) for image in paths]
    pairs = sorted(set(zip(labels, names, strict=True)))
    clear = all(name is not None for name in names) and len(pairs) == len(set(labels)) == len(set(names))
    if not clear or not all(label.isdigit() for label in labels):
        raise DataError(
            f"{path} has numbers as labels, such as {labels[0]!r} for {paths[0]}, and it cannot be told what they mean",
            "Write the names of the categories: orders of the classes differ, the baseline's is not alphabetical.",
        )
    return [str(name) for name in names]


def _category(image: str) -> str | None:
    """The category in ``<category>/<category>_<location>/<name>.jpg``."""
    parts = PurePosixPath(image).parts
    if len(parts) < 3 or not parts[-2].removeprefix(f"{parts[-3]}_").isdigit():
        return None
    return parts[-3]


def candidates(path: str, variant: Variant) -> list[str]:
    """Where an image of a list may be, in order: relative to the folder of the splits, or absolute.

    A path is tried as it stands; then, since lists name absolute paths of other machines, from behind the folder
    ``fmow-rgb/`` or ``fmow/`` on; then from the split's folder on.
    """
    name = path
    if variant == "msrgb" and not PurePosixPath(path).stem.endswith("_msrgb"):
        name = path.replace("_rgb.", "_msrgb.")
    parts = PurePosixPath(name).parts
    starts = [number + 1 for number, part in enumerate(parts) if part in FOLDERS]
    starts += [number for number, part in enumerate(parts[:-1]) if part in _TOPS]
    return list(dict.fromkeys([name, *("/".join(parts[start:]) for start in starts)]))


def index_list(path: Path, entries: Entries, base: Path, crop: Crop, variant: Variant, fresh: bool = False) -> Samples:
    """The images of a list, in its order.

    With ``full`` the images are taken whole. Otherwise the JSON file beside an image tells its box: the first of the
    label's category. An image without a JSON file is taken whole: it is already cropped, as by the baseline's
    preprocessing that SatMAE starts from. What the JSON files say is kept as that of a tree is (``index_tree``).

    Args:
        path: the list, which names the index file.
        entries: its rows.
        base: the folder that holds the splits.
        crop: what of an image is wanted.
        variant: which images; paths to ``_rgb`` images stand for ``_msrgb`` images as well.
        fresh: read all JSON files in any case.
    """
    where, folders = _locate(entries.paths, base, variant)

    def read(row: int) -> Found:
        return _read_row(base, entries, row, where[row], crop)

    if crop == "full":  # no file is read
        return gather(map(read, range(len(where))))

    def build() -> Samples:
        with ThreadPoolExecutor(THREADS) as pool:
            return gather(pool.map(read, range(len(where))))

    times = [(folder, (base / folder).stat().st_mtime_ns) for folder in folders]
    state = signature([path.stat().st_mtime_ns, path.stat().st_size, str(path), *times])
    file = base / f".{path.stem}-{variant}.index.npz"
    return Samples(**cached(file, state, lambda: vars(build()), fresh))


def _locate(paths: Sequence[str], base: Path, variant: Variant) -> tuple[list[str | None], list[str]]:
    """Where each image is, None where it is not there, and the folders that hold images, sorted."""
    listed: dict[str, frozenset[str]] = {}
    where: list[str | None] = [None] * len(paths)
    # In the order of the paths, one listing of a folder at a time is enough.
    for row in sorted(range(len(paths)), key=paths.__getitem__):
        for candidate in candidates(paths[row], variant):
            folder, _, name = candidate.rpartition("/")
            if folder not in listed:
                listed[folder] = names_in(base / folder)
            if name in listed[folder]:
                where[row] = candidate
                break
    return where, sorted(folder for folder, names in listed.items() if names)


def _read_row(base: Path, entries: Entries, row: int, where: str | None, crop: Crop) -> Found:
    if where is None:
        return Found(absent=[entries.paths[row]])
    match = NAME.fullmatch(PurePosixPath(where).stem)
    # Other names than the official ones: each image is a location of its own.
    place = (int(match["location"]), int(match["image"])) if match else (row, 0)
    label, time = entries.labels[row], parse_time(entries.timestamps[row])
    whole = Found(rows=[Row(where, label, *place, time, WHOLE, False)])
    annotations = (base / where).with_suffix(".json")
    if crop == "full" or not annotations.is_file():
        return whole
    annotation = read_annotation(annotations)
    boxes = [box for box in annotation.boxes if box.category == label]
    if boxes:
        return Found(rows=[Row(where, label, *place, time, boxes[0].box, boxes[0].clipped)])
    if annotation.tiny and not annotation.problems:
        return Found(tiny=1)
    problem = annotation.problems[0] if annotation.problems else f"it has no box of the category {label!r}"
    return Found(problems=[(str(PurePosixPath(where).with_suffix(".json")), problem)])
