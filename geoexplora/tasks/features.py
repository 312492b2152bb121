"""Features of a frozen encoder, and what their spread says of its health.

Shapes: B batch, N images, C bands, S image side, G channel groups, L positions, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

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


class LabelledFeatures(NamedTuple):
    """Features of a dataset's readable images.

    Attributes:
        features: (N, F).
        labels: (N,).
        kept: (all images,), which of them were readable.
    """

    features: NDArray[np.float32]
    labels: NDArray[np.int64]
    kept: NDArray[np.bool_]


@contextmanager
def evaluating(model: nn.Module) -> Any:
    """Evaluation mode without gradients; the mode is put back afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield model
    finally:
        model.train(was_training)


def extract_features(
    encoder: Any,
    batches: Iterable[dict[str, Tensor]],
    pool: Pool = "mean",
    device: torch.device | str = "cpu",
    autocast: torch.dtype | None = None,
    check: Callable[[dict[str, Tensor]], None] | None = None,
) -> LabelledFeatures:
    """Run an encoder over batches.

    Args:
        encoder: a timm-style ViT.
        batches: dictionaries with ``image`` (B, C, S, S) and, where there are labels, ``label`` (B,).
        pool: see ``pool_tokens``.
        device: where the encoder is.
        autocast: compute in this type where safe.
        check: called with every batch first, such as the datamodule's ``check_unreadable``.

    Returns:
        Features and labels of the readable images; labels are -1 where there are none.
    """
    groups = getattr(encoder, "num_groups", 1)
    device = torch.device(device)
    features, labels, kept = [], [], []
    with evaluating(encoder), torch.autocast(device.type, autocast, enabled=autocast is not None):
        for batch in batches:
            if check is not None:
                check(batch)
            images = batch["image"]
            real = batch.get("unreadable", torch.full((len(images),), -1)) < 0
            tokens = encoder.forward_features(images[real].to(device, non_blocking=True))
            if pool == "mean" and isinstance(encoder.norm, nn.Identity):  # its norm comes after pooling
                pooled = encoder.forward_head(tokens, pre_logits=True)
            else:
                pooled = pool_tokens(tokens, groups, pool, encoder.num_prefix_tokens)
            features.append(pooled.float().cpu())
            labels.append(batch.get("label", torch.full((len(images),), -1))[real])
            kept.append(real)
    return LabelledFeatures(torch.cat(features).numpy(), torch.cat(labels).numpy(), torch.cat(kept).numpy())


def feature_health(features: Tensor) -> dict[str, float]:
    """Spread of a batch of features: both fall when features collapse.

    Args:
        features: (B, D).

    Returns:
        ``feature_std``: standard deviation over the batch of the L2-normalized features times the square root of D,
        1 for features spread evenly, 0 for collapsed ones (Chen & He 2021, section 4.1); ``feature_rank``: effective
        rank, the exponential of the entropy of the singular values of the centred features (Roy & Vetterli 2007).
    """
    features = features.float()
    std = F.normalize(features, dim=1).std(dim=0).mean() * features.shape[1] ** 0.5
    values = torch.linalg.svdvals(features - features.mean(0))
    share = values / values.sum().clamp_min(1e-12)
    entropy = -(share * share.clamp_min(1e-12).log()).sum()
    return {"feature_std": float(std), "feature_rank": float(entropy.exp())}
