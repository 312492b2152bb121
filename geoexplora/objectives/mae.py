"""The masked autoencoder's objective: mean squared error on the pixels of hidden tokens.

Shapes: B batch, C bands, H W image, P patch, G channel groups, L positions, K visible tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Pairing = Literal["own", "reference"]


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut images into patches.

    Args:
        images: (B, C, H, W).
        patch_size: P.

    Returns:
        (B, C, L, P * P): positions row by row, pixels row by row.
    """
    rows = images.unflatten(-2, (-1, patch_size)).unflatten(-1, (-1, patch_size))  # B C h P w P
    return rows.transpose(3, 4).flatten(4).flatten(2, 3)


def unpatchify(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """Put patches (B, C, L, P * P) together again as images (B, C, H, W)."""
    side = round(patches.shape[-1] ** 0.5)
    return patches.unflatten(2, grid).unflatten(-1, (side, side)).transpose(3, 4).flatten(4, 5).flatten(2, 3)


def normalize_patches(patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Normalize each patch by the mean and unbiased variance of all its C * P * P values (``norm_pix_loss``).

    Args:
        patches: (B, C, L, P * P).

    Returns:
        The normalized patches, and the mean and standard deviation (B, 1, L, 1) that undo it.
    """
    variance, mean = torch.var_mean(patches, dim=(1, 3), keepdim=True)
    std = (variance + 1.0e-6).sqrt()
    return (patches - mean) / std, mean, std


def mae_loss(
    pred: Tensor,
    images: Tensor,
    removed: Tensor,
    channel_order: Sequence[int],
    group_sizes: Sequence[int],
    norm_pix: bool = True,
    pairing: Pairing = "own",
) -> Tensor:
    """Mean squared error over the hidden tokens (He et al. 2022, section 3; SatMAE 2022, section 3.3).

    Each hidden token counts the same, however many bands its group has.

    Args:
        pred: (B, C, L, P * P), channels in ``channel_order``.
        images: (B, C, H, W), bands in data order.
        removed: (B, G, L), 1 where a token is hidden.
        channel_order: band that each predicted channel stands for.
        group_sizes: number of bands of each group.
        norm_pix: compare with normalized patches.
        pairing: ``own`` compares each prediction with its own band. ``reference`` compares prediction j, in group
            order, with band j, in data order, as SatMAE's published code does: a defect, kept for exact reproduction.

    Returns:
        Scalar.
    """
    target = patchify(images, round(pred.shape[-1] ** 0.5))
    if norm_pix:
        target, _, _ = normalize_patches(target)
    sizes = torch.tensor(group_sizes, device=removed.device)
    weight = removed / sizes[:, None]
    weight = weight.repeat_interleave(sizes, dim=1, output_size=sum(group_sizes))  # B C L, in group order
    order = torch.tensor(channel_order, device=removed.device)
    if pairing == "own":
        target = target[:, order]
    else:
        weight = weight[:, order.argsort()]  # the reference also weighs pair j by the mask of band j
    error = (pred - target).square().mean(dim=-1)
    return (error * weight).sum() / removed.sum()
