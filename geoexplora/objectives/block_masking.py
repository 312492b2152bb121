"""Which tokens of a global crop the student does not see: blocks of patches (BEiT, iBOT, DINOv2).

Shapes: M crops, G channel groups, h w grid of positions, N = G * h * w tokens.
"""

from __future__ import annotations

import math
from random import Random

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

LEAST = 4
"""Tokens that a block covers at least, before its sides are rounded; fewer where fewer are left to hide."""

ASPECT = (0.3, 1 / 0.3)
"""Smallest and largest ratio of a block's height to its width."""

ATTEMPTS = 10
"""Blocks that are tried in a row before a mask is left as it is."""


def block_masks(
    crops: int,
    grid: tuple[int, int],
    groups: int,
    probability: float,
    ratio: tuple[float, float],
    random: Random,
) -> Tensor:
    """Masks for a batch of crops (Oquab et al. 2023, arXiv 2304.07193, section 4; Zhou et al. 2021, arXiv 2111.07832).

    floor(probability * M) crops, chosen at random, are masked. Their shares lie evenly between the two ratios, one
    drawn from each of as many equal intervals, so that every batch hides about as many tokens as any other.

    Args:
        crops: M.
        grid: h and w.
        groups: G; with more than one, every block lies in one group, drawn for it: a hidden token's position may be
            seen in other groups, which is what relates the bands to each other.
        probability: share of crops that are masked.
        ratio: smallest and largest share of hidden tokens in a masked crop.
        random: where the numbers come from.

    Returns:
        (M, N), bool, True where hidden, group by group. May be all False: of few tokens a share can be less than one.
    """
    masks = np.zeros((crops, groups, *grid), dtype=np.bool_)
    chosen = random.sample(range(crops), math.floor(probability * crops))
    low, high = ratio
    step = (high - low) / max(1, len(chosen))
    for number, crop in enumerate(chosen):
        share = low + step * (number + random.random())
        fill_with_blocks(masks[crop], int(share * masks[crop].size), random)
    return torch.from_numpy(masks.reshape(crops, -1))


def fill_with_blocks(mask: NDArray[np.bool_], count: int, random: Random) -> None:
    """Hide up to ``count`` more tokens by blocks (Bao et al. 2021, arXiv 2106.08254, algorithm 1), in place.

    Args:
        mask: (G, h, w).
        count: tokens to hide at most; it may end a little below, where no further block fits in.
        random: where the numbers come from.
    """
    groups, height, width = mask.shape
    left = count
    while left > 0:
        for _ in range(ATTEMPTS):
            area = random.uniform(min(LEAST, left), min(left, height * width))
            aspect = math.exp(random.uniform(math.log(ASPECT[0]), math.log(ASPECT[1])))
            rows, columns = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if not (0 < rows <= height and 0 < columns <= width):
                continue
            top, across = random.randint(0, height - rows), random.randint(0, width - columns)
            block = mask[random.randrange(groups), top : top + rows, across : across + columns]
            new = block.size - int(block.sum())
            if 0 < new <= left:
                block[...] = True
                left -= new
                break
        else:
            return
