"""Pictures of single tiles."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor

from geoexplora.bands import Sensor

TRUE_COLOUR = ("red", "green", "blue")
PERCENTILES = (2, 98)


def plot_tile(
    image: Tensor, bands: Sequence[str], sensor: Sensor, title: str | None = None, suptitle: str | None = None
) -> Figure:
    """Plot a tile in true colour, or its first band in grey where red, green and blue are not all there.

    Args:
        image: (C, h, w), in any units; each shown band is stretched between its 2nd and 98th percentile.
        bands: names of the C bands.
        sensor: the sensor that the names belong to.
        title: above the picture.
        suptitle: of the whole figure.

    Returns:
        The figure.
    """
    common = [sensor.band(name).common_name for name in bands]
    colour = all(name in common for name in TRUE_COLOUR)
    shown = [common.index(name) for name in TRUE_COLOUR] if colour else [0]
    values = image.detach().cpu().numpy()[shown].transpose(1, 2, 0).astype(np.float64)
    # Band by band, since level-1C imagery is blue with haze otherwise, but a flat band not so far that its noise shows.
    low, high = np.nanpercentile(values, PERCENTILES, axis=(0, 1))
    least = max(float((high - low).max()) / 2, float(np.finfo(np.float32).eps))
    span = np.maximum(high - low, least)
    values = np.clip((values - low) / span, 0, 1)
    height, width = values.shape[:2]
    figure, axes = plt.subplots(figsize=(4, 4 * min(max(height / width, 0.4), 2)), layout="constrained")
    axes.imshow(values if colour else values[..., 0], cmap=None if colour else "gray", interpolation="nearest")
    axes.axis("off")
    if title:
        axes.set_title(title)
    if suptitle:
        figure.suptitle(suptitle)
    return figure
