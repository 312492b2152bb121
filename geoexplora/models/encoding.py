"""The steps of a timm-style ViT between image and features, for objectives that hide or replace tokens on the way.

Shapes: B batch, C bands, H W image, N patch tokens (G * L with G channel groups), T prefix tokens, D token width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.utils.checkpoint
from timm.layers import DropPath
from torch import Tensor


def embed(encoder: Any, images: Tensor, mask: Tensor | None = None, mask_token: Tensor | None = None) -> Tensor:
    """Tokens as the first block takes them: patches embedded, encoded by position, prefix tokens in front.

    Args:
        encoder: a timm-style ViT, plain or group-channel; built with ``dynamic_img_size`` where images are of other
            sizes than its own: position encodings are then interpolated.
        images: (B, C, H, W).
        mask: (B, N), True where the mask token stands in for the patch, as in BEiT and iBOT.
        mask_token: (1, D), what stands there.

    Returns:
        (B, T + N, D).
    """
    patches = encoder.patch_embed(images)
    if mask is not None and mask_token is not None:
        patches = torch.where(mask.view(*patches.shape[:-1], 1), mask_token.to(patches.dtype), patches)
    return encoder._pos_embed(patches)


def transform(encoder: Any, tokens: Tensor) -> Tensor:
    """Tokens through all blocks and the final norm, with gradient checkpointing where the encoder asks for it.

    Args:
        encoder: a timm-style ViT.
        tokens: (B, T + any number, D).

    Returns:
        Of the same shape.
    """
    tokens = encoder.norm_pre(tokens)
    if encoder.grad_checkpointing and encoder.training:
        for block in encoder.blocks:
            tokens = torch.utils.checkpoint.checkpoint(block, tokens, use_reentrant=False)
    else:
        tokens = encoder.blocks(tokens)
    return encoder.norm(tokens)


def set_drop_path(encoder: Any, rate: float, rising: bool = False) -> None:
    """Give blocks stochastic depth, in place.

    Args:
        encoder: a timm-style ViT.
        rate: of every block, as in DINOv2's pre-training; or of the last one.
        rising: from 0 in the first block evenly to ``rate`` in the last, as in fine-tuning (timm, MAE).
    """
    last = max(1, len(encoder.blocks) - 1)
    for number, block in enumerate(encoder.blocks):
        share = rate * number / last if rising else rate
        block.drop_path1, block.drop_path2 = DropPath(share), DropPath(share)
