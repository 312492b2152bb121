from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from geoexplora.models.embeddings import GroupPatchEmbed, sincos_1d, sincos_2d


def slow_1d(width: int, position: float) -> list[float]:
    frequencies = [10000 ** (-2 * i / width) for i in range(width // 2)]
    return [math.sin(position * f) for f in frequencies] + [math.cos(position * f) for f in frequencies]


@settings(max_examples=25, deadline=None)
@given(width=st.integers(1, 16).map(lambda half: 2 * half), positions=st.lists(st.integers(0, 300), min_size=1))
def test_1d_against_a_loop(width: int, positions: list[int]) -> None:
    expected = torch.tensor([slow_1d(width, position) for position in positions], dtype=torch.float64)
    torch.testing.assert_close(sincos_1d(width, torch.tensor(positions)), expected)


@pytest.mark.parametrize("prefix_tokens", [0, 1, 5])
@pytest.mark.parametrize("grid", [(1, 1), (2, 3), (5, 4)])
def test_2d_against_a_loop(grid: tuple[int, int], prefix_tokens: int) -> None:
    width = 12
    rows = [[0.0] * width for _ in range(prefix_tokens)]
    rows += [slow_1d(width // 2, x) + slow_1d(width // 2, y) for y in range(grid[0]) for x in range(grid[1])]
    encoding = sincos_2d(width, grid, prefix_tokens)
    assert encoding.dtype == torch.get_default_dtype()
    torch.testing.assert_close(encoding, torch.tensor([rows]))


def test_2d_refuses_an_odd_width() -> None:
    with pytest.raises(ValueError, match="multiple of 4, not 6"):
        sincos_2d(6, (2, 2))


GROUPS = [((0,), (1,)), ((0, 1, 2),), ((3, 0), (2,), (1, 4, 5)), ((0, 1, 2, 6), (3, 4, 5, 7), (8, 9))]


def slow_embedding(embed: GroupPatchEmbed, images: Tensor, patch: int) -> Tensor:
    """Each patch of each group as one vector times one matrix."""
    samples = []
    for image in images:
        tokens = []
        for layer, group in zip(embed, embed.groups, strict=True):
            weight = layer.proj.weight.flatten(1)
            for top in range(0, image.shape[1], patch):
                for left in range(0, image.shape[2], patch):
                    pixels = torch.stack([image[band, top : top + patch, left : left + patch] for band in group])
                    tokens.append(weight @ pixels.flatten() + layer.proj.bias)
        samples.append(torch.stack(tokens))
    return torch.stack(samples)


@pytest.mark.parametrize("patch", [2, 4])
@pytest.mark.parametrize("groups", GROUPS)
def test_group_patch_embedding_against_a_loop(groups: tuple[tuple[int, ...], ...], patch: int) -> None:
    torch.manual_seed(0)
    bands = sum(map(len, groups))
    embed = GroupPatchEmbed(8, patch, bands, 6, groups).double()
    images = torch.randn(2, bands, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(embed(images), slow_embedding(embed, images, patch))


@pytest.mark.parametrize("groups", [((0, 1), (1, 2)), ((0,), (2,)), ((0, 1, 2, 3),), ((0, 1),)])
def test_groups_must_hold_each_band_once(groups: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ValueError, match="each of the 3 input bands exactly once"):
        GroupPatchEmbed(8, 4, 3, 6, groups)


def test_sizes_are_those_of_one_patch_embedding() -> None:
    embed = GroupPatchEmbed(12, 4, 3, 6, ((0, 1), (2,)))
    assert (embed.img_size, embed.patch_size, embed.grid_size, embed.num_patches) == ((12, 12), (4, 4), (3, 3), 9)
    assert embed.feat_ratio() == 4
    assert embed.feat_ratio(as_scalar=False) == (4, 4)
    assert embed.dynamic_feat_size((8, 16)) == (2, 4)
    with pytest.raises(AssertionError, match="Input height"):
        embed(torch.zeros(1, 3, 16, 12))
