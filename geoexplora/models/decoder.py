"""The light decoder of a masked autoencoder, for plain and for group-channel encoders.

Shapes: B batch, C bands, P patch, G groups, L positions, N = G * L tokens (G = 1 for a plain ViT), K visible tokens,
W decoder width, E channel part of W.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from geoexplora.models.embeddings import sincos_1d, sincos_2d
from geoexplora.models.initialization import initialize_linears


class MAEDecoder(nn.Module):
    """Predicts the pixels of every token from the visible ones (He et al. 2022; SatMAE 2022 for channel groups).

    The encodings are fixed sin-cos tables. Attribute names are Meta's without their ``decoder_`` prefix.

    Args:
        encoder_width: width of the encoder's tokens.
        grid: rows and columns of positions.
        patch_size: P.
        groups: for each channel group the positions of its bands in the input; ``None`` for a plain encoder.
        in_chans: C.
        width: W.
        depth: number of blocks.
        heads: attention heads.
        channel_width: E, unused without groups.
        mlp_ratio: hidden width of the MLP in multiples of W.
    """

    def __init__(
        self,
        encoder_width: int,
        grid: tuple[int, int],
        patch_size: int,
        groups: Sequence[Sequence[int]] | None,
        in_chans: int,
        width: int = 512,
        depth: int = 8,
        heads: int = 16,
        channel_width: int = 128,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        self.groups = None if groups is None else tuple(tuple(group) for group in groups)
        self.patch_size, self.in_chans = patch_size, in_chans
        self.positions = grid[0] * grid[1]
        norm = partial(nn.LayerNorm, eps=1e-6)
        pixels = patch_size**2
        self.embed = nn.Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.blocks = nn.Sequential(
            *(Block(width, heads, mlp_ratio, qkv_bias=True, norm_layer=norm) for _ in range(depth))
        )
        self.norm = norm(width)
        if self.groups is None:
            self.pred: nn.Module = nn.Linear(width, pixels * in_chans)
            position_width = width
        else:
            self.pred = nn.ModuleList(nn.Linear(width, pixels * len(group)) for group in self.groups)
            position_width = width - channel_width
            channels = sincos_1d(channel_width, torch.arange(len(self.groups) + 1)).unsqueeze(0)
            self.channel_embed = nn.Parameter(channels.to(torch.get_default_dtype()), requires_grad=False)
        self.pos_embed = nn.Parameter(sincos_2d(position_width, grid, prefix_tokens=1), requires_grad=False)
        initialize_linears(self)
        nn.init.normal_(self.mask_token, std=0.02)

    @property
    def channel_order(self) -> tuple[int, ...]:
        """Input position of each predicted band: predictions run group by group."""
        if self.groups is None:
            return tuple(range(self.in_chans))
        return tuple(band for group in self.groups for band in group)

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """Number of bands in each channel group."""
        return (self.in_chans,) if self.groups is None else tuple(len(group) for group in self.groups)

    def encodings(self) -> Tensor:
        """The encoding of the class token and of every patch token, (1, 1 + N, W)."""
        if self.groups is None:
            return self.pos_embed
        num_groups = len(self.groups)
        position = self.pos_embed[:, 1:].unsqueeze(1).expand(-1, num_groups, -1, -1)
        channel = self.channel_embed[:, :num_groups].unsqueeze(2).expand(-1, -1, self.positions, -1)
        tokens = torch.cat([position, channel], dim=-1).flatten(1, 2)
        # The class token takes the channel row behind the last group.
        prefix = torch.cat([self.pos_embed[:, :1], self.channel_embed[:, num_groups:]], dim=-1)
        return torch.cat([prefix, tokens], dim=1)

    def forward(self, latent: Tensor, keep: Tensor) -> Tensor:
        """Predict every patch.

        Args:
            latent: (B, 1 + K, encoder width), class token first.
            keep: (B, K), which token each of the K visible ones is.

        Returns:
            (B, C, L, P * P): channels in ``channel_order``, pixels row by row.
        """
        x = self.embed(latent)
        visible = x[:, 1:]
        encodings = self.encodings()
        tokens = self.mask_token.to(x.dtype).expand(len(x), encodings.shape[1] - 1, -1)
        tokens = tokens.scatter(1, keep.unsqueeze(-1).expand_as(visible), visible)
        x = torch.cat([x[:, :1], tokens], dim=1) + encodings
        return self._pixels(self.norm(self.blocks(x))[:, 1:])

    def _pixels(self, tokens: Tensor) -> Tensor:
        if isinstance(self.pred, nn.ModuleList):
            grouped = tokens.unflatten(1, (-1, self.positions)).unbind(1)
            # Within a group pixels run channel by channel.
            predictions = [
                head(x).unflatten(-1, (-1, self.patch_size**2)).transpose(1, 2)
                for head, x in zip(self.pred, grouped, strict=True)
            ]
            return torch.cat(predictions, dim=1)
        # Meta's decoder predicts pixel by pixel, channels last.
        return self.pred(tokens).unflatten(-1, (self.patch_size**2, self.in_chans)).permute(0, 3, 1, 2)
