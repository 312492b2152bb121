"""Pictures of a run: what a masked autoencoder reconstructs, and what an encoder sees.

Shapes: N images, C bands, H W size, h w patches along it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from torch import Tensor

from geoexplora.bands import Sensor
from geoexplora.runs.figures import save_figure

Array = npt.NDArray[np.float64]

_HIDDEN = 0.5
_STRETCH = (2.0, 98.0)


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
    at, title = _shown(bands, sensor, shown)
    inputs, seen, rebuilt = (_last(x[:, at]) for x in (images, masked, reconstructions))
    limits = [_limits(picture) for picture in inputs]
    columns = {
        label: [_stretch(picture, *limit) for picture, limit in zip(pictures, limits, strict=True)]
        for label, pictures in {"input": inputs, "masked": seen, "reconstruction": rebuilt}.items()
    }
    _save_grid(target, columns, title)


def plot_features(
    target: Path,
    images: Tensor,
    before: Tensor | None,
    after: Tensor,
    bands: Sequence[str],
    sensor: Sensor,
    *,
    shown: Sequence[str] | None = None,
) -> None:
    """Draw input and features of its patches before and after training, side by side, a row for each image.

    Features as in Oquab et al. 2024 (DINOv2, figure 1): their first three principal components as red, green and blue,
    a square for each patch.

    Args:
        target: the PNG to write, whole or not at all.
        images: (N, C, H, W), in the sensor's units (not normalized).
        before: (N, h, w, 3), colours 0-1 of the patches before training; left out if ``None``.
        after: (N, h, w, 3), colours 0-1 of the patches now.
        bands: names of the C bands.
        sensor: their sensor.
        shown: three bands to draw as red, green and blue; by default as in ``plot_reconstruction``.

    Raises:
        ValueError: if the shapes differ.
        ConfigError: if a band to be shown is unknown to the sensor.
        RunError: if the picture cannot be written.
    """
    features = {"features": after} if before is None else {"features before": before, "features after": after}
    wrong = any(len(x) != len(images) or x.ndim != 4 or x.shape[3] != 3 for x in features.values())
    if wrong or images.shape[1] != len(bands):
        shapes = [tuple(x.shape) for x in features.values()]
        raise ValueError(f"shapes differ: {images.shape}, {shapes}, {len(bands)} bands")
    at, title = _shown(bands, sensor, shown)
    inputs = [_stretch(picture, *_limits(picture)) for picture in _last(images[:, at])]
    columns = {"input": inputs} | {label: list(_array(x)) for label, x in features.items()}
    _save_grid(target, columns, f"{title}\nfeatures: first three principal components as red, green, blue")


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


def _shown(bands: Sequence[str], sensor: Sensor, shown: Sequence[str] | None) -> tuple[list[int], str]:
    """Positions of the bands to draw as red, green and blue, and the title that says so."""
    colours, title = colour_bands(bands, sensor) if shown is None else (sensor.select(shown), ", ".join(shown))
    return [list(bands).index(name) for name in colours], f"{sensor.name}, {title}"


def _array(x: Tensor) -> Array:
    return x.detach().cpu().double().numpy()


def _last(x: Tensor) -> Array:
    """(N, 3, H, W) to (N, H, W, 3)."""
    return _array(x.permute(0, 2, 3, 1))


def _limits(picture: Array) -> tuple[Array, Array]:
    low, high = np.nanpercentile(picture, _STRETCH, axis=(0, 1))
    return low, np.where(high > low, high, low + 1)


def _stretch(picture: Array, low: Array, high: Array) -> Array:
    scaled = np.clip((picture - low) / (high - low), 0, 1)
    return np.where(np.isnan(scaled).any(axis=-1, keepdims=True), _HIDDEN, scaled)


def _save_grid(target: Path, columns: dict[str, list[Array]], title: str) -> None:
    """Draw pictures (any size, 3) of 0-1, a titled column for each kind and a row for each image, of one size."""
    count = len(next(iter(columns.values())))
    height, width, _ = next(iter(columns.values()))[0].shape
    lines = title.count("\n") + 1
    figure = Figure(figsize=(2.1 * len(columns), 2.05 * count + 0.25 + 0.2 * lines), layout="constrained")
    grid: Any = figure.subplots(count, len(columns), squeeze=False)
    for column, (label, pictures) in enumerate(columns.items()):
        grid[0, column].set_title(label, fontsize=10)
        for axis, picture in zip(grid[:, column], pictures, strict=True):
            axis.imshow(picture, interpolation="nearest", extent=(0, width, height, 0))
            axis.set_axis_off()
    figure.suptitle(title, fontsize=9, color="0.35")
    save_figure(figure, target)
