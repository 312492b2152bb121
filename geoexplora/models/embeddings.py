"""Fixed sin-cos encodings of position and channel group, and the patch embedding of channel groups.

Shapes: B batch, C bands, H W image, P patch, G groups, L = (H/P)(W/P) positions, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import PatchEmbed
from torch import Tensor, nn

from geoexplora.errors import ConfigError


def sincos_1d(width: int, positions: Tensor) -> Tensor:
    """Sin-cos encoding of scalar positions (Vaswani et al. 2017, section 3.5).

    Args:
        width: encoding width, even; the first half holds sines, the second cosines.
        positions: (N,).

    Returns:
        (N, width), float64.
    """
    frequencies = 10000.0 ** -(torch.arange(width // 2, dtype=torch.float64) / (width / 2))
    angles = positions.to(torch.float64)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def sincos_2d(width: int, grid: tuple[int, int], prefix_tokens: int = 0) -> Tensor:
    """Sin-cos encoding of a grid: the first half of the width encodes the column, the second the row (He et al. 2022).

    Args:
        width: encoding width, a multiple of 4.
        grid: rows and columns.
        prefix_tokens: zero rows to put first, one for each class or register token.

    Returns:
        (1, prefix_tokens + rows * columns, width), in torch's default dtype.

    Raises:
        ValueError: if the width is not a multiple of 4.
    """
    if width % 4:
        raise ValueError(f"a 2-D sin-cos encoding needs a width that is a multiple of 4, not {width}")
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    encoding = torch.cat([sincos_1d(width // 2, columns.flatten()), sincos_1d(width // 2, rows.flatten())], dim=1)
    prefix = encoding.new_zeros(prefix_tokens, width)
    return torch.cat([prefix, encoding]).unsqueeze(0).to(torch.get_default_dtype())


class GroupPatchEmbed(nn.ModuleList):
    """One patch embedding for each channel group (SatMAE, arXiv 2207.08051, section 3.3).

    Args:
        img_size: image side in pixels.
        patch_size: patch side in pixels.
        in_chans: number of input bands.
        embed_dim: token width D.
        groups: for each group the positions of its bands in the input.
        kwargs: passed to timm's ``PatchEmbed``.
    """

    def __init__(
        self,
        img_size: int,
        patch_size: int,
        in_chans: int,
        embed_dim: int,
        groups: Sequence[Sequence[int]],
        **kwargs: Any,
    ) -> None:
        members = [band for group in groups for band in group]
        if sorted(members) != list(range(in_chans)):
            raise ValueError(f"groups {groups} must hold each of the {in_chans} input bands exactly once")
        super().__init__(PatchEmbed(img_size, patch_size, len(group), embed_dim, **kwargs) for group in groups)
        self.groups = tuple(tuple(group) for group in groups)
        self.in_chans = in_chans

    @property
    def _first(self) -> PatchEmbed:
        return self[0]

    @property
    def img_size(self) -> tuple[int, int]:
        """Image height and width in pixels."""
        return self._first.img_size

    @property
    def patch_size(self) -> tuple[int, int]:
        """Patch height and width in pixels."""
        return self._first.patch_size

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of positions."""
        return self._first.grid_size

    @property
    def num_patches(self) -> int:
        """L, the number of positions (tokens are G times as many)."""
        return self._first.num_patches

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        """Pixels for each position, as timm's ``PatchEmbed`` gives them."""
        return self._first.feat_ratio(as_scalar)

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of positions of an image of that size."""
        return self._first.dynamic_feat_size(img_size)

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """Change the image or patch size, resampling the kernels (timm)."""
        embeds: list[Any] = list(self)
        for embed in embeds:
            embed.set_input_size(img_size=img_size, patch_size=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """Embed an image.

        Args:
            x: (B, C, H, W).

        Returns:
            (B, G * L, D): group by group, positions row by row within a group; (B, G, H/P, W/P, D) where the members
            keep the grid (``output_fmt="NHWC"``, which timm asks for where images are of any size).

        Raises:
            ConfigError: if the image has not C bands.
        """
        if x.shape[1] != self.in_chans:  # of too many the groups would take the first ones, whatever they are
            raise ConfigError(
                f"the group-channel ViT takes {self.in_chans} bands, got {x.shape[1]}",
                "Select the bands that it was built for, in their order.",
            )
        embeds: Any = iter(self)
        tokens = [embed(x[:, list(group)]) for embed, group in zip(embeds, self.groups, strict=True)]
        return torch.stack(tokens, dim=1) if tokens[0].ndim == 4 else torch.cat(tokens, dim=1)
