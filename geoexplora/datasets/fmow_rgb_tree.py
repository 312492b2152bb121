"""Finds and indexes the official tree of fMoW-RGB."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from geoexplora.datasets.fmow_rgb_annotations import NAME, Found, Row, Samples, gather, read_annotation
from geoexplora.datasets.index_cache import cached, folder_times, signature
from geoexplora.errors import DataError

Variant = Literal["rgb", "msrgb"]
VARIANTS: tuple[Variant, ...] = ("rgb", "msrgb")

FOLDERS = ("fmow-rgb", "fmow")
"""Names of the folder that holds the splits: the official one, and the one of SatMAE's instructions."""

SPLITS = ("train", "val", "test_gt", "seq_gt")
"""Names of the splits; the images of the last two are published as ``test`` and ``seq``."""

THREADS = 16
"""Reading many small files waits for the file system."""


@dataclass(frozen=True)
class Tree:
    """The folders of one split.

    Attributes:
        base: the folder that holds the splits.
        split: one of ``SPLITS``.
        pairs: folders of the JSON files and of the images of a location, relative to ``base``; mostly the same.
        state: changes when files are added, removed or renamed.
    """

    base: Path
    split: str
    pairs: tuple[tuple[str, str], ...]
    state: str


def split_name(split: str) -> str:
    """The name of a split; ``test`` is ``test_gt``, ``seq`` is ``seq_gt``.

    Raises:
        DataError: if there is no such split.
    """
    name = f"{split}_gt" if split in {"test", "seq"} else split
    if name not in SPLITS:
        raise DataError(f"unknown split {split!r}", "The splits are train, val, test_gt (or test), seq_gt (or seq).")
    return name


def find_base(root: Path) -> Path:
    """The folder that holds the splits: one of ``FOLDERS`` in the root, or the root.

    Raises:
        DataError: if the root is not a folder.
    """
    if not root.is_dir():
        raise DataError(
            f"the data folder {root} does not exist" if not root.exists() else f"{root} is not a folder",
            f"Give the folder that holds {FOLDERS[0]}/ as root.",
        )
    return next((root / name for name in FOLDERS if (root / name).is_dir()), root)


def has_tree(base: Path, split: str) -> bool:
    """Whether there are folders of a split."""
    return (base / split).is_dir() or (base / split.removesuffix("_gt")).is_dir()


def category_folders(base: Path) -> set[str]:
    """The categories that the folders of all splits are named after.

    Those of ``test`` and ``seq`` as published are numbered, and count for none.
    """
    return {
        name
        for split in (*SPLITS, "test", "seq")
        for name in names_in(base / split)
        if not name.isdigit() and (base / split / name).is_dir()
    }


def find_tree(base: Path, split: str) -> Tree:
    """Find the folders of a split.

    The ground truth of ``test`` and ``seq`` is an archive of its own, ``groundtruth.tar.bz2``, to be unpacked beside
    them: ``test_gt_mapping.json`` then tells which folder of JSON files in ``test_gt/`` belongs to which folder of
    images in ``test/``. Images that were moved to ``test_gt/<category>/<category>_<location>/`` need no such file.

    Raises:
        DataError: if there are none, or the labels are missing.
    """
    annotated, images = base / split, base / split.removesuffix("_gt")
    mapping = base / f"{split}_mapping.json"
    hidden = split != images.name and images.is_dir()
    if hidden and mapping.is_file():
        times = [*folder_times(images, 1), *(folder_times(annotated, 2) if annotated.is_dir() else [])]
        return Tree(base, split, _read_mapping(mapping, split), signature([mapping.stat().st_mtime_ns, *times]))
    folder = annotated if annotated.is_dir() else images
    if not folder.is_dir():
        raise DataError(
            f"there is neither a list nor a folder of the split {split!r} in {base}",
            f"Unpack it there, as {images.name}/<category>/<category>_<location>/, or give another root.",
        )
    times = folder_times(folder, 2)
    pairs = tuple((name, name) for name, _ in times if name.count("/") == 2)
    if hidden and not any(name.endswith(".jpg") for name in (names_in(base / pairs[0][1]) if pairs else ())):
        raise DataError(
            f"the images in {images} have no labels: there is no {mapping}",
            f"Unpack groundtruth.tar.bz2 into {base}; it brings {split}/ and {mapping.name}.",
        )
    return Tree(base, split, pairs, signature(times))


