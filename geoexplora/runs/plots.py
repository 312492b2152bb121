"""Pictures of a run: its loss, and what a masked autoencoder reconstructs.

Shapes: N images, C bands, H W size.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from geoexplora.bands import Sensor
from geoexplora.runs.metrics import Row, read_metrics
from geoexplora.weights.atomic import atomic_path

Array = npt.NDArray[np.float64]

_HIDDEN = 0.5
_SMOOTH_FROM = 60
_STRETCH = (2.0, 98.0)
_COLOURS = ("#1f6fb4", "#d1622b", "#3a8f4d", "#7d55a3")


def plot_loss(metrics: Path, target: Path, *, loss: str = "loss", probe: str = "knn") -> bool:
    """Draw the loss against the optimizer step, and below it the probe if the run has one.

    Args:
        metrics: the run's metrics.csv.
        target: the PNG to write, whole or not at all.
        loss: column of the loss.
        probe: columns whose name begins so are drawn below, each with its first value as a dashed line.

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
    _draw_loss(axes[0], *_series(rows, loss), loss)
    if probes:
        _draw_probes(axes[1], rows, probes)
    axes[-1].set_xlabel("optimizer step")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    _save(figure, target)
    return True


def plot_reconstruction(
    target: Path,
    images: Tensor,
    masked: Tensor,
    reconstructions: Tensor,
    bands: Sequence[str],
    sensor: Sensor,
    *,
    shown: Sequence[str] | None = None,
) -> None:
    """Draw input, what the encoder saw of it, and the reconstruction, side by side, a row for each image.

    The stretch to the visible range is that of the input (2nd to 98th percentile of each band), for all three.

    Args:
        target: the PNG to write, whole or not at all.
        images: (N, C, H, W), in the sensor's units (not normalized).
        masked: (N, C, H, W), the same with NaN where hidden; drawn grey.
        reconstructions: (N, C, H, W), in the sensor's units.
        bands: names of the C bands.
        sensor: their sensor.
        shown: three bands to draw as red, green and blue; by default true colour where the bands have it, else the
            longest, middle and shortest wavelength.

    Raises:
        ValueError: if the shapes differ.
        ConfigError: if a band to be shown is unknown to the sensor.
        RunError: if the picture cannot be written.
    """
    if not images.shape == masked.shape == reconstructions.shape or images.shape[1] != len(bands):
        raise ValueError(f"shapes differ: {images.shape}, {masked.shape}, {reconstructions.shape}, {len(bands)} bands")
    colours, title = colour_bands(bands, sensor) if shown is None else (sensor.select(shown), ", ".join(shown))
    at = [list(bands).index(name) for name in colours]
    pictures = [
        x.detach().cpu().double().numpy()[:, at].transpose(0, 2, 3, 1) for x in (images, masked, reconstructions)
    ]
    count = len(images)
    figure = Figure(figsize=(6.3, 2.05 * count + 0.45), layout="constrained")
    grid: Any = figure.subplots(count, 3, squeeze=False)
    for row in range(count):
        low, high = _limits(pictures[0][row])
        for column, (picture, label) in enumerate(zip(pictures, ("input", "masked", "reconstruction"), strict=True)):
            axis = grid[row, column]
            axis.imshow(_stretch(picture[row], low, high), interpolation="nearest")
            axis.set_axis_off()
            if row == 0:
                axis.set_title(label, fontsize=10)
    figure.suptitle(f"{sensor.name}, {title}", fontsize=9, color="0.35")
    _save(figure, target)


def colour_bands(bands: Sequence[str], sensor: Sensor) -> tuple[tuple[str, str, str], str]:
    """Which bands to draw as red, green and blue, and what to call that.

    Args:
        bands: names of the bands at hand.
        sensor: their sensor.
    """
    common = {sensor.band(name).common_name: name for name in bands}
    if {"red", "green", "blue"} <= common.keys():
        return (common["red"], common["green"], common["blue"]), "true colour"
    by_wavelength = sorted(bands, key=lambda name: sensor.band(name).wavelength, reverse=True)
    chosen = (by_wavelength[0], by_wavelength[len(by_wavelength) // 2], by_wavelength[-1])
    return chosen, f"false colour {', '.join(chosen)}"


def _series(rows: Sequence[Row], name: str) -> tuple[Array, Array]:
    points = [(float(row["step"]), float(row[name])) for row in rows if name in row]
    steps, values = np.array(points, dtype=np.float64).reshape(-1, 2).T
    return steps, values


def _draw_loss(axis: Axes, steps: Array, values: Array, label: str) -> None:
    smooth = len(values) >= _SMOOTH_FROM
    marker = "o" if len(values) == 1 else None
    axis.plot(steps, values, color=_COLOURS[0], lw=0.8 if smooth else 1.5, alpha=0.4 if smooth else 1, marker=marker)
    if smooth:
        window = max(5, len(values) // 30)
        mean = np.convolve(values, np.full(window, 1 / window), mode="valid")
        start = (window - 1) // 2
        axis.plot(steps[start : start + len(mean)], mean, color=_COLOURS[0], lw=1.8, label=f"mean of {window} points")
        axis.legend(frameon=False)
    axis.set_ylabel(label)


def _draw_probes(axis: Axes, rows: Sequence[Row], names: Sequence[str]) -> None:
    for name, colour in zip(names, _COLOURS * len(names), strict=False):
        steps, values = _series(rows, name)
        axis.plot(steps, values, color=colour, marker="o", ms=3.5, lw=1.3, label=name)
        axis.axhline(values[0], color=colour, ls="--", lw=0.9, alpha=0.6)
    axis.set_ylabel("probe")
    axis.legend(frameon=False, fontsize=8)


def _limits(picture: Array) -> tuple[Array, Array]:
    low, high = np.nanpercentile(picture, _STRETCH, axis=(0, 1))
    return low, np.where(high > low, high, low + 1)


def _stretch(picture: Array, low: Array, high: Array) -> Array:
    scaled = np.clip((picture - low) / (high - low), 0, 1)
    return np.where(np.isnan(scaled).any(axis=-1, keepdims=True), _HIDDEN, scaled)


def _save(figure: Figure, target: Path) -> None:
    with atomic_path(target) as temporary:
        figure.savefig(temporary, format="png", dpi=130, metadata={"Software": None})
