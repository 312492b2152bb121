"""The group-channel vision transformer (SatMAE, NeurIPS 2022, arXiv 2207.08051), as a timm model.

Shapes: B batch, C bands, H W image, G groups, L positions, D token width, E channel part of the width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from geoexplora.models.embeddings import GroupPatchEmbed, sincos_1d, sincos_2d
from geoexplora.models.initialization import initialize_linears


class GroupChannelVisionTransformer(VisionTransformer):
    """A vision transformer with a token for each position and channel group.

    A token's encoding is the 2-D sin-cos of its position (D - E wide) beside the 1-D sin-cos of its group (E wide).
    The class token stands first. Everything else is timm's ``VisionTransformer``.

    Args:
        groups: for each group the 0-based positions of its bands in the input.
        channel_width: E.
        class_token_encoding: add a position and channel encoding to the class token, as SatMAE's fine-tuning
            encoder does (its pre-training encoder does not).
        grid_features: what ``forward_intermediates`` makes of the G tokens of a position: their ``mean`` (D channels)
            or ``concat`` (G * D channels).
        img_size: image side in pixels.
        patch_size: patch side in pixels.
        in_chans: number of bands; by default as many as the groups hold.
        embed_dim: D.
        kwargs: passed to timm's ``VisionTransformer``.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[int]],
        channel_width: int,
        class_token_encoding: bool = False,
        grid_features: str = "mean",
        img_size: int = 96,
        patch_size: int = 8,
        in_chans: int | None = None,
        embed_dim: int = 768,
        **kwargs: Any,
    ) -> None:
        if grid_features not in {"mean", "concat"}:
            raise ValueError(f"grid_features must be 'mean' or 'concat', not {grid_features!r}")
        if not kwargs.get("class_token", True):
            raise ValueError("needs a class token")
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=sum(len(group) for group in groups) if in_chans is None else in_chans,
            embed_dim=embed_dim,
            pos_embed="none",
            embed_layer=partial(GroupPatchEmbed, groups=groups),
            weight_init="skip",
            **kwargs,
        )
        self.num_groups = len(groups)
        self.grid_features = grid_features
        positions = self.patch_embed.num_patches + self.num_prefix_tokens
        self.pos_embed = nn.Parameter(torch.empty(1, positions, embed_dim - channel_width))
        self.channel_embed = nn.Parameter(torch.empty(1, self.num_groups, channel_width))
        self.channel_cls_embed = nn.Parameter(torch.empty(1, 1, channel_width)) if class_token_encoding else None
        if grid_features == "concat":
            for info in self.feature_info:
                info["num_chs"] = self.num_groups * embed_dim
        self.init_weights()

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """Initialize as SatMAE does: Xavier-uniform linears, sin-cos encodings."""
        initialize_linears(self)
        for token in (self.cls_token, self.reg_token):
            if token is not None:
                nn.init.normal_(token, std=0.02)
        self._init_encodings()

    @torch.no_grad()
    def _init_encodings(self) -> None:
        grid = self.patch_embed.grid_size
        self.pos_embed.copy_(sincos_2d(self.pos_embed.shape[-1], grid, self.num_prefix_tokens))
        self.channel_embed.copy_(sincos_1d(self.channel_embed.shape[-1], torch.arange(self.num_groups)).unsqueeze(0))
        if self.channel_cls_embed is not None:
            self.channel_cls_embed.zero_()

    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay."""
        return {"pos_embed", "channel_embed", "channel_cls_embed", "cls_token", "reg_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups for layer decay, as in timm."""
        matcher = super().group_matcher(coarse)
        return dict(matcher, stem=matcher["stem"] + r"|^channel_embed|^channel_cls_embed")

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """Change the image or patch size; kernels and position encodings are resampled (timm)."""
        old = self.patch_embed.grid_size
        self.patch_embed.set_input_size(img_size=img_size, patch_size=patch_size)
        resampled = resample_abs_pos_embed(
            self.pos_embed, self.patch_embed.grid_size, old, num_prefix_tokens=self.num_prefix_tokens
        )
        self.pos_embed = nn.Parameter(resampled, requires_grad=self.pos_embed.requires_grad)

    def encodings(self, grid: tuple[int, int] | None = None) -> Tensor:
        """The encoding of every patch token, (1, G * L, D), group by group.

        Args:
            grid: rows and columns of positions, where they are not the model's own.
        """
        own, prefix = self.patch_embed.grid_size, self.num_prefix_tokens
        encoding = resample_abs_pos_embed(self.pos_embed, grid or own, own, num_prefix_tokens=prefix)[:, prefix:]
        length = encoding.shape[1]
        position = encoding.unsqueeze(1).expand(-1, self.num_groups, -1, -1)
        channel = self.channel_embed.unsqueeze(2).expand(-1, -1, length, -1)
        return torch.cat([position, channel], dim=-1).flatten(1, 2)

    def _pos_embed(self, x: Tensor) -> Tensor:
        grid = (x.shape[2], x.shape[3]) if x.ndim == 5 else None  # kept where images are of any size
        x = (x if grid is None else x.flatten(1, 3)) + self.encodings(grid)
        prefix = self.cls_token
        if self.channel_cls_embed is not None:
            prefix = prefix + torch.cat([self.pos_embed[:, :1], self.channel_cls_embed], dim=-1)
        prefixes = [prefix] if self.reg_token is None else [prefix, self.reg_token]
        return self.pos_drop(torch.cat([*(p.expand(x.shape[0], -1, -1) for p in prefixes), x], dim=1))

    def forward_intermediates(self, x: Tensor, *args: Any, output_fmt: str = "NCHW", **kwargs: Any) -> Any:
        """Features of intermediate blocks, with timm's signature.

        Args:
            x: (B, C, H, W).
            args: as in timm: ``indices``, ``return_prefix_tokens``, ``norm``, ``stop_early``.
            output_fmt: ``NLC`` for tokens (B, G * L, D), or ``NCHW`` for maps (B, D or G * D, H/P, W/P), where
                ``grid_features`` says how the tokens of a position become one vector.
            kwargs: as in timm.

        Returns:
            As in timm: final tokens and a list of intermediates, the list alone, or a dictionary.
        """
        taken = super().forward_intermediates(x, *args, output_fmt="NLC", **kwargs)
        if output_fmt == "NLC":
            return taken
        size = self.patch_embed.dynamic_feat_size(x.shape[-2:])
        if isinstance(taken, dict):
            taken["image_intermediates"] = [self._to_map(y, size) for y in taken["image_intermediates"]]
            return taken
        if isinstance(taken, tuple):
            return taken[0], [self._to_map(y, size) for y in taken[1]]
        return [self._to_map(y, size) for y in taken]

    def _to_map(self, tokens: Any, size: tuple[int, int]) -> Any:
        if isinstance(tokens, tuple):  # timm gives (tokens, prefix tokens) where both are asked for
            return self._to_map(tokens[0], size), tokens[1]
        grouped = tokens.unflatten(1, (self.num_groups, *size))
        if self.grid_features == "mean":
            return grouped.mean(1).permute(0, 3, 1, 2).contiguous()
        return grouped.permute(0, 1, 4, 2, 3).flatten(1, 2).contiguous()
