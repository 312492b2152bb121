"""The confusion matrix of a classifier, as a picture.

Shapes: K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from geoexplora.runs.colours import Array
from geoexplora.runs.figures import save_figure

_ANNOTATED = 12
"""Classes up to which the shares are written into the cells."""
_ABSENT = "0.88"
_ABSENT_NAME = "0.6"


def plot_confusion(
    target: Path, matrix: npt.ArrayLike, classes: Sequence[str], title: str, *, counted: str = "samples"
) -> None:
    """Draw which share of each class was taken for which.

    Rows are divided by their sum; those of classes that do not occur are grey.

    Args:
        target: the PNG to write, whole or not at all.
        matrix: (K, K), counts; a row for each true class, a column for each predicted one.
        classes: names of the K classes.
        title: above the picture.
        counted: what is counted, in the plural.

    Raises:
        ValueError: if the shape is not that of the classes, or a count is negative or not finite.
        RunError: if the picture cannot be written.
    """
    counts: Array = np.asarray(matrix, dtype=np.float64)
    count = len(classes)
    if counts.shape != (count, count) or not count:
        raise ValueError(f"a confusion matrix of shape {counts.shape} for {count} classes")
    if not np.isfinite(counts).all() or (counts < 0).any():
        raise ValueError("a confusion matrix holds a count that is negative or not finite")
    samples = counts.sum(1)
    absent = samples == 0
    shares = np.where(absent[:, None], np.nan, counts / np.where(absent, 1, samples)[:, None])
    cell = 0.6 if count <= _ANNOTATED else 0.22
    names = 0.08 * max(map(len, classes))  # inches
    side = max(cell * count, 2.2)
    size = 8 if count <= _ANNOTATED else 7
    figure = Figure(figsize=(side + names + 2.0, side + names + 1.0), layout="constrained")
    axis = figure.add_subplot()
    drawn = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    axis.set_facecolor(_ABSENT)
    for row, column in zip(*np.nonzero(counts), strict=True) if count <= _ANNOTATED else ():
        share = shares[row, column]
        colour = "white" if share > 0.55 else "black"
        axis.text(column, row, _percent(share), ha="center", va="center", fontsize=8, color=colour)
    rows = [f"{name} ({int(n)})" for name, n in zip(classes, samples, strict=True)]
    axis.set_xticks(range(count), classes, rotation=90, fontsize=size)
    axis.set_yticks(range(count), rows, fontsize=size)
    for label, missing in zip(axis.get_yticklabels(), absent, strict=True):
        label.set_color(_ABSENT_NAME if missing else "black")
    axis.set_xticks(np.arange(count + 1) - 0.5, minor=True)
    axis.set_yticks(np.arange(count + 1) - 0.5, minor=True)
    axis.grid(which="minor", color="0.85", lw=0.6)
    axis.tick_params(which="both", length=0)
    axis.spines[:].set_color("0.7")
    axis.set_xlabel("predicted class")
    axis.set_ylabel(f"true class ({counted})")
    figure.suptitle(title, fontsize=10)
    bar = figure.colorbar(drawn, ax=axis, fraction=0.5 / side, pad=0.02, format=PercentFormatter(1, 0, " %"))
    bar.set_label("share of the true class", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    save_figure(figure, target)


def _percent(share: float) -> str:
    """In per cent; small ones are not rounded to nothing."""
    return "<1" if share < 0.01 else f"{100 * share:.0f}"
