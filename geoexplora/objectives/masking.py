"""Which tokens a masked autoencoder sees.

Shapes: B batch, G channel groups, L positions, N = G * L tokens, K visible tokens.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class TokenMask(NamedTuple):
    """A draw of visible tokens.

    Attributes:
        keep: (B, K), indices of the visible tokens in the order in which they are encoded.
        removed: (B, G, L), 1 where a token is hidden and 0 where it is visible.
    """

    keep: Tensor
    removed: Tensor


def noise_shape(batch: int, groups: int, positions: int, spatial: bool) -> tuple[int, int]:
    """Shape of the uniform noise that ``mask_from_noise`` takes: one value a position, or one a token."""
    return (batch, positions if spatial else groups * positions)


def mask_from_noise(noise: Tensor, mask_ratio: float, groups: int, spatial: bool = False) -> TokenMask:
    """Keep the tokens of least noise (He et al. 2022, section 3; SatMAE 2022, section 3.3).

    Args:
        noise: (B, N) for independent masking of every token, (B, L) for masking whole positions.
        mask_ratio: share of tokens to hide; floor((1 - mask_ratio) N) stay visible, at least one.
        groups: G.
        spatial: hide the same positions in every group.

    Returns:
        The mask; visible tokens ascend in noise, group by group where ``spatial``.
    """
    count = noise.shape[1]
    kept = max(1, math.floor((1 - mask_ratio) * count))
    keep = noise.argsort(dim=1)[:, :kept]
    removed = torch.ones_like(noise).scatter_(1, keep, 0.0)
    if not spatial:
        return TokenMask(keep, removed.unflatten(1, (groups, -1)))
    offsets = torch.arange(groups, device=noise.device) * count
    keep = (keep.unsqueeze(1) + offsets[:, None]).flatten(1)
    return TokenMask(keep, removed.unsqueeze(1).expand(-1, groups, -1))
