"""Block masks: how many crops and tokens are hidden, and in what shapes."""

from __future__ import annotations

import math
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from geoexplora.objectives.block_masking import ASPECT, block_masks, fill_with_blocks


def hidden_in_crops(masks: Tensor) -> list[int]:
    return [int(mask.sum()) for mask in masks]


class Replay(Random):
    """Remembers the shares' draws, which come one for each masked crop, between those of the blocks."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.chosen: list[int] = []

    def sample(self, population: Any, k: int, **kwargs: Any) -> list[Any]:
        self.chosen = super().sample(population, k, **kwargs)
        return self.chosen


@settings(max_examples=150, deadline=None)
@given(
    crops=st.integers(1, 9),
    grid=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    groups=st.integers(1, 4),
    probability=st.floats(0, 1),
    ends=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    seed=st.integers(0, 2**62),
)
def test_shapes_and_upper_bounds(
    crops: int, grid: tuple[int, int], groups: int, probability: float, ends: tuple[float, float], seed: int
) -> None:
    """Whatever the sizes it ends, and never hides more crops or tokens than asked for."""
    low, high = sorted(ends)
    random = Replay(seed)
    masks = block_masks(crops, grid, groups, probability, (low, high), random)
    tokens = groups * grid[0] * grid[1]
    assert masks.shape == (crops, tokens)
    assert masks.dtype == torch.bool
    assert len(random.chosen) == math.floor(probability * crops)
    step = (high - low) / max(1, len(random.chosen))
    bounds = {crop: (low + step * (number + 1)) * tokens for number, crop in enumerate(random.chosen)}
    for crop, hidden in enumerate(hidden_in_crops(masks)):
        assert hidden <= bounds.get(crop, 0.0) + 1e-6


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("grid", [(16, 16), (12, 20)])
@pytest.mark.parametrize(("crops", "probability"), [(16, 0.5), (7, 0.5), (5, 1.0), (3, 0.34)])
def test_number_of_masked_crops_and_their_shares(
    crops: int, probability: float, grid: tuple[int, int], groups: int
) -> None:
    low, high = 0.1, 0.5
    tokens = groups * grid[0] * grid[1]
    for seed in range(5):
        hidden = hidden_in_crops(block_masks(crops, grid, groups, probability, (low, high), Random(seed)))
        shares = sorted(count / tokens for count in hidden if count)
        assert len(shares) == math.floor(probability * crops)
        step = (high - low) / len(shares)
        for number, share in enumerate(shares):
            # A block of a few tokens may no longer fit in: on large grids all but some of the tokens are found.
            assert low + step * number - 0.05 < share <= low + step * (number + 1)


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_a_fixed_share_is_nearly_reached(share: float) -> None:
    counts = hidden_in_crops(block_masks(20, (16, 16), 1, 1.0, (share, share), Random(0)))
    assert max(counts) <= share * 256
    assert sum(counts) / 20 > 0.97 * math.floor(share * 256)


def slow_counts(tokens: int, masked: int, ratio: tuple[float, float], draws: list[float]) -> list[int]:
    """Tokens to hide in each masked crop: one share drawn from each of equal intervals."""
    edges = [ratio[0] + (ratio[1] - ratio[0]) * number / masked for number in range(masked + 1)]
    return [int((a + (b - a) * draw) * tokens) for a, b, draw in zip(edges[:-1], edges[1:], draws, strict=True)]


@pytest.mark.parametrize(("crops", "probability", "masked"), [(1, 1.0, 1), (8, 0.5, 4), (10, 0.25, 2), (3, 0.9, 2)])
@pytest.mark.parametrize("ratio", [(0.1, 0.5), (0.0, 0.3), (0.4, 0.4)])
def test_counts_against_slow_ones(
    crops: int, probability: float, masked: int, ratio: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    draws: list[float] = []

    class Draws(Random):
        def random(self) -> float:
            draws.append(super().random())
            return draws[-1]

    monkeypatch.setattr(
        "geoexplora.objectives.block_masking.fill_with_blocks", lambda mask, count, random: asked.append(count)
    )
    block_masks(crops, (7, 5), 2, probability, ratio, Draws(3))
    assert asked == slow_counts(70, masked, ratio, draws[-masked:])


class Recorded(np.ndarray[Any, Any]):
    """An array that notes which part of it is written."""

    writes: list[tuple[int, ...]]

    def __array_finalize__(self, parent: Any) -> None:
        self.writes = getattr(parent, "writes", [])

    def __setitem__(self, key: Any, value: Any) -> None:
        assert key is ...
        assert value is True
        mask: Any = self.base
        offset = self.__array_interface__["data"][0] - mask.__array_interface__["data"][0]
        group, top, left = np.unravel_index(offset, mask.shape)
        assert self.ndim == 2
        self.writes.append((int(group), int(top), int(left), self.shape[0], self.shape[1]))
        super().__setitem__(key, value)


@pytest.mark.parametrize("count", [4, 20, 90])
def test_blocks_are_rectangles_within_one_group(count: int) -> None:
    drawn = set()
    for seed in range(30):
        plain = np.zeros((3, 9, 11), dtype=np.bool_)
        mask = plain.view(Recorded)
        mask.writes = []
        fill_with_blocks(mask, count, Random(seed))
        union = np.zeros((3, 9, 11), dtype=np.bool_)
        for group, top, left, height, width in mask.writes:
            assert top + height <= 9
            assert left + width <= 11
            assert 1 <= height * width <= 1.6 * count  # of at least 4 tokens, but fewer where fewer are left to hide
            assert ASPECT[0] * 0.4 < height / width < ASPECT[1] * 2.5
            union[group, top : top + height, left : left + width] = True
            drawn.add(group)
        assert (union == plain).all()
    assert drawn == {0, 1, 2}


@pytest.mark.parametrize("groups", [1, 5, 13])
@pytest.mark.parametrize("side", [4, 6, 12])
def test_shares_are_met_with_many_groups_and_on_small_grids(groups: int, side: int) -> None:
    """A block lies in one group, however many tokens all groups have; where few are left, blocks are small."""
    random = Random(0)
    shares = torch.cat([
        block_masks(16, (side, side), groups, 0.5, (0.1, 0.5), random).float().mean(1) for _ in range(40)
    ])  # fmt: skip
    masked = shares[shares > 0]
    assert len(masked) == 40 * 8, "every chosen crop hides tokens"
    assert abs(float(masked.mean()) - 0.3) < 0.5 / (side * side * groups) + 0.01  # counts are rounded down
    assert masked.max() <= 0.5


def test_two_by_two_tokens() -> None:
    random = Random(0)
    hidden = [int(block_masks(2, (2, 2), 1, 0.5, (0.3, 0.6), random).sum()) for _ in range(50)]
    assert set(hidden) == {1, 2}


def test_blocks_add_to_what_is_hidden() -> None:
    mask = np.zeros((1, 8, 8), dtype=np.bool_)
    mask[0, :4] = True
    fill_with_blocks(mask, 12, Random(0))
    assert mask[0, :4].all()
    assert 32 < mask.sum() <= 44


def test_nothing_left_to_hide_ends() -> None:
    mask = np.ones((2, 5, 5), dtype=np.bool_)
    fill_with_blocks(mask, 10, Random(0))
    assert mask.all()


def test_deterministic_in_the_seed() -> None:
    def draw(seed: int) -> Tensor:
        return block_masks(6, (10, 10), 2, 0.5, (0.1, 0.5), Random(seed))

    torch.manual_seed(1)
    first = draw(7)
    torch.manual_seed(2)
    assert first.equal(draw(7))
    assert not first.equal(draw(8))


@pytest.mark.parametrize(
    ("crops", "grid", "probability", "ratio"),
    [
        (4, (8, 8), 0.0, (0.1, 0.5)),
        (4, (8, 8), 1.0, (0.0, 0.0)),
        (4, (1, 1), 1.0, (0.0, 0.9)),
        (1, (8, 8), 0.9, (0.1, 0.5)),
    ],
)
def test_masks_may_be_empty(crops: int, grid: tuple[int, int], probability: float, ratio: tuple[float, float]) -> None:
    masks = block_masks(crops, grid, 1, probability, ratio, Random(0))
    assert masks.shape == (crops, grid[0] * grid[1])
    assert not masks.any()


def test_tokens_are_ordered_group_by_group(monkeypatch: pytest.MonkeyPatch) -> None:
    def hide_one(mask: NDArray[np.bool_], count: int, random: Random) -> None:
        mask[1, 2, 3] = True

    monkeypatch.setattr("geoexplora.objectives.block_masking.fill_with_blocks", hide_one)
    (mask,) = block_masks(1, (4, 5), 3, 1.0, (0.1, 0.5), Random(0))
    assert mask.nonzero().flatten().tolist() == [1 * 20 + 2 * 5 + 3]