def _read_mapping(path: Path, split: str) -> tuple[tuple[str, str], ...]:
    try:
        pairs = [(str(entry["input"]), str(entry["output"])) for entry in json.loads(path.read_bytes())]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{path} cannot be read: {error!r}", "Unpack it again from groundtruth.tar.bz2: a list of input and output."
        ) from error
    wrong = [pair for pair in pairs if pair[0].split("/")[0] != split or pair[0].count("/") != 2]
    if wrong:
        raise DataError(
            f"{path} names {wrong[0][0]!r} as a folder of ground truth",
            f"Such folders are {split}/<category>/<category>_<location>; unpack groundtruth.tar.bz2 again.",
        )
    return tuple(sorted(pairs))


def index_tree(tree: Tree, variant: Variant, fresh: bool = False) -> Samples:
    """All bounding boxes of a split, by category, location and image.

    The first time, all JSON files are read; what they say is kept in ``.<split>-<variant>.index.npz`` in ``base``, if
    that can be written. It is made anew when files or folders are added, removed or renamed, but not when a JSON file
    is overwritten in place: then remove it by hand.

    Args:
        tree: the split.
        variant: ``rgb`` or ``msrgb``.
        fresh: read all JSON files in any case.
    """
    file = tree.base / f".{tree.split}-{variant}.index.npz"
    return Samples(**cached(file, tree.state, lambda: vars(gather(_read_folders(tree, variant))), fresh))


def _read_folders(tree: Tree, variant: Variant) -> Iterator[Found]:
    def read(pair: tuple[str, str]) -> Found:
        return _read_folder(tree.base, *pair, variant)

    def order(pair: tuple[str, str]) -> tuple[str, int, str]:
        category, _, location = pair[0].rpartition("_")
        return category, int(location) if location.isdigit() else -1, location

    with ThreadPoolExecutor(THREADS) as pool:
        yield from pool.map(read, sorted(tree.pairs, key=order))


def _read_folder(base: Path, annotations: str, images: str, variant: Variant) -> Found:
    found = Found()
    ending = f"_{variant}.json"
    names = names_in(base / annotations)
    pictures = names if images == annotations else names_in(base / images)
    # In ``test`` and ``seq`` the images are named after their own folder; only the image's number is the same.
    left = {name for name in pictures if name.endswith(f"_{variant}.jpg")}
    entries = [(match, name) for name in names if name.endswith(ending) and (match := NAME.fullmatch(name[:-5]))]
    for match, name in sorted(entries, key=lambda entry: int(entry[0]["image"])):
        picture = f"{name[:-5]}.jpg"
        if images != annotations:
            picture = f"{images.rpartition('/')[2]}_{match['image']}_{variant}.jpg"
        path = f"{images}/{picture}"
        if picture not in left:
            found.absent.append(path)
            continue
        left.discard(picture)
        annotation = read_annotation(base / annotations / name)
        found.tiny += annotation.tiny
        found.problems += [(f"{annotations}/{name}", problem) for problem in annotation.problems]
        place = int(match["location"]), int(match["image"]), annotation.timestamp
        found.rows += [Row(path, category, *place, box, clipped) for category, box, clipped in annotation.boxes]
    found.problems += [(f"{images}/{name}", "no JSON file describes it") for name in sorted(left)]
    return found


def names_in(folder: Path) -> frozenset[str]:
    """The names in a folder; none if it is not there."""
    try:
        with os.scandir(folder) as entries:
            return frozenset(entry.name for entry in entries)
    except OSError:
        return frozenset()
