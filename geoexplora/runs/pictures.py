"""Pictures of a run: what a masked autoencoder reconstructs, and what an encoder sees.

Shapes: N images, C bands, H W size, h w patches along it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor

from geoexplora.bands import Sensor
from geoexplora.runs.colours import Array, as_array, channels_last, colour_limits, shown_bands, stretch
from geoexplora.runs.figures import save_figure


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

    The stretch to the visible range is that of the input (``colour_limits``), for all three.

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
    at, title = shown_bands(bands, sensor, shown)
    limits = colour_limits(channels_last(images[:, at]))
    kinds = {"input": images, "masked": masked, "reconstruction": reconstructions}
    columns = {label: stretch(channels_last(kind[:, at]), *limits) for label, kind in kinds.items()}
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
    at, title = shown_bands(bands, sensor, shown)
    inputs = channels_last(images[:, at])
    columns = {"input": stretch(inputs, *colour_limits(inputs))} | {k: as_array(x) for k, x in features.items()}
    _save_grid(target, columns, f"{title}\nfeatures: first three principal components as red, green, blue")


def _save_grid(target: Path, columns: dict[str, Array], title: str) -> None:
    """Draw pictures (N, any size, 3) of 0-1, a titled column for each kind and a row for each image, of one size."""
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
