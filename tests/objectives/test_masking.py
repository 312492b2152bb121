"""Masks against a slow one written from the papers: sort the noise in Python, one sample at a time."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geoexplora.objectives.masking import mask_from_noise, noise_shape

GRID = [
    (batch, groups, positions, ratio)
    for batch in (1, 3)
    for groups, positions in ((1, 9), (3, 9), (2, 4), (3, 1), (5, 16))
    for ratio in (0.1, 0.5, 0.6, 0.75, 0.9, 0.999)
]


def slow_mask(
    noise: list[float], ratio: float, groups: int, positions: int, spatial: bool
) -> tuple[list[int], list[list[int]]]:
    """Tokens kept, in order, and the (G, L) table of removed ones, of one sample."""
    kept = max(1, math.floor((1 - ratio) * len(noise)))
    chosen = sorted(range(len(noise)), key=lambda index: noise[index])[:kept]
    keep = [group * positions + index for group in range(groups) for index in chosen] if spatial else chosen
    return keep, [[int(g * positions + position not in keep) for position in range(positions)] for g in range(groups)]


@pytest.mark.parametrize("spatial", [False, True])
@pytest.mark.parametrize(("batch", "groups", "positions", "ratio"), GRID)
def test_against_the_slow_mask(batch: int, groups: int, positions: int, ratio: float, spatial: bool) -> None:
    shape = noise_shape(batch, groups, positions, spatial)
    assert shape == (batch, positions if spatial else groups * positions)
    noise = torch.rand(shape, generator=torch.Generator().manual_seed(groups))
    mask = mask_from_noise(noise, ratio, groups, spatial)
    assert mask.removed.shape == (batch, groups, positions)
    for sample in range(batch):
        keep, removed = slow_mask(noise[sample].tolist(), ratio, groups, positions, spatial)
        assert mask.keep[sample].tolist() == keep
        assert mask.removed[sample].tolist() == removed


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 4), st.integers(1, 4), st.integers(1, 25), st.floats(0.01, 0.99), st.booleans(), st.integers(0, 99)
)
def test_keep_and_removed_tell_the_same(
    batch: int, groups: int, positions: int, ratio: float, spatial: bool, seed: int
) -> None:
    noise = torch.rand(noise_shape(batch, groups, positions, spatial), generator=torch.Generator().manual_seed(seed))
    keep, removed = mask_from_noise(noise, ratio, groups, spatial)
    visible = torch.zeros(batch, groups * positions).scatter(1, keep, 1.0)
    assert visible.equal(1 - removed.flatten(1))
    assert (visible.sum(1) == keep.shape[1]).all()  # every sample sees as many tokens, each once
    if spatial:
        assert (removed == removed[:, :1]).all()


@pytest.mark.parametrize("spatial", [False, True])
def test_every_token_is_as_likely_to_be_hidden(spatial: bool) -> None:
    noise = torch.rand(noise_shape(4000, 3, 8, spatial), generator=torch.Generator().manual_seed(0))
    share = mask_from_noise(noise, 0.75, 3, spatial).removed.mean(0)
    torch.testing.assert_close(share, torch.full((3, 8), 0.75), rtol=0, atol=0.04)


def test_groups_are_masked_independently() -> None:
    noise = torch.rand(500, 2 * 16, generator=torch.Generator().manual_seed(0))
    removed = mask_from_noise(noise, 0.5, 2).removed
    assert 0.4 < (removed[:, 0] == removed[:, 1]).float().mean() < 0.6


def test_at_least_one_token_stays() -> None:
    assert mask_from_noise(torch.rand(2, 3), 0.99, 3).keep.shape == (2, 1)
    assert mask_from_noise(torch.rand(2, 3), 0.99, 2, spatial=True).keep.shape == (2, 2)
