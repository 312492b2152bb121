"""Features of a frozen encoder, and what their spread says of its health.

Shapes: B batch, N images, C bands, S image side, G channel groups, L positions, D width, n blocks, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from geoexplora.models.pooling import Pool, normalizes_pooled, pooled_features


@dataclass(frozen=True)
class ProbeFeatures:
    """All that a probe looks at, side by side: class tokens of the last blocks, then the mean patch token.

    The order makes every set of features that the probe learns from a range of neighbouring columns.

    Attributes:
        width: D.
        blocks: n, of how many last blocks the class token is taken.
        mean_width: columns of the mean patch token: G * D, or D where the norm comes after pooling.
    """

    width: int
    blocks: int
    mean_width: int

    @classmethod
    def of(cls, encoder: Any, blocks: int = 4) -> ProbeFeatures:
        """Those of an encoder; of a shallow one, all its blocks."""
        groups = 1 if normalizes_pooled(encoder) else getattr(encoder, "num_groups", 1)
        return cls(encoder.embed_dim, min(blocks, len(encoder.blocks)), groups * encoder.embed_dim)

    @property
    def size(self) -> int:
        """Number F of columns."""
        return self.blocks * self.width + self.mean_width

    def columns(self, pool: Pool) -> slice:
        """Where the features lie that ``--pool`` names."""
        end = self.blocks * self.width
        return slice(end, self.size) if pool == "mean" else slice(end - self.width, end)

    def sets(self) -> dict[str, slice]:
        """The sets of features of DINOv2's linear probe, and the mean patch token alone, by name."""
        end = self.blocks * self.width
        found = {"cls-1": slice(end - self.width, end), "cls-1+mean": slice(end - self.width, self.size)}
        if self.blocks > 1:
            found |= {f"cls-{self.blocks}": slice(0, end), f"cls-{self.blocks}+mean": slice(0, self.size)}
        return found | {"mean": slice(end, self.size)}

    def __call__(self, encoder: Any, images: Tensor) -> Tensor:
        """Compute them in one forward pass.

        Args:
            encoder: a timm-style ViT.
            images: (B, C, S, S).

        Returns:
            (B, F). Tokens of earlier blocks go through the final norm too (Oquab et al. 2023, DINOv2).
        """
        taken = encoder.forward_intermediates(
            images, indices=self.blocks, return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True
        )
        norm = encoder.fc_norm if normalizes_pooled(encoder) else encoder.norm
        classes = [norm(prefix[:, 0]) for _, prefix in taken]
        patches = taken[-1][0]
        if normalizes_pooled(encoder):
            mean = norm(patches.mean(1))
        else:
            mean = norm(patches).unflatten(1, (getattr(encoder, "num_groups", 1), -1)).mean(2).flatten(1)
        return torch.cat([*classes, mean], dim=1)


class FeatureBatch(NamedTuple):
    """Features of a batch's readable images.

    Attributes:
        features: (N, F), float32, on the CPU.
        labels: (N,), -1 where there are none.
        kept: (all images,), which of them were readable.
    """

    features: Tensor
    labels: Tensor
    kept: Tensor


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


def read_features(
    encode: Callable[[Tensor], Tensor],
    batches: Iterable[dict[str, Tensor]],
    device: torch.device | str = "cpu",
    check: Callable[[dict[str, Tensor]], None] | None = None,
) -> Iterator[FeatureBatch]:
    """Compute features batch by batch.

    Args:
        encode: (B, C, S, S) to (B, F), on the device.
        batches: dictionaries with ``image`` (B, C, S, S) and, where there are labels, ``label`` (B,).
        device: where to compute.
        check: called with every batch first, such as the datamodule's ``check_unreadable``.

    Yields:
        The features of each batch.
    """
    for batch in batches:
        if check is not None:
            check(batch)
        images = batch["image"]
        kept = batch.get("unreadable", torch.full((len(images),), -1)) < 0
        with torch.inference_mode():
            features = encode(images[kept].to(device, non_blocking=True)).float().cpu()
        yield FeatureBatch(features, batch.get("label", torch.full((len(images),), -1))[kept], kept)


def extract_features(
    encoder: Any,
    batches: Iterable[dict[str, Tensor]],
    pool: Pool = "mean",
    device: torch.device | str = "cpu",
    autocast: torch.dtype | None = None,
    check: Callable[[dict[str, Tensor]], None] | None = None,
) -> LabelledFeatures:
    """Pooled features of so few images that they fit in memory, as an encoder is amid its training.

    Args:
        encoder: a timm-style ViT.
        batches: see ``read_features``.
        pool: see ``pool_tokens``.
        device: where the encoder is.
        autocast: compute in this type where safe.
        check: see ``read_features``.

    Returns:
        Features and labels of the readable images; labels are -1 where there are none.
    """
    encode = partial(pooled_features, encoder, pool=pool)
    with evaluating(encoder), torch.autocast(torch.device(device).type, autocast, enabled=autocast is not None):
        found = list(read_features(encode, batches, device, check))
    features, labels, kept = (torch.cat(part).numpy() for part in zip(*found, strict=True))
    return LabelledFeatures(features, labels, kept)


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
