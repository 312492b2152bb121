"""Which bands are drawn, how far they are stretched, and the colours of classes."""

from __future__ import annotations

import numpy as np
import pytest

from geoexplora.bands import RGB, SENTINEL2
from geoexplora.runs.colours import CLASS_COLOURS, Array, colour_bands, colour_limits, stretch


def test_which_bands_are_shown() -> None:
    assert colour_bands(("B2", "B3", "B4", "B8"), SENTINEL2) == (("B4", "B3", "B2"), "true colour")
    assert colour_bands(("R", "G", "B"), RGB) == (("R", "G", "B"), "true colour")
    assert colour_bands(("B11", "B5", "B12"), SENTINEL2)[0] == ("B12", "B11", "B5")
    assert colour_bands(("B8",), SENTINEL2)[0] == ("B8", "B8", "B8")


def noisy(level: float, spread: float, seed: int) -> Array:
    """(8, 8, 3)."""
    return np.random.default_rng(seed).normal(level, spread, (8, 8, 3))


def test_the_stretch_of_a_varied_picture_is_that_of_its_percentiles() -> None:
    picture = np.random.default_rng(0).uniform(0, 3000, (2, 16, 16, 3))
    low, high = colour_limits(picture)
    for number in range(2):
        for band in range(3):
            values = picture[number, :, :, band]
            assert low[number, 0, 0, band] == pytest.approx(np.percentile(values, 2))
            assert high[number, 0, 0, band] == pytest.approx(np.percentile(values, 98))


@pytest.mark.parametrize("others", [[], [noisy(1500, 600, 1)]])
def test_noise_of_a_uniform_picture_stays_faint(others: list[Array]) -> None:
    pictures = np.stack([noisy(1000, 5, 0), *others])
    assert stretch(pictures, *colour_limits(pictures))[0].std((0, 1)).max() < 0.05


def test_uniform_pictures_keep_their_place_among_the_others() -> None:
    pictures = np.stack([np.full((8, 8, 3), 500.0), noisy(1500, 300, 0), np.full((8, 8, 3), 4000.0)])
    means = stretch(pictures, *colour_limits(pictures)).mean((1, 2, 3))
    assert means[0] == pytest.approx(0)
    assert 0.3 < means[1] < 0.7
    assert means[2] == pytest.approx(1)


@pytest.mark.filterwarnings("ignore:All-NaN")
def test_a_picture_without_values_is_grey_and_leaves_the_others_alone() -> None:
    pictures = np.stack([noisy(1500, 300, 0), np.full((8, 8, 3), np.nan)])
    drawn = stretch(pictures, *colour_limits(pictures))
    assert (drawn[1] == 0.5).all()
    assert drawn[0] == pytest.approx(stretch(pictures[:1], *colour_limits(pictures[:1]))[0])


def test_colours_of_classes_differ() -> None:
    values = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in CLASS_COLOURS])
    distances = np.abs(values[:, None] - values[None]).sum(-1) + 1000 * np.eye(len(values))
    assert distances.min() > 40
