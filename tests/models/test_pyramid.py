"""Feature maps equal timm's and loops; the pyramid has its scales, keeps constants constant and shifts nothing."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from geoexplora.errors import ConfigError
from geoexplora.models.pyramid import (
    FeaturePyramid,
    check_group_features,
    evenly_spaced_levels,
    feature_channels,
    feature_maps,
    resolve_levels,
    same_size,
)

GROUPS = ((2, 0), (1, 3, 5), (4,))
SIZES = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 4, "num_classes": 0}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("vit_tiny_patch16_224", {}),
    "registers": ("vit_tiny_patch16_224", {"reg_tokens": 2, "no_embed_class": True, "init_values": 1.0}),
    "no prefix": ("vit_tiny_patch16_224", {"class_token": False, "global_pool": ""}),
    "groups": ("group_channel_vit_base", {"groups": GROUPS, "channel_width": 8}),
    "groups, registers": ("group_channel_vit_base", {"groups": GROUPS, "channel_width": 8, "reg_tokens": 3}),
}
GROUPED = [kind for kind in KINDS if kind.startswith("groups")]


def build(kind: str, **kwargs: Any) -> Any:
    name, settings = KINDS[kind]
    torch.manual_seed(0)
    model = timm.create_model(name, **(SIZES | {"dynamic_img_size": True} | settings | kwargs))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def images_for(encoder: Any, height: int = 16, width: int = 12) -> Tensor:
    return torch.randn(2, encoder.in_chans, height, width, generator=torch.Generator().manual_seed(1))


# Levels -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("depth", "levels"),
    [
        (1, (1,)),
        (2, (1, 2)),
        (3, (1, 2, 3)),
        (4, (1, 2, 3, 4)),
        (8, (2, 4, 6, 8)),
        (10, (2, 5, 7, 10)),
        (12, (3, 6, 9, 12)),
        (24, (6, 12, 18, 24)),
        (40, (10, 20, 30, 40)),
    ],
)
def test_levels_from_the_depth(depth: int, levels: tuple[int, ...]) -> None:
    assert evenly_spaced_levels(depth) == resolve_levels(None, depth) == resolve_levels(levels, depth) == levels


@given(st.integers(1, 200), st.integers(1, 20))
def test_levels_are_even_and_end_with_the_last_block(depth: int, count: int) -> None:
    levels = evenly_spaced_levels(depth, count)
    steps = [b - a for a, b in zip((0, *levels), levels, strict=False)]
    assert len(levels) == min(depth, count)
    assert levels[-1] == depth
    assert min(steps) >= 1
    assert max(steps) - min(steps) <= 1


@pytest.mark.parametrize(
    ("levels", "text"),
    [
        ((), r"levels \[\] are not rising block numbers\nGive for example 3, 6, 9, 12, or none."),
        ((3, 3), r"levels \[3, 3\] are not rising"),
        ((6, 3), r"levels \[6, 3\] are not rising"),
        ((0, 3), "level 0 is out of range: the model has 12 blocks\nCount from 1."),
        ((-1,), "level -1 is out of range"),
        ((3, 13), "level 13 is out of range"),
    ],
)
def test_bad_levels(levels: tuple[int, ...], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        resolve_levels(levels, 12)


# Features -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("levels", [(1, 2, 3, 4), (2,), (1, 3)])
@pytest.mark.parametrize("group_features", ["mean", "concat"])
@torch.no_grad()
def test_bit_equal_to_timms(kind: str, levels: tuple[int, ...], group_features: Any) -> None:
    """Whatever the encoder's own choice for channel groups is, which stays."""
    own = "concat" if group_features == "mean" else "mean"
    encoder = build(kind, grid_features=own) if kind in GROUPED else build(kind)
    same = build(kind, grid_features=group_features) if kind in GROUPED else encoder
    images = images_for(encoder)
    before = torch.get_rng_state()
    maps = feature_maps(encoder, images, levels, group_features)
    assert torch.get_rng_state().equal(before)
    expected = same.forward_intermediates(images, [n - 1 for n in levels], norm=True, intermediates_only=True)
    channels = feature_channels(encoder, group_features)
    assert channels == (96 if kind in GROUPED and group_features == "concat" else 32)
    for got, value in zip(maps, expected, strict=True):
        assert got.shape == (2, channels, 4, 3)
        assert got.equal(value)
    if kind in GROUPED:
        assert encoder.grid_features == own


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_last_level_holds_the_final_tokens(kind: str) -> None:
    """Group by group, positions row by row; class and register tokens are dropped."""
    encoder = build(kind)
    images = images_for(encoder)
    tokens = encoder.forward_features(images)[:, encoder.num_prefix_tokens :]
    (mean,), (concat,) = (feature_maps(encoder, images, (4,), way) for way in ("mean", "concat"))  # type: ignore[arg-type]
    groups = getattr(encoder, "num_groups", 1)
    for row in range(4):
        for column in range(3):
            own = tokens[:, [12 * group + 3 * row + column for group in range(groups)]]
            assert concat[..., row, column].equal(own.flatten(1))
            torch.testing.assert_close(mean[..., row, column], own.sum(1) / groups)


