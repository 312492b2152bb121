"""metrics.csv: one row a logged step; an interrupted and resumed file equals an uninterrupted one."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from geoexplora.errors import RunError
from geoexplora.weights.atomic import write_failure, write_text

TIMING_COLUMNS = ("images_per_second",)
"""Columns that measure the machine: they stand last and differ between runs; everything else repeats exactly."""

Row = dict[str, float | int | str]


class Metrics:
    """The metrics of a run: a csv file with a column ``step``, growing by a row for each logged step.

    Floats are written so that reading gives the same number back. The header grows when a row brings a new column,
    in order of first appearance with the timing columns last. Values for the last step again join its row.
    Every row is handed to the operating system at once, so a killed process loses none.

    Args:
        path: the file. An existing one is continued; a last line that was cut off by a full disk or a power cut is
            dropped when it is first used.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._columns: list[str] = []
        self._last: Row = {}
        self._is_read = False

    def _read_existing(self) -> None:
        # Not before the first use: of several processes only one may touch the file.
        if not self._is_read and self.path.exists():
            rows, whole = _read(self.path)
            if not whole:
                write_text(self.path, _csv(_columns_of(rows), rows))
            self._adopt(rows)
        self._is_read = True

    @property
    def last_step(self) -> int | None:
        """The step of the last row; None if there is none.

        Raises:
            RunError: if an existing file cannot be read.
        """
        self._read_existing()
        return int(self._last["step"]) if self._last else None

    def append(self, row: Mapping[str, float | int | str]) -> None:
        """Add a row, or more columns to the last row if its step is the same.

        Args:
            row: values by column, with ``step``. A value may be NaN.

        Raises:
            ValueError: if ``step`` is missing or smaller than the last one.
            RunError: if the file cannot be written; it then still holds every earlier row.
        """
        if "step" not in row:
            raise ValueError("a row of metrics needs a step")
        self._read_existing()
        row = {name: _plain(value) for name, value in row.items()}
        same = self.last_step == int(row["step"])
        if not same and self.last_step is not None and int(row["step"]) < self.last_step:
            raise ValueError(f"step {row['step']} comes after step {self.last_step}: call truncate_after first")
        merged = {**self._last, **row} if same else row
        columns = _ordered([*self._columns, *row])
        if same:
            self._write([*read_metrics(self.path)[:-1], merged], columns)
        elif columns != self._columns:
            self._write([*(read_metrics(self.path) if self.path.exists() else []), merged], columns)
        else:
            self._append_line(merged)
        self._columns, self._last = columns, merged

    def truncate_after(self, step: int) -> None:
        """Forget what was logged after a step, because training goes on from there.

        Args:
            step: the last step to keep; below the first (-1), all is forgotten.

        Raises:
            RunError: if the file cannot be written.
        """
        if not self.path.exists():
            return
        rows = [row for row in read_metrics(self.path) if int(row["step"]) <= step]
        self._write(rows, _columns_of(rows))
        self._adopt(rows)

    def sync(self) -> None:
        """Make sure that every row is on the disk, as before a checkpoint that continues after them.

        Raises:
            RunError: if the disk refuses.
        """
        if not self.path.exists():
            return
        try:
            with self.path.open("rb") as file:
                os.fsync(file.fileno())
        except OSError as problem:
            raise write_failure(self.path, problem) from problem

    def _adopt(self, rows: list[Row]) -> None:
        self._is_read = True
        self._columns = _columns_of(rows)
        self._last = dict(rows[-1]) if rows else {}

    def _write(self, rows: list[Row], columns: list[str]) -> None:
        write_text(self.path, _csv(columns, rows))

    def _append_line(self, row: Row) -> None:
        rest = memoryview(_csv(self._columns, [row]).split("\n", 1)[1].encode())
        try:
            with self.path.open("ab", buffering=0) as file:  # a buffer would be written again when the file is closed
                before = file.tell()
                try:
                    while rest:
                        rest = rest[file.write(rest) :]
                except OSError:
                    os.truncate(self.path, before)  # a full disk may have taken part of the line
                    raise
        except OSError as problem:
            raise write_failure(self.path, problem) from problem


def read_metrics(path: Path) -> list[Row]:
    """Read metrics.csv.

    Args:
        path: the file.

    Returns:
        A dictionary for each row; columns without a value in a row are left out. Whole numbers are int, other numbers
        float, anything else str.

    Raises:
        RunError: if it is missing or not a metrics file.
    """
    return _read(path)[0]


def _read(path: Path) -> tuple[list[Row], bool]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise RunError(f"cannot read {path}: {problem}", "Name the metrics.csv of a run.") from problem
    whole = text == "" or text.endswith("\n")
    lines = text if whole else text[: text.rfind("\n") + 1]
    reader = csv.DictReader(io.StringIO(lines), restkey=None)
    if lines and "step" not in (reader.fieldnames or ()):
        raise RunError(f"{path} has no column step", "Name the metrics.csv of a run.")
    try:
        rows = [{str(name): _number(value) for name, value in row.items() if value} for row in reader]
        for row in rows:
            int(row["step"])
    except (KeyError, ValueError, TypeError, csv.Error) as problem:
        raise RunError(f"{path} has a row without a valid step", "Repair or remove the file.") from problem
    return rows, whole


def _plain(value: Any) -> float | int | str:
    """A number of numpy's or torch's as Python's own."""
    return value if isinstance(value, str) else value.item() if hasattr(value, "item") else value


def _number(value: str) -> float | int | str:
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value


def _columns_of(rows: Iterable[Row]) -> list[str]:
    return _ordered([name for row in rows for name in row])


def _ordered(names: Iterable[str]) -> list[str]:
    unique = list(dict.fromkeys(["step", *names]))
    timing = [name for name in TIMING_COLUMNS if name in unique]
    return [name for name in unique if name not in TIMING_COLUMNS] + timing


def _csv(columns: list[str], rows: Iterable[Row]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
