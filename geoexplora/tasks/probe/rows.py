"""Rows of features that lie on disk, read by their numbers, the next ones while the last are worked on.

Shapes: N rows, n rows read, F columns.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Index = NDArray[np.int64]

_EVERYTHING = slice(None)


class FeatureRows:
    """The rows of several arrays, one array after the other; memory holds what is read of them, no more.

    Args:
        parts: arrays of as many columns, in memory or mapped from disk.
    """

    def __init__(self, parts: Sequence[NDArray[Any]]) -> None:
        self.parts = [torch.from_numpy(part) for part in parts]
        self.starts = np.cumsum([0, *(len(part) for part in parts)])

    def __len__(self) -> int:
        """Number N of rows."""
        return int(self.starts[-1])

    def read(self, rows: Index, columns: slice = _EVERYTHING) -> Tensor:
        """Some rows, (n, F), in their own type.

        Args:
            rows: (n,) their numbers.
            columns: which columns.
        """
        of = np.searchsorted(self.starts, rows, side="right") - 1
        if len(rows) and (of == of[0]).all():
            return self._of_part(int(of[0]), rows, columns)
        out = self.parts[0][:0, columns].new_empty(len(rows), self.parts[0][:0, columns].shape[1])
        for part in np.unique(of).tolist():
            chosen = np.flatnonzero(of == part)
            out[torch.from_numpy(chosen)] = self._of_part(part, rows[chosen], columns)
        return out

    def _of_part(self, part: int, rows: Index, columns: slice) -> Tensor:
        return self.parts[part][:, columns].index_select(0, torch.from_numpy(rows - self.starts[part]))

    def stream(
        self, batches: Iterable[Index], columns: slice = _EVERYTHING, device: torch.device | str = "cpu"
    ) -> Iterator[Tensor]:
        """Rows batch by batch, on a device; those to come are read meanwhile.

        Args:
            batches: (n,) numbers of rows each.
            columns: which columns.
            device: where to.
        """
        device = torch.device(device)

        def read(rows: Index) -> Tensor:
            found = self.read(rows, columns)
            return found.pin_memory() if device.type == "cuda" else found

        for found in _ahead(read, batches):
            yield found.to(device, non_blocking=True)


def chunks(rows: Index, size: int) -> Iterator[Index]:
    """Consecutive pieces of at most that size."""
    return (rows[start : start + size] for start in range(0, len(rows), size))


def _ahead[X, Y](function: Callable[[X], Y], items: Iterable[X], count: int = 2) -> Iterator[Y]:
    """The function of each item, computed in another thread for so many items in advance."""
    waiting: deque[Future[Y]] = deque()
    with ThreadPoolExecutor(1) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
