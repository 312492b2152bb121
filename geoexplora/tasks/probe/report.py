"""What a probe says of its results: a table, ``probe.json``, accuracies by class, a confusion picture."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np

from geoexplora.runs.confusion import plot_confusion
from geoexplora.tasks.probe.evaluation import Estimate, Result
from geoexplora.tasks.probe.heads import Setting
from geoexplora.weights.atomic import write_text


def format_results(results: Sequence[Result], select: str) -> str:
    """An aligned table, a line for each classifier and number of labels, and a line on how to read it."""
    head = ("labels", "classifier", "accuracy", "balanced accuracy", "setting")
    rows = [head, *(_row(result) for result in results)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, _note(results, select)])


def _row(result: Result) -> tuple[str, str, str, str, str]:
    labels = "all" if result.labels is None else f"{result.labels} a class"
    setting = result.usual_setting
    if setting is None:
        said = ""
    else:
        others = len(set(result.chosen)) - 1
        said = f"{setting}" + (f" ({others} other{'s' if others > 1 else ''} chosen, too)" if others else "")
    return labels, result.classifier, _show(result.accuracy), _show(result.balanced_accuracy), said


def _show(estimate: Estimate) -> str:
    interval = estimate.interval
    return f"{estimate.mean:.4f}" + ("" if interval is None else f" ± {interval:.4f}")


def _note(results: Sequence[Result], select: str) -> str:
    first = results[0].confusion
    samples = int(results[0].confusions[0].sum())
    parts = [f"{samples} test samples, {int((first.sum(1) > 0).sum())} classes"]
    seeds = max(len(result.confusions) for result in results)
    if seeds > 1:
        parts.append(f"± is the 95 % confidence interval of the mean over {seeds} seeds")
    if any(result.chosen for result in results):
        parts.append(f"setting chosen on {'held-out training' if select == 'held-out' else 'the test'} samples")
    return "; ".join(parts)


def to_record(results: Sequence[Result], classes: Sequence[str]) -> dict[str, Any]:
    """The results in plain JSON types."""
    return {
        "classes": list(classes),
        "results": [_result(result, classes) for result in results],
        "linear_settings": [row for result in results if result.tables for row in _settings(result)],
    }


def _result(result: Result, classes: Sequence[str]) -> dict[str, Any]:
    shares = (None if math.isnan(share) else share for share in result.class_accuracies.tolist())
    return {
        "classifier": result.classifier,
        "labels": result.labels,
        "accuracy": _estimate(result.accuracy),
        "balanced_accuracy": _estimate(result.balanced_accuracy),
        "samples": int(result.confusions[0].sum()),
        "chosen": [setting._asdict() for setting in result.chosen],
        "class_accuracies": dict(zip(classes, shares, strict=True)),
        "confusion": result.confusion.tolist(),
    }


def _estimate(estimate: Estimate) -> dict[str, Any]:
    return {"mean": estimate.mean, "interval": estimate.interval, "values": list(estimate.values)}


def _settings(result: Result) -> list[dict[str, Any]]:
    """Accuracy of every setting where the choice was made, the mean over seeds; None if it diverged."""

    def mean(setting: Setting) -> float | None:
        values = [table[setting] for table in result.tables]
        known = [value for value in values if value is not None]
        return float(np.mean(known)) if len(known) == len(values) else None

    return [{"labels": result.labels, **setting._asdict(), "accuracy": mean(setting)} for setting in result.tables[0]]


def write_report(folder: Path, results: Sequence[Result], classes: Sequence[str], settings: dict[str, Any]) -> None:
    """Write ``probe.json``, ``per_class.csv`` and ``confusion.png``.

    The picture shows the linear probe where there is one, with the most labels.

    Args:
        folder: receives them.
        results: of all classifiers.
        classes: names of the classes.
        settings: for ``probe.json``, in plain JSON types.

    Raises:
        RunError: if they cannot be written.
    """
    record = to_record(results, classes) | {"settings": settings}
    write_text(folder / "probe.json", json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    write_text(folder / "per_class.csv", _by_class(results, classes))
    largest = max(results, key=_amount).labels
    most = [result for result in results if result.labels == largest]
    shown = next((result for result in most if result.classifier == "linear"), most[-1])
    few = "" if shown.labels is None else f", {shown.labels} labels a class"
    title = f"{shown.classifier}{few}: accuracy {shown.accuracy.mean:.4f}"
    plot_confusion(folder / "confusion.png", shown.confusion, classes, title)


def _amount(result: Result) -> float:
    return math.inf if result.labels is None else result.labels


def _by_class(results: Sequence[Result], classes: Sequence[str]) -> str:
    stream = StringIO()
    table = csv.writer(stream, lineterminator="\n")
    names = [result.classifier + ("" if result.labels is None else f" {result.labels} labels") for result in results]
    table.writerow(["class", "test samples", *names])
    samples = results[0].confusions[0].sum(1).tolist()
    shares = [result.class_accuracies.tolist() for result in results]
    for row, name in enumerate(classes):
        cells = ["" if math.isnan(one[row]) else f"{one[row]:.4f}" for one in shares]
        table.writerow([name, samples[row], *cells])
    return stream.getvalue()
