"""How the tokens of a ViT become one vector for each image.

Shapes: B batch, C bands, S image side, G channel groups, L positions, D width.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

Pool = Literal["mean", "cls"]


def pool_tokens(tokens: Tensor, groups: int, pool: Pool, prefix_tokens: int = 1) -> Tensor:
    """One vector for each image.

    Args:
        tokens: (B, prefix + G * L, D), after the final norm, group by group.
        groups: G; 1 for a plain ViT.
        pool: ``mean`` of the patch tokens of each channel group, side by side; or ``cls``, the class token.
        prefix_tokens: class and register tokens in front.

    Returns:
        (B, G * D) for ``mean``, (B, D) for ``cls``.
    """
    if pool == "cls":
        return tokens[:, 0]
    return tokens[:, prefix_tokens:].unflatten(1, (groups, -1)).mean(2).flatten(1)


def normalizes_pooled(encoder: Any) -> bool:
    """Whether the encoder's norm comes after pooling (timm's ``fc_norm``), so that its tokens are not normalized."""
    return isinstance(encoder.norm, nn.Identity)


def pooled_features(encoder: Any, images: Tensor, pool: Pool) -> Tensor:
    """The features that ``--pool`` names.

    Args:
        encoder: a timm-style ViT.
        images: (B, C, S, S).
        pool: see ``pool_tokens``; the mean of an encoder that normalizes after pooling is over all groups at once.

    Returns:
        (B, G * D) or (B, D).
    """
    tokens = encoder.forward_features(images)
    if pool == "mean" and normalizes_pooled(encoder):
        return encoder.forward_head(tokens, pre_logits=True)
    return pool_tokens(tokens, getattr(encoder, "num_groups", 1), pool, encoder.num_prefix_tokens)
