"""Crop arithmetic against a slow reference: pixels marked one by one."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from geoexplora.datasets.fmow_rgb_boxes import CROPS, Crop, context, crop_window

sides = st.integers(1, 300)
boxes = st.tuples(st.integers(-60, 320), st.integers(-60, 320), st.integers(-3, 300), st.integers(-3, 300))


def grown_by(side: int, other: int) -> int:
    """The baseline's rule in tenths and fractions: shares of the *other* side of the image."""
    tenth = 10 * side // other
    share = {0: Fraction(2), 1: Fraction(1), 2: Fraction(1, 2), 3: Fraction(3, 10), 4: Fraction(1, 5)}
    return int(side * share.get(tenth, Fraction(15, 100)) / 2)


@given(boxes, sides, sides, st.sampled_from(CROPS))
@example((10, 10, 30, 30), 100, 100, "baseline")
@example((0, 0, 50, 20), 100, 200, "baseline")
def test_windows_mark_the_right_pixels(box: tuple[int, int, int, int], width: int, height: int, crop: Crop) -> None:
    x, y, across, down = box
    inside = [
        (row, column)
        for row in (y, y + down - 1, max(y, 0))
        for column in (x, x + across - 1, max(x, 0))
        if y <= row < y + down and x <= column < x + across and 0 <= row < height and 0 <= column < width
    ]
    if not inside and (down <= 0 or across <= 0 or not _overlap(box, width, height)):
        with pytest.raises(ValueError, match="no area within the image"):
            crop_window(box, width, height, crop)
        return
    wider, higher = (grown_by(across, height), grown_by(down, width)) if crop == "baseline" else (0, 0)
    expected = np.zeros((height, width), dtype=bool)
    for row in range(height):
        if crop == "full":
            expected[row] = True
        elif y - higher <= row < y + down + higher:
            expected[row] = [x - wider <= column < x + across + wider for column in range(width)]
    window = crop_window(box, width, height, crop)
    found = np.zeros_like(expected)
    found[window.top : window.bottom, window.left : window.right] = True
    assert window.left >= 0
    assert window.top >= 0
    np.testing.assert_array_equal(found, expected)
    assert (window.bottom - window.top) * (window.right - window.left) == expected.sum()


def _overlap(box: tuple[int, int, int, int], width: int, height: int) -> bool:
    x, y, across, down = box
    columns = set(range(x, x + across)) & set(range(width))
    return bool(columns) and bool(set(range(y, y + down)) & set(range(height)))


@pytest.mark.parametrize(
    ("share", "grown"),
    [
        (0.0, 2),
        (0.0999, 2),
        (0.1, 1),
        (0.1999, 1),
        (0.2, 0.5),
        (0.3, 0.3),
        (0.4, 0.2),
        (0.4999, 0.2),
        (0.5, 0.15),
        (3, 0.15),
    ],
)
def test_context_by_share(share: float, grown: float) -> None:
    assert context(share) == grown


def test_the_baselines_crossed_shares() -> None:
    # 40 px are 0.1 of the width and 0.4 of the height: the width grows by 20 %, as the height's share says.
    assert crop_window((100, 40, 40, 10), 400, 100, "baseline") == (96, 30, 144, 60)
