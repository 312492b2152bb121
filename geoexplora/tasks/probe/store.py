"""Features on disk: written in order, gone on with after a kill, checked when they are opened.

Shapes: N images, R readable ones, F features.
"""

from __future__ import annotations

import json
import os
import time
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from geoexplora.errors import WeightsError
from geoexplora.tasks.features import FeatureBatch
from geoexplora.weights.atomic import write_failure, write_text

RECORD_SECONDS = 10.0
"""About so much work is lost when an extraction is killed."""

_BLOCK = 1 << 24
"""Bytes read at once when checksums are computed."""


class Chunk(NamedTuple):
    """What is safe on disk up to one record of progress.

    Attributes:
        images: of the dataset, looked at so far.
        rows: readable ones among them.
        features: checksum of the features since the chunk before.
        labels: checksum of the labels since then.
    """

    images: int
    rows: int
    features: int
    labels: int


@dataclass(frozen=True)
class StoredFeatures:
    """Features of one split, mapped from disk.

    Attributes:
        features: (R, F), float32 or float16.
        indices: (R,), which image of the dataset each row is.
        labels: (R,).
    """

    features: NDArray[Any]
    indices: NDArray[np.int64]
    labels: NDArray[np.int64]


class FeatureStore:
    """A folder with ``features.npy`` (R, F), ``labels.npy`` (R, 2), index and label, and ``progress.json``.

    Only plain writes are made, never through a mapping: a full disk is an error then, not a crash. What
    ``progress.json`` records has been synced before, and carries checksums.

    Args:
        folder: where.
        images: number N of images in the dataset.
        width: number F of features.
        dtype: of the features.
    """

    def __init__(self, folder: Path, images: int, width: int, dtype: type[np.floating[Any]]) -> None:
        self.folder = folder
        self.images = images
        self._features = _Array(folder / "features.npy", width, np.dtype(dtype))
        self._labels = _Array(folder / "labels.npy", 2, np.dtype(np.int64))
        self._progress = folder / "progress.json"
        self.intact: list[Chunk] = []

    @property
    def done(self) -> int:
        """How many images of the dataset are in it, intact, by the last ``verify``."""
        return self.intact[-1].images if self.intact else 0

    @property
    def looks_complete(self) -> bool:
        """Whether it says that all is there; ``verify`` reads it."""
        chunks = self._recorded()
        return bool(chunks) and chunks[-1].images == self.images

    @property
    def damaged(self) -> bool:
        """Whether the last ``verify`` found less than was recorded."""
        chunks = self._recorded()
        return len(chunks) > len(self.intact) if chunks else self._progress.exists()

    def verify(self) -> bool:
        """Read everything and compare it with the checksums; returns whether all is there."""
        self.intact = []
        start = 0
        for chunk in self._recorded():
            sums = (self._features.checksum(start, chunk.rows), self._labels.checksum(start, chunk.rows))
            if chunk.images < self.done or sums != (chunk.features, chunk.labels):
                break
            self.intact.append(chunk)
            start = chunk.rows
        sound = self._features.has_header(start) and self._labels.has_header(start)
        return sound and self.done == self.images

    def extend(self, batches: Iterable[FeatureBatch]) -> None:
        """Append the features of the images from ``done`` on, in order.

        Args:
            batches: of all these images.

        Raises:
            RunError: if they cannot be written.
            WeightsError: if they are not finite.
        """
        rows = self.intact[-1].rows if self.intact else 0
        with self._features.appending(rows) as features, self._labels.appending(rows) as labels:
            images, sums, recorded = self.done, [0, 0], time.monotonic()
            for batch in batches:
                values = self._features.convert(batch.features.numpy())
                if not np.isfinite(values).all():
                    raise WeightsError(
                        "the encoder's features are not finite",
                        "Take other weights, or --precision 32 if these were computed in bf16.",
                    )
                index = images + np.flatnonzero(batch.kept.numpy())
                table = np.stack([index, batch.labels.numpy()], axis=1).astype(np.int64)
                sums = [features.write(values, sums[0]), labels.write(table, sums[1])]
                images, rows = images + len(batch.kept), rows + len(values)
                if images == self.images or time.monotonic() - recorded > RECORD_SECONDS:
                    features.sync(rows)
                    labels.sync(rows)
                    self.intact.append(Chunk(images, rows, *sums))
                    write_text(self._progress, json.dumps({"chunks": self.intact}))
                    sums, recorded = [0, 0], time.monotonic()

    def read(self) -> StoredFeatures:
        """Map what is there, intact, by the last ``verify`` or ``extend``."""
        rows = self.intact[-1].rows if self.intact else 0
        indices, labels = np.array(self._labels.map(rows)).T
        return StoredFeatures(self._features.map(rows), np.ascontiguousarray(indices), np.ascontiguousarray(labels))

    def _recorded(self) -> list[Chunk]:
        try:
            chunks = json.loads(self._progress.read_text(encoding="utf-8"))["chunks"]
            return [Chunk(*(int(value) for value in chunk)) for chunk in chunks]
        except (OSError, ValueError, KeyError, TypeError):
            return []


