"""Feature maps from chosen depths of a plain or group-channel ViT, and a pyramid of scales made of them.

Shapes: B batch, C bands, H W image, P patch, G channel groups, h w patch grid (H/P by W/P), D encoder width, F channels
of a feature map (D, or G * D), W pyramid width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F

from geoexplora.errors import ConfigError

GroupFeatures = Literal["mean", "concat"]


def evenly_spaced_levels(depth: int, count: int = 4) -> tuple[int, ...]:
    """Blocks to take features from: the last of each quarter of the depth, L/4, L/2, 3L/4 and L.

    Depths that do not divide are rounded down: 2, 5, 7, 10 of 10 blocks. Of fewer than ``count`` blocks, every one.

    Args:
        depth: number of blocks L.
        count: number of levels.

    Returns:
        1-based block numbers, rising.
    """
    count = min(count, depth)
    return tuple(depth * part // count for part in range(1, count + 1))


def resolve_levels(levels: Sequence[int] | None, depth: int) -> tuple[int, ...]:
    """Check the blocks to take features from.

    Args:
        levels: 1-based block numbers, rising; ``None`` for evenly spaced ones.
        depth: number of blocks.

    Raises:
        ConfigError: if there are none, one is no block of the model, or they do not rise.
    """
    if levels is None:
        return evenly_spaced_levels(depth)
    taken = tuple(levels)
    outside = [level for level in taken if not 1 <= level <= depth]
    if outside:
        raise ConfigError(f"level {outside[0]} is out of range: the model has {depth} blocks", "Count from 1.")
    if not taken or list(taken) != sorted(set(taken)):
        usual = ", ".join(map(str, evenly_spaced_levels(depth)))
        raise ConfigError(f"levels {list(taken)} are not rising block numbers", f"Give for example {usual}, or none.")
    return taken


def check_group_features(group_features: str) -> None:
    """Check the name.

    Raises:
        ConfigError: if it is not one of ``GroupFeatures``.
    """
    if group_features not in get_args(GroupFeatures):
        raise ConfigError(f"unknown group_features {group_features!r}", "Choose mean or concat.")


def feature_channels(encoder: Any, group_features: GroupFeatures) -> int:
    """F, the channels of the maps that ``feature_maps`` gives."""
    return encoder.embed_dim * (getattr(encoder, "num_groups", 1) if group_features == "concat" else 1)


def feature_maps(
    encoder: Any, images: Tensor, levels: Sequence[int], group_features: GroupFeatures = "mean"
) -> list[Tensor]:
    """Normed features of some blocks as maps, without class and register tokens; later blocks do not run.

    As timm's ``forward_intermediates(norm=True)``: the final norm is applied at every level. An encoder that has it
    behind the mean of its patch tokens (``fc_norm``) has it applied to every token instead.

    Args:
        encoder: a timm-style ViT, plain or group-channel.
        images: (B, C, H, W), sides multiples of P.
        levels: 1-based block numbers, rising.
        group_features: what becomes of the G tokens of a position, whatever the encoder's own ``grid_features`` are:
            their ``mean``, or ``concat``, one group's channels behind the other's.

    Returns:
        (B, F, h, w) for each level.
    """
    taken = encoder.forward_intermediates(
        images, [level - 1 for level in levels], norm=True, stop_early=True, output_fmt="NLC", intermediates_only=True
    )
    grid = encoder.patch_embed.dynamic_feat_size(images.shape[-2:])
    # One of timm's two norms is the identity; a plain encoder has one group.
    grouped = [encoder.fc_norm(tokens).unflatten(1, (-1, *grid)) for tokens in taken]
    if group_features == "mean":
        return [tokens.mean(1).permute(0, 3, 1, 2).contiguous() for tokens in grouped]
    return [tokens.permute(0, 1, 4, 2, 3).flatten(1, 2).contiguous() for tokens in grouped]


def same_size(x: Tensor, like: Tensor) -> Tensor:
    """Resize maps (B, W, any, any) bilinearly to another's rows and columns."""
    return F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=False)


class FeaturePyramid(nn.Module):
    """Maps at 4, 2, 1 and 1/2 times the patch grid from the one resolution of a plain ViT.

    The scales are those of ViTDet's simple feature pyramid (Li et al. 2022, arXiv 2203.16527, section 3), with two
    changes. Maps are doubled by interpolation and a convolution: transposed convolutions whose stride equals their
    kernel, as ViTDet's, map each pixel of a patch by weights of its own and so print a pattern on every image (Odena
    et al. 2016, "Deconvolution and Checkerboard Artifacts"). Maps are halved by means, which fit grids of odd sides.
    Deeper levels make coarser maps, as in UPerNet and DPT; fewer than four are shared by neighbouring scales.

    Args:
        channels: F.
        levels: number of levels, at most 4.
        width: W.

    Raises:
        ConfigError: if there are more levels than scales.
    """

    scales = (4.0, 2.0, 1.0, 0.5)

    def __init__(self, channels: int, levels: int, width: int) -> None:
        super().__init__()
        if levels > len(self.scales):
            raise ConfigError(
                f"a pyramid of {len(self.scales)} scales cannot use {levels} levels",
                "Give at most 4 levels, or use the linear head.",
            )
        self.sources = tuple(scale * levels // len(self.scales) for scale in range(len(self.scales)))
        self.project = nn.ModuleList(nn.Conv2d(channels, width, 1) for _ in self.scales)
        enlarge_twice = nn.Sequential(*_double(width), LayerNorm2d(width), nn.GELU(), *_double(width))
        self.resample = nn.ModuleList([enlarge_twice, nn.Sequential(*_double(width)), nn.Identity(), _Halve()])

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Make the maps.

        Args:
            features: (B, F, h, w) for each level.

        Returns:
            (B, W, 4 h, 4 w), (B, W, 2 h, 2 w), (B, W, h, w) and (B, W, h/2, w/2), the last rounded up.
        """
        # A convolution of size 1 first, so that only W channels are interpolated.
        return [
            resample(project(features[source]))
            for source, project, resample in zip(self.sources, self.project, self.resample, strict=True)
        ]


def _double(width: int) -> tuple[nn.Module, nn.Module]:
    return nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(width, width, 3, padding=1, bias=False)


class _Halve(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        return F.adaptive_avg_pool2d(x, ((height + 1) // 2, (width + 1) // 2))
