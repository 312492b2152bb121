"""Features of single patches as colours: what an encoder tells apart within an image.

Shapes: N images, C bands, H W size, h w patches along it, G channel groups, D width.
"""

from __future__ import annotations

from itertools import permutations
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from geoexplora.errors import RunError
from geoexplora.tasks.features import evaluating
from geoexplora.weights.atomic import atomic_path

_NOISE = 1e-12
"""Variance, as a share of the mean squared length of the features, that is no more than rounding."""
_STRETCH = (0.02, 0.98)


def patch_features(encoder: Any, images: Tensor) -> Tensor:
    """Features of each patch after the final norm; of a group-channel ViT the mean over the groups.

    Args:
        encoder: a timm-style ViT, plain or group-channel; its mode is put back afterwards.
        images: (N, C, H, W), normalized, where the encoder is.

    Returns:
        (N, h, w, D), float32, on the CPU.
    """
    grid = encoder.patch_embed.dynamic_feat_size(images.shape[-2:])
    with evaluating(encoder):
        # One of the two norms is the identity: timm's own comes before pooling, fc_norm after it.
        tokens = encoder.fc_norm(encoder.forward_features(images))[:, encoder.num_prefix_tokens :]
    return tokens.float().cpu().unflatten(1, (getattr(encoder, "num_groups", 1), *grid)).mean(1)


def principal_scores(features: Tensor) -> Tensor:
    """Scores of the first three principal components, over the patches of all images together.

    The largest loading of each component is positive, so the result is unique. Components that the features do not
    have (fewer patches or features than three, constant features), and all if a feature is not finite, are zero.

    Args:
        features: (N, h, w, D).

    Returns:
        (N, h, w, 3), float32, by falling variance.
    """
    scores = torch.zeros(*features.shape[:-1], 3)
    flat = features.flatten(0, -2).double()
    if not flat.isfinite().all():
        return scores
    centred = flat - flat.mean(0)
    variances, loadings = torch.linalg.eigh(centred.T @ centred / len(flat))  # rising
    present = int((variances[-3:] > _NOISE * flat.square().sum(1).mean()).sum())
    loadings = loadings.flip(1)[:, :present]
    largest = loadings.gather(0, loadings.abs().argmax(0, keepdim=True))
    scores[..., :present] = (centred @ (loadings * largest.sign())).unflatten(0, features.shape[:-1]).float()
    return scores


def align(after: Tensor, before: Tensor) -> Tensor:
    """Reorder and flip components so that each goes with the one before that it correlates with most.

    Of all assignments the one with the largest sum of absolute correlations is taken.

    Args:
        after: (N, h, w, 3), scores.
        before: (N, h, w, 3), scores of the same patches by another encoder.

    Returns:
        (N, h, w, 3): ``after`` with its components in the order and with the signs of ``before``.

    Raises:
        ValueError: if the shapes differ.
    """
    if after.shape != before.shape:
        raise ValueError(f"shapes differ: {tuple(after.shape)} after, {tuple(before.shape)} before")
    correlation = _standardized(before).T @ _standardized(after)
    positions = torch.arange(3)
    order = max(permutations(range(3)), key=lambda order: float(correlation[positions, list(order)].abs().sum()))
    flipped = correlation[positions, list(order)] < 0
    return after[..., list(order)] * torch.where(flipped, -1.0, 1.0)


def score_colours(scores: Tensor) -> Tensor:
    """Scale scores to colours, the 2nd percentile of each component to 0 and the 98th to 1; constant ones to grey.

    Args:
        scores: (N, h, w, 3).

    Returns:
        (N, h, w, 3) of 0-1: red, green, blue.
    """
    low, high = torch.quantile(scores.flatten(0, -2), torch.tensor(_STRETCH), dim=0)
    scaled = ((scores - low) / (high - low)).clamp(0, 1)
    return torch.where(high > low, scaled, 0.5)


def store_before(path: Path, scores: Tensor) -> None:
    """Keep the scores of the source weights' features, so that a resumed run can still compare with them.

    Args:
        path: the .npz file to write, whole or not at all.
        scores: (N, h, w, 3).

    Raises:
        RunError: if it cannot be written.
    """
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez(file, scores=scores.numpy())


def read_before(path: Path) -> Tensor | None:
    """Read what ``store_before`` wrote.

    Returns:
        (N, h, w, 3), or ``None`` if there is no such file.

    Raises:
        RunError: if it cannot be read.
    """
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            return torch.from_numpy(file["scores"])
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as problem:
        raise RunError(
            f"cannot read {path}: {problem}", "Remove it: features are then drawn without those before training."
        ) from problem


def _standardized(scores: Tensor) -> Tensor:
    """(N, h, w, 3) to (N * h * w, 3), each component centred and of length 1, or 0 where constant."""
    centred = scores.flatten(0, -2).double()
    centred = centred - centred.mean(0)
    return centred / centred.norm(dim=0).clamp_min(torch.finfo(torch.float64).tiny)
