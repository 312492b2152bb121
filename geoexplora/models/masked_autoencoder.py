"""A masked autoencoder over any timm-style ViT: only visible tokens go through the encoder (He et al. 2022).

Shapes: B batch, C bands, H W image, P patch, L positions, N tokens (N = G * L with G channel groups), K visible
tokens, D encoder width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from geoexplora.models.decoder import MAEDecoder


class MAEOutput(NamedTuple):
    """What a masked autoencoder computes.

    Attributes:
        pred: (B, C, L, P * P), channels in the decoder's ``channel_order``.
        latent: (B, 1 + K, D), the encoder's output, class token first.
    """

    pred: Tensor
    latent: Tensor


class MaskedAutoencoder(nn.Module):
    """Encoder and decoder of a masked autoencoder.

    Args:
        encoder: a timm-style ViT with one class token, plain or group-channel.
        decoder: predicts all patches from the visible tokens.

    Raises:
        ValueError: if the encoder has other prefix tokens than one class token.
    """

    def __init__(self, encoder: Any, decoder: MAEDecoder) -> None:
        super().__init__()
        if encoder.num_prefix_tokens != 1:
            raise ValueError(f"needs one class token, this one has {encoder.num_prefix_tokens} prefix tokens")
        self.encoder = encoder
        self.decoder = decoder

    def encode(self, images: Tensor, keep: Tensor) -> Tensor:
        """Encode the visible tokens.

        Args:
            images: (B, C, H, W).
            keep: (B, K), indices of the visible tokens among N.

        Returns:
            (B, 1 + K, D), normalized, class token first.
        """
        encoder = self.encoder
        tokens = encoder._pos_embed(encoder.patch_embed(images))
        visible = tokens[:, 1:].gather(1, keep.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
        x = encoder.norm_pre(torch.cat([tokens[:, :1], visible], dim=1))
        if encoder.grad_checkpointing and self.training:
            for block in encoder.blocks:
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
        else:
            x = encoder.blocks(x)
        return encoder.norm(x)

    def forward(self, images: Tensor, keep: Tensor) -> MAEOutput:
        """Encode the visible tokens and predict every patch.

        Args:
            images: (B, C, H, W).
            keep: (B, K), indices of the visible tokens among N.
        """
        latent = self.encode(images, keep)
        return MAEOutput(self.decoder(latent, keep), latent)
