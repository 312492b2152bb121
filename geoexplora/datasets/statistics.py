"""Band statistics of a user's own tiles, for the normalization."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from geoexplora.bands import Statistics
from geoexplora.datasets.tiles import TileSource
from geoexplora.errors import DataError

SAMPLE = 2048
"""At most so many tiles are read: enough for means and deviations to three digits."""


def band_statistics(source: TileSource, bands: Sequence[str]) -> Statistics:
    """Mean and standard deviation of each band over the pixels of evenly spaced tiles.

    Args:
        source: a dataset of raw tiles.
        bands: names of its bands.

    Returns:
        The statistics, in the sensor's units. The same data always give the same numbers.

    Raises:
        DataError: if a band holds one value only.
    """
    count, total, squares = 0, np.zeros(len(bands)), np.zeros(len(bands))
    for index in np.linspace(0, len(source) - 1, min(SAMPLE, len(source))).round().astype(int).tolist():
        pixels = np.asarray(source.read(index).image, dtype=np.float64).reshape(len(bands), -1)
        count += pixels.shape[1]
        total += pixels.sum(1)
        squares += (pixels**2).sum(1)
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 0.0))
    flat = [band for band, deviation in zip(bands, std, strict=True) if not deviation > 0]
    if flat:
        raise DataError(
            f"band {', '.join(flat)} has the same value in every pixel", "Leave it out of --bands, or repair the tiles."
        )
    return Statistics(tuple(bands), tuple(mean.tolist()), tuple(std.tolist()))