class _Array:
    """A file of rows in numpy's format, which grows at its end."""

    def __init__(self, path: Path, width: int, dtype: np.dtype[Any]) -> None:
        self.path = path
        self.width = width
        self.dtype = dtype
        self.row_bytes = width * dtype.itemsize

    def header(self, rows: int) -> bytes:
        """Numpy leaves space for growth, so that headers of all numbers of rows are of the same length."""
        stream = BytesIO()
        description = {"descr": self.dtype.str, "fortran_order": False, "shape": (rows, self.width)}
        np.lib.format.write_array_header_1_0(stream, description)
        return stream.getvalue()

    def has_header(self, rows: int) -> bool:
        expected = self.header(rows)
        try:
            with self.path.open("rb") as stream:
                return stream.read(len(expected)) == expected
        except OSError:
            return False

    def checksum(self, start: int, stop: int) -> int | None:
        """Of the rows of that range; None if they are not all there."""
        left, found = (stop - start) * self.row_bytes, 0
        if left < 0:
            return None
        try:
            with self.path.open("rb") as stream:
                stream.seek(len(self.header(start)) + start * self.row_bytes)
                while left and (block := stream.read(min(left, _BLOCK))):
                    found, left = zlib.crc32(block, found), left - len(block)
        except OSError:
            return None
        return None if left else found

    def map(self, rows: int) -> NDArray[Any]:
        """The first rows; nobody writes, but copy on write lets torch take the array without a warning."""
        if rows == 0:
            return np.empty((0, self.width), self.dtype)
        offset = len(self.header(rows))
        return np.memmap(self.path, self.dtype, mode="c", offset=offset, shape=(rows, self.width))

    def convert(self, values: NDArray[np.float32]) -> NDArray[Any]:
        with np.errstate(over="ignore"):  # infinite values are refused by name
            return np.ascontiguousarray(values, dtype=self.dtype)

    def appending(self, rows: int) -> _Appending:
        return _Appending(self, rows)


class _Appending:
    """The file open for writing behind its first rows; what came after them is cut off."""

    def __init__(self, array: _Array, rows: int) -> None:
        self.array = array
        self._rows = rows
        self._stream: IO[bytes]

    def __enter__(self) -> _Appending:
        header = self.array.header(self._rows)
        end = len(header) + self._rows * self.array.row_bytes
        try:
            self.array.path.touch()
            self._stream = self.array.path.open("r+b")
            self._stream.write(header)
            self._stream.truncate(end)
            self._stream.seek(end)
        except OSError as problem:
            raise write_failure(self.array.path, problem, resumable=False) from problem
        return self

    def __exit__(self, *problem: object) -> None:
        try:
            self._stream.close()
        except OSError as error:
            raise write_failure(self.array.path, error, resumable=False) from error

    def write(self, values: NDArray[Any], checksum: int) -> int:
        """Append rows; returns the checksum gone on with."""
        content = values.tobytes()
        try:
            self._stream.write(content)
        except OSError as problem:
            raise write_failure(self.array.path, problem, resumable=False) from problem
        return zlib.crc32(content, checksum)

    def sync(self, rows: int) -> None:
        """Bring all rows to the disk, and their number into the header."""
        try:
            end = self._stream.tell()
            self._stream.seek(0)
            self._stream.write(self.array.header(rows))
            self._stream.seek(end)
            self._stream.flush()
            os.fsync(self._stream.fileno())
        except OSError as problem:
            raise write_failure(self.array.path, problem, resumable=False) from problem