@pytest.mark.parametrize("kind", ["plain", "groups"])
@torch.no_grad()
def test_a_norm_behind_the_pooling_is_applied_to_every_token(kind: str) -> None:
    encoder = build(kind, global_pool="avg")
    plain = build(kind)
    plain.load_state_dict({key.replace("fc_norm.", "norm."): value for key, value in encoder.state_dict().items()})
    images = images_for(encoder)
    assert isinstance(encoder.norm, nn.Identity)
    for got, expected in zip(feature_maps(encoder, images, (1, 4)), feature_maps(plain, images, (1, 4)), strict=True):
        assert got.equal(expected)


@torch.no_grad()
def test_later_blocks_do_not_run() -> None:
    encoder = build("plain")
    ran: list[int] = []
    for number, block in enumerate(encoder.blocks, start=1):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    feature_maps(encoder, images_for(encoder), (1, 3))
    assert ran == [1, 2, 3]


def test_unknown_group_features() -> None:
    with pytest.raises(ConfigError, match=r"unknown group_features 'sum'\nChoose mean or concat\."):
        check_group_features("sum")


# Pyramid ------------------------------------------------------------------------------------------------------------


def random_maps(levels: int, rows: int, columns: int, channels: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(2, channels, rows, columns, generator=generator) for _ in range(levels)]


def pyramid(levels: int = 4) -> FeaturePyramid:
    torch.manual_seed(3)
    return FeaturePyramid(6, levels, 8)


@pytest.mark.parametrize("levels", [1, 2, 3, 4])
@pytest.mark.parametrize("grid", [(4, 6), (5, 3), (1, 1), (2, 1)])
@torch.no_grad()
def test_scales(levels: int, grid: tuple[int, int]) -> None:
    rows, columns = grid
    half = (rows + 1) // 2, (columns + 1) // 2
    shapes = [tuple(x.shape[-2:]) for x in pyramid(levels)(random_maps(levels, rows, columns))]
    assert shapes == [(4 * rows, 4 * columns), (2 * rows, 2 * columns), grid, half]


@pytest.mark.parametrize(
    ("levels", "sources"), [(1, (0, 0, 0, 0)), (2, (0, 0, 1, 1)), (3, (0, 0, 1, 2)), (4, (0, 1, 2, 3))]
)
def test_deeper_levels_make_coarser_maps_and_none_is_left_out(levels: int, sources: tuple[int, ...]) -> None:
    made = pyramid(levels)
    assert made.sources == sources
    maps = [x.requires_grad_() for x in random_maps(levels, 2, 2)]
    for scale, source in enumerate(sources):
        grads = torch.autograd.grad(made(maps)[scale].square().sum(), maps, allow_unused=True)
        assert [grad is not None for grad in grads] == [number == source for number in range(levels)]


def test_too_many_levels() -> None:
    with pytest.raises(
        ConfigError, match="4 scales cannot use 5 levels\nGive at most 4 levels, or use the linear head"
    ):
        FeaturePyramid(6, 5, 8)


@torch.no_grad()
def test_scales_1_and_half_against_a_loop() -> None:
    made, maps = pyramid(), random_maps(4, 4, 6)
    _, _, one, half = made(maps)
    for row in range(4):
        for column in range(6):
            weight, bias = made.project[2].weight[..., 0, 0], made.project[2].bias
            expected = maps[2][:, :, row, column] @ weight.T + bias
            torch.testing.assert_close(one[:, :, row, column], expected, atol=1e-6, rtol=1e-5)
    for row in range(2):
        for column in range(3):
            window = maps[3][:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].flatten(2).mean(2)
            expected = window @ made.project[3].weight[..., 0, 0].T + made.project[3].bias
            torch.testing.assert_close(half[:, :, row, column], expected, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_doubling_interpolates_between_pixel_centres() -> None:
    """A new pixel lies at a quarter of the way to the next old one; beyond the outer centres nothing changes."""
    x = torch.tensor([0.0, 4.0, 8.0]).expand(1, 8, 3, 3)
    expected = torch.tensor([0.0, 1.0, 3.0, 5.0, 7.0, 8.0]).expand(1, 8, 6, 6)
    assert same_size(x, expected).equal(expected)
    assert same_size(x.mT, expected).equal(expected.mT)
    doubled = pyramid().resample[1]
    nn.init.dirac_(doubled[1].weight)
    assert doubled(x).equal(expected)


class Transposed(nn.Sequential):
    """Doubling as ViTDet does it."""

    def __init__(self, width: int) -> None:
        super().__init__(nn.ConvTranspose2d(width, width, 2, stride=2))


def unevenness(made: nn.Module, border: int = 2) -> list[float]:
    """The largest difference between interior pixels where all positions are alike, for each scale."""
    maps = [x[..., :1, :1].expand(-1, -1, 12, 12) for x in random_maps(4, 1, 1)]
    inside = []
    with torch.no_grad():
        for x, scale in zip(made(maps), FeaturePyramid.scales, strict=True):
            cut = int(border * scale)
            inner = x[..., cut:-cut, cut:-cut].flatten(2)
            inside.append(float((inner.amax(2) - inner.amin(2)).max()))
    return inside


def test_no_checkerboard() -> None:
    assert max(unevenness(pyramid())) < 1e-5


def test_a_transposed_convolution_would_be_seen() -> None:
    made = pyramid()
    made.resample[1] = Transposed(8)
    assert unevenness(made)[1] > 0.1
