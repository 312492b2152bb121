"""Curves of a run over its optimizer steps: the loss and the probe, and the health of the training."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import batched
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from geoexplora.runs.figures import save_figure
from geoexplora.runs.metrics import Row, read_metrics

Array = npt.NDArray[np.float64]

_SMOOTH_FROM = 60
_LOG_FROM = 2.0
"""Decades that values must span to be drawn on a logarithmic scale."""
_COLOURS = ("#1f6fb4", "#d1622b", "#3a8f4d", "#7d55a3")
_WARNING = "#c02020"


@dataclass(frozen=True)
class _Panel:
    """Columns of metrics.csv that are drawn together.

    Attributes:
        title: what they are, with the unit.
        columns: those that are there are drawn.
        first: draw the first value dashed, to compare with.
        logarithmic: use a logarithmic scale where the values span many decades.
        noisy: draw a running mean of many values.
    """

    title: str
    columns: tuple[str, ...]
    first: bool = False
    logarithmic: bool = False
    noisy: bool = True


_HEALTH = (
    _Panel("loss by part", ("dino_loss", "ibot_loss", "koleo_loss")),
    _Panel("teacher entropy (nats)", ("teacher_entropy", "teacher_mean_entropy")),
    _Panel("KL divergence of student from teacher (nats)", ("teacher_student_kl",)),
    _Panel("spread of features (0: collapsed, 1: even)", ("feature_std",), first=True),
    _Panel("effective rank of features", ("feature_rank",), first=True),
    _Panel("gradient norm", ("grad_norm",), logarithmic=True),
)
_SCHEDULES = (
    _Panel("learning rate", ("lr",), noisy=False),
    _Panel("weight decay", ("weight_decay",), noisy=False),
    _Panel("teacher momentum", ("teacher_momentum",), noisy=False),
    _Panel("teacher temperature", ("teacher_temperature",), noisy=False),
)


def plot_loss(metrics: Path, target: Path, *, loss: str = "loss", probe: str = "knn") -> bool:
    """Draw the loss against the optimizer step, and below it the probe if the run has one.

    Args:
        metrics: the run's metrics.csv.
        target: the PNG to write, whole or not at all.
        loss: column of the loss.
        probe: columns whose name begins so are drawn below; of probes the first value is a dashed line as well.

    Returns:
        Whether there was a loss to draw.

    Raises:
        RunError: if the metrics cannot be read or the picture cannot be written.
    """
    rows = read_metrics(metrics)
    if not any(loss in row for row in rows):
        return False
    probes = list(dict.fromkeys(name for row in rows for name in row if name.startswith(probe)))
    heights = [2, 1] if probes else [1]
    figure = Figure(figsize=(7, 5.2 if probes else 3.6), layout="constrained")
    axes: Any = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    steps, values = _series(rows, loss)
    window = _window(values)
    _draw_curve(axes[0], steps, values, _COLOURS[0], f"mean of {window} points" if window else None, window)
    _mark_not_finite(axes[0], [(steps, values)])
    axes[0].set_ylabel(loss)
    if axes[0].get_legend_handles_labels()[1]:
        axes[0].legend(frameon=False)
    if probes:
        _draw_probes(axes[1], rows, probes)
    axes[-1].set_xlabel("optimizer step")
    for axis in axes:
        _dress(axis)
    save_figure(figure, target)
    return True


def plot_health(metrics: Path, target: Path) -> bool:
    """Draw what tells a sound training from a collapsing one, and its schedules, against the optimizer step.

    A panel for each of these that the run logged: losses by part, entropy of the teacher,
    Kullback-Leibler divergence of the student from it, standard deviation and effective rank of the features, gradient
    norm; and small ones for learning rate, weight decay, teacher momentum and temperature. Values that are not finite
    are marked by crosses below.

    Args:
        metrics: the run's metrics.csv.
        target: the PNG to write, whole or not at all.

    Returns:
        Whether there was anything to draw.

    Raises:
        RunError: if the metrics cannot be read or the picture cannot be written.
    """
    rows = read_metrics(metrics)
    logged = {name for row in rows for name in row}
    curves = list(batched((panel for panel in _HEALTH if logged.intersection(panel.columns)), 3))
    schedules = list(batched((panel for panel in _SCHEDULES if logged.intersection(panel.columns)), 4))
    lines = [*curves, *schedules]
    if not lines:
        return False
    heights = [2.5] * len(curves) + [1.7] * len(schedules)
    figure = Figure(figsize=(11, sum(heights) + 0.4), layout="constrained")
    grid = figure.add_gridspec(len(lines), 12, height_ratios=heights)
    first: Axes | None = None
    for row, line in enumerate(lines):
        width = 12 // len(line)
        for column, panel in enumerate(line):
            axis = figure.add_subplot(grid[row, column * width : (column + 1) * width], sharex=first)
            first = first or axis
            _draw_panel(axis, panel, rows)
    figure.supxlabel("optimizer step (of many values, the running mean is drawn bold)", fontsize=9)
    save_figure(figure, target)
    return True


def _series(rows: Sequence[Row], name: str) -> tuple[Array, Array]:
    points = [(float(row["step"]), float(row[name])) for row in rows if name in row]
    steps, values = np.array(points, dtype=np.float64).reshape(-1, 2).T
    return steps, values


def _window(values: Array) -> int:
    """Length of the running mean that is drawn of them; 0 for few values, which are drawn as they are."""
    count = int(np.isfinite(values).sum())
    return max(5, count // 30) if count >= _SMOOTH_FROM else 0


def _draw_curve(axis: Axes, steps: Array, values: Array, colour: str, label: str | None, window: int) -> None:
    finite = np.isfinite(values)
    steps, values = steps[finite], values[finite]
    if not window:
        axis.plot(steps, values, color=colour, lw=1.5, marker="o" if len(values) == 1 else None, label=label)
        return
    axis.plot(steps, values, color=colour, lw=0.8, alpha=0.4)
    mean = np.convolve(values, np.full(window, 1 / window), mode="valid")
    start = (window - 1) // 2
    axis.plot(steps[start : start + len(mean)], mean, color=colour, lw=1.8, label=label)


def _mark_not_finite(axis: Axes, series: Iterable[tuple[Array, Array]]) -> None:
    steps = np.concatenate([steps[~np.isfinite(values)] for steps, values in series])
    if len(steps):
        foot = axis.get_xaxis_transform()  # steps along, share of the panel's height up
        axis.plot(
            steps, np.zeros_like(steps), "x", ms=4, color=_WARNING, label="not finite", transform=foot, clip_on=False
        )


def _draw_panel(axis: Axes, panel: _Panel, rows: Sequence[Row]) -> None:
    series = {name: _series(rows, name) for name in panel.columns}
    for (name, (steps, values)), colour in zip(series.items(), _COLOURS, strict=False):
        if not len(values):
            continue
        _draw_curve(axis, steps, values, colour, name, _window(values) if panel.noisy else 0)
        if panel.first:
            _draw_first(axis, values, colour, "first value")
        if panel.logarithmic and _decades(values) > _LOG_FROM:
            axis.set_yscale("log")
    _mark_not_finite(axis, series.values())
    if len(axis.get_legend_handles_labels()[1]) > 1:
        axis.legend(frameon=False, fontsize=8)
    axis.set_title(panel.title, fontsize=9, loc="left")
    axis.tick_params(labelsize=8)
    _dress(axis)


def _decades(values: Array) -> float:
    positive = values[np.isfinite(values) & (values > 0)]
    return float(np.log10(positive.max() / positive.min())) if len(positive) else 0.0


def _draw_first(axis: Axes, values: Array, colour: str, label: str | None = None) -> None:
    for value in values[np.isfinite(values)][:1]:
        axis.axhline(value, color=colour, ls="--", lw=0.9, alpha=0.6, label=label)


def _draw_probes(axis: Axes, rows: Sequence[Row], names: Sequence[str]) -> None:
    for name, colour in zip(names, _COLOURS * len(names), strict=False):
        steps, values = _series(rows, name)
        axis.plot(steps, values, color=colour, marker="o", ms=3.5, lw=1.3, label=name)
        if not name.startswith("val_"):  # a probe is first taken before training, a validation is not
            _draw_first(axis, values, colour)
    axis.set_ylabel("validation" if names[0].startswith("val_") else "probe")
    axis.legend(frameon=False, fontsize=8)


def _dress(axis: Axes) -> None:
    axis.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10], integer=True, min_n_ticks=1))
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
