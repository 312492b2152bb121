"""One vector of outputs for each image: pooled tokens of a ViT and a linear head.

Shapes: B batch, C bands, S image side, G channel groups, D width, F pooled width, K outputs.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from geoexplora.models.pooling import normalizes_pooled, pool_tokens

Pooling = Literal["cls", "mean", "cls+mean"]


class PooledClassifier(nn.Module):
    """A linear layer on a ViT's pooled tokens.

    Args:
        encoder: a timm-style ViT, plain or group-channel.
        num_outputs: K.
        pool: the class token (F = D), the mean of the patch tokens of each channel group side by side (F = G * D), or
            both (F = D + G * D), as in DINOv2's linear evaluation.
    """

    def __init__(self, encoder: Any, num_outputs: int, pool: Pooling = "mean") -> None:
        super().__init__()
        self.encoder = encoder
        self.pool = pool
        self.num_groups: int = getattr(encoder, "num_groups", 1)
        groups = 1 if normalizes_pooled(encoder) else self.num_groups
        width = encoder.embed_dim * {"cls": 1, "mean": groups, "cls+mean": 1 + groups}[pool]
        self.head = nn.Linear(width, num_outputs)
        nn.init.trunc_normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def features(self, images: Tensor) -> Tensor:
        """Pooled tokens; without gradients where the whole encoder is frozen.

        Args:
            images: (B, C, S, S), normalized.

        Returns:
            (B, F).
        """
        trains = any(parameter.requires_grad for parameter in self.encoder.parameters())
        with torch.set_grad_enabled(trains and torch.is_grad_enabled()):
            tokens = self.encoder.forward_features(images)
            # timm's two norms are one and the identity; the second comes after pooling.
            parts = [self.encoder.fc_norm(tokens[:, 0])] if self.pool != "mean" else []
            if self.pool != "cls":
                parts.append(self._mean(tokens))
            return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]

    def _mean(self, tokens: Tensor) -> Tensor:
        if normalizes_pooled(self.encoder):
            return self.encoder.forward_head(tokens, pre_logits=True)
        return pool_tokens(tokens, self.num_groups, "mean", self.encoder.num_prefix_tokens)

    def forward(self, images: Tensor) -> Tensor:
        """Outputs, before any softmax.

        Args:
            images: (B, C, S, S), normalized.

        Returns:
            (B, K).
        """
        return self.head(self.features(images))
