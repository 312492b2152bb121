"""Colours of pictures: which bands are drawn as red, green and blue, how far they are stretched, and those of classes.

Shapes: N images, C bands, H W size.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor

from geoexplora.bands import Sensor

Array = npt.NDArray[np.float64]

RIGHT = "#009e73"
WRONG = "#c02020"
MISSING = 0.5
"""Grey of pixels without a value."""

CLASS_COLOURS = (
    "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#0000ff", "#3c2d00", "#0f0f96",
    "#5a004b", "#b4f096", "#0078ff", "#e10f4b", "#a5d2a5", "#ff965a", "#871e4b", "#4b1e78", "#2d4bb4", "#963c00",
)  # fmt: skip
"""The first seven are those of Okabe and Ito (Color Universal Design); each further one is the colour farthest from all
before it and from grey, in CIELAB, to eyes with and without red-green blindness (Machado et al. 2009)."""

_PERCENTILES = (2.0, 98.0)
_LEAST_SHARE = 0.25
_LEAST_CONTRAST = 0.15


def colour_bands(bands: Sequence[str], sensor: Sensor) -> tuple[tuple[str, str, str], str]:
    """Which bands to draw as red, green and blue, and what to call that.

    Args:
        bands: names of the bands at hand.
        sensor: their sensor.

    Returns:
        True colour where the bands have it, else the longest, middle and shortest wavelength; and its name.
    """
    common = {sensor.band(name).common_name: name for name in bands}
    if {"red", "green", "blue"} <= common.keys():
        return (common["red"], common["green"], common["blue"]), "true colour"
    by_wavelength = sorted(bands, key=lambda name: sensor.band(name).wavelength, reverse=True)
    chosen = (by_wavelength[0], by_wavelength[len(by_wavelength) // 2], by_wavelength[-1])
    return chosen, f"false colour {', '.join(chosen)}"


def shown_bands(bands: Sequence[str], sensor: Sensor, shown: Sequence[str] | None = None) -> tuple[list[int], str]:
    """Positions of the bands to draw as red, green and blue, and a title that says so.

    Args:
        bands: names of the bands at hand.
        sensor: their sensor.
        shown: three bands to draw; by default those of ``colour_bands``.

    Raises:
        ConfigError: if a band to be shown is unknown to the sensor.
    """
    colours, title = colour_bands(bands, sensor) if shown is None else (sensor.select(shown), ", ".join(shown))
    return [list(bands).index(name) for name in colours], f"{sensor.name}, {title}"


def as_array(x: Tensor) -> Array:
    """Its values as float64."""
    return x.detach().cpu().double().numpy()


def channels_last(x: Tensor) -> Array:
    """(N, C, H, W) to (N, H, W, C), float64."""
    return as_array(x.permute(0, 2, 3, 1))


def colour_limits(pictures: Array) -> tuple[Array, Array]:
    """The values to draw black and as bright as can be: the 2nd and 98th percentile of each band of each picture.

    Where these lie close together, they are moved apart, so that the noise of a uniform picture (water, a field) is not
    drawn as a pattern: to a quarter of the range of all pictures, and to 15 % of the picture's own level. A picture
    that is dark or bright among the others stays so.

    Args:
        pictures: (N, H, W, 3), in any units.

    Returns:
        Two of (N, 1, 1, 3).
    """
    low, high = np.nanpercentile(pictures, _PERCENTILES, axis=(1, 2), keepdims=True)
    lowest, highest = np.fmin.reduce(low), np.fmax.reduce(high)
    level = np.maximum(np.abs(low), np.abs(high))
    least = np.maximum(_LEAST_SHARE * (highest - lowest), _LEAST_CONTRAST * level)
    added = np.maximum(least - (high - low), 0)
    # 0 for the darkest picture, 1 for the brightest; a band that is the same throughout is drawn black.
    place = ((low + high) / 2 - lowest) / np.maximum(highest - lowest, np.finfo(np.float64).tiny)
    return low - added * place, high + added * (1 - place)


def stretch(pictures: Array, low: Array, high: Array) -> Array:
    """Scale to colours of 0-1, with pixels that have no value in some band grey.

    Args:
        pictures: (N, H, W, 3).
        low: drawn black; broadcastable to the pictures.
        high: drawn as bright as can be; broadcastable to the pictures.

    Returns:
        (N, H, W, 3).
    """
    scaled = np.clip((pictures - low) / np.where(high > low, high - low, 1), 0, 1)
    return np.where(np.isnan(scaled).any(axis=-1, keepdims=True), MISSING, scaled)


def colour_pictures(images: Tensor, bands: Sequence[str], sensor: Sensor) -> tuple[Array, str]:
    """Images as pictures, each stretched by ``colour_limits``.

    Args:
        images: (N, C, H, W), in the sensor's units (not normalized).
        bands: names of the C bands.
        sensor: their sensor.

    Returns:
        (N, H, W, 3), colours of 0-1, and a title that says which bands they show.
    """
    at, title = shown_bands(bands, sensor)
    values = channels_last(images[:, at])
    return stretch(values, *colour_limits(values)), title
