"""A masked autoencoder over any timm-style ViT: only visible tokens go through the encoder (He et al. 2022).

Shapes: B batch, C bands, H W image, P patch, L positions, N tokens (N = G * L with G channel groups), K visible
tokens, D encoder width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from geoexplora.models.decoder import MAEDecoder
from geoexplora.models.encoding import embed, transform


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
        encoder: a timm-style ViT with a class token, plain or group-channel; register tokens behind it are not decoded.
        decoder: predicts all patches from the visible tokens.

    Raises:
        ValueError: if the encoder has no class token.
    """

    def __init__(self, encoder: Any, decoder: MAEDecoder) -> None:
        super().__init__()
        if not encoder.has_class_token:
            raise ValueError("needs an encoder with a class token")
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
        prefix: int = encoder.num_prefix_tokens
        tokens = embed(encoder, images)
        visible = tokens[:, prefix:].gather(1, keep.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
        x = transform(encoder, torch.cat([tokens[:, :prefix], visible], dim=1))
        return x if prefix == 1 else torch.cat([x[:, :1], x[:, prefix:]], dim=1)

    def forward(self, images: Tensor, keep: Tensor) -> MAEOutput:
        """Encode the visible tokens and predict every patch.

        Args:
            images: (B, C, H, W).
            keep: (B, K), indices of the visible tokens among N.
        """
        latent = self.encode(images, keep)
        return MAEOutput(self.decoder(latent, keep), latent)
