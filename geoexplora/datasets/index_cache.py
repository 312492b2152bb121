"""Keeps what was learnt from a large tree of small files beside it, so that only the first start has to read them."""

from __future__ import annotations

import hashlib
import logging
import os
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geoexplora.errors import RunError
from geoexplora.weights.atomic import atomic_path

logger = logging.getLogger(__name__)

Arrays = dict[str, NDArray[Any]]

_SIGNATURE = "signature"


def folder_times(folder: Path, depth: int) -> list[tuple[str, int]]:
    """A folder and those within it, down to some depth, with the times of their last change, sorted.

    A folder's time changes when a file or folder directly in it is added, removed or renamed, not when one is
    overwritten in place.

    Returns:
        Paths relative to the folder's parent, and nanoseconds.
    """
    found = [(folder.name, folder.stat().st_mtime_ns)]
    level = [folder.name]
    for _ in range(depth):
        below = []
        for name in level:
            with os.scandir(folder.parent / name) as entries:
                below += [(f"{name}/{entry.name}", entry.stat().st_mtime_ns) for entry in entries if entry.is_dir()]
        found += below
        level = [name for name, _ in below]
    return sorted(found)


def signature(parts: Iterable[object]) -> str:
    """A digest of the representations of some objects."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(repr(part).encode())
    return digest.hexdigest()


def cached(file: Path, state: str, build: Callable[[], Arrays], fresh: bool = False) -> Arrays:
    """The arrays in a file, built and written anew unless it was written for the same state.

    Where the file cannot be written, as in a read-only folder, they are built at each call.

    Args:
        file: an npz file.
        state: of what the arrays are built from; see ``signature``.
        build: builds the arrays; none of them of Python objects.
        fresh: build anew in any case.
    """
    kept = None if fresh else _read(file, state)
    if kept is not None:
        return kept
    logger.info("reading all annotations, which takes a while the first time, to keep them in %s", file)
    arrays = build()
    try:
        with atomic_path(file) as temporary, temporary.open("wb") as target:
            np.savez(target, allow_pickle=False, **arrays, **{_SIGNATURE: np.array(state)})
    except RunError as error:
        logger.info("the index cannot be kept, the next start reads all files again: %s", str(error).splitlines()[0])
    return arrays


def _read(file: Path, state: str) -> Arrays | None:
    try:
        with np.load(file, allow_pickle=False) as stored:
            if str(stored[_SIGNATURE]) != state:
                return None
            return {name: stored[name] for name in stored.files if name != _SIGNATURE}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):  # absent, or damaged: built anew
        return None
