"""What lies under a folder, for datasets that do not tell which files their images come from."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from stat import S_ISDIR

_OWN_FILES = {".lock", "probe.json", "per_class.csv", "confusion.png"}
"""What this package writes beside features."""


class FileTree:
    """All files under a folder, but for what this package writes there: runs, features, results of probes.

    Links are followed, and every folder is looked at once, wherever links lead.

    Args:
        root: the folder. It is read when its state is asked for, and not again.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    @cached_property
    def state(self) -> bytes:
        """Digest of where the folder lies, and of the files' names, sizes and times of last change (ns)."""
        root = self.root.resolve()
        found = hashlib.sha256(os.fsencode(root))
        for name, size, time in _files(os.fspath(root)):
            found.update(os.fsencode(name) + f"\n{size} {time}\n".encode())
        return found.digest()


def _files(root: str) -> Iterator[tuple[str, int, int]]:
    """Name, size and time of each file, in an order that depends on the names only; -1 for links to nowhere."""
    seen: set[tuple[int, int]] = set()
    folders = [root]
    while folders:
        folder = folders.pop()
        try:
            place = Path(folder).stat()
            with os.scandir(folder) as entries:
                inside = sorted(entries, key=lambda entry: entry.name)
        except OSError:  # nobody reads images there
            continue
        if (place.st_dev, place.st_ino) in seen or (folder != root and _is_own({entry.name for entry in inside})):
            continue
        seen.add((place.st_dev, place.st_ino))
        for entry in inside:
            try:
                state = entry.stat()
            except OSError:
                yield entry.path, -1, -1
                continue
            if S_ISDIR(state.st_mode):
                folders.append(entry.path)
            elif entry.name not in _OWN_FILES:
                yield entry.path, state.st_size, state.st_mtime_ns


def _is_own(names: set[str]) -> bool:
    """Whether a folder of these files is a run of this package, or its features of one split."""
    return "run.json" in names or {"features.npy", "labels.npy"} <= names
