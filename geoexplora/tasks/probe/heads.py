"""Many linear classifiers at once, on the same batches: one pass over the features trains all of them.

Heads differ in the features they see and in their learning rate. Those of one set of features are one matrix, and the
gradient of the softmax is written down, so that a step costs two matrix products for a set, whatever the rates.

Shapes: B batch, F columns, f columns of one set, K classes, r rates, H heads (sets x r), n rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from geoexplora.tasks.probe.rows import FeatureRows, Index, chunks

MOMENTUM = 0.9
REFERENCE_BATCH = 256
"""Learning rates are for so many images in a batch, and scaled linearly (Oquab et al. 2023, DINOv2)."""

_ROWS = 4096
"""Rows classified at once."""


class Setting(NamedTuple):
    """What tells one head from the others.

    Attributes:
        features: name of its set of features.
        rate: learning rate for 256 images in a batch.
    """

    features: str
    rate: float

    def __str__(self) -> str:
        return f"{self.features}, rate {self.rate:g}"


class _Stack:
    """All heads on one set of features: weights (r * K, f), biases (r * K,), and the momentum of both.

    The momentum carries the heads' own learning rates already.
    """

    def __init__(self, weight: Tensor, rates: int) -> None:
        self.weight = weight.repeat(rates, 1)
        self.bias = weight.new_zeros(len(self.weight))
        self.weight_momentum = torch.zeros_like(self.weight)
        self.bias_momentum = torch.zeros_like(self.bias)


class LinearHeads:
    """Linear classifiers, every set of features with every learning rate.

    Stochastic gradient descent with momentum 0.9 and without weight decay, the learning rate falling by a cosine to
    zero, as DINOv2's linear evaluation has it; features are taken as they are, not standardized.

    Args:
        sets: columns of each set of features.
        rates: learning rates for 256 images in a batch.
        classes: K.
        seed: of the first weights, normal with deviation 0.01; heads of one set begin alike.
        device: where to compute.
        products: type of the matrix products in training; weights, momentum and predictions are in float32.
    """

    def __init__(
        self,
        sets: Mapping[str, slice],
        rates: Sequence[float],
        classes: int,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        products: torch.dtype = torch.float32,
    ) -> None:
        self.device = torch.device(device)
        self.products = products
        self.classes = classes
        self.rates = torch.tensor(rates, dtype=torch.float32, device=self.device)
        self.settings = [Setting(name, rate) for name in sets for rate in rates]
        self.span = slice(min(part.start for part in sets.values()), max(part.stop for part in sets.values()))
        self._columns = [slice(part.start - self.span.start, part.stop - self.span.start) for part in sets.values()]
        draws = torch.Generator().manual_seed(seed)
        self._stacks = [
            _Stack(torch.randn(classes, part.stop - part.start, generator=draws).mul_(0.01).to(self.device), len(rates))
            for part in sets.values()
        ]

    @torch.inference_mode()
    def step(self, features: Tensor, labels: Tensor, share: float) -> None:
        """One step of all heads.

        Args:
            features: (B, F), of the columns of ``span``.
            labels: (B,).
            share: of the learning rates, by the schedule.
        """
        features = features.to(self.products)
        rate = share * len(labels) / REFERENCE_BATCH
        for columns, stack in zip(self._columns, self._stacks, strict=True):
            seen = features[:, columns]
            logits = torch.addmm(stack.bias.to(seen.dtype), seen, stack.weight.to(seen.dtype).T).float()
            # The gradient of the cross-entropy by the logits is softmax minus one-hot.
            error = logits.unflatten(1, (-1, self.classes)).softmax(2)
            error[torch.arange(len(labels), device=self.device), :, labels] -= 1
            error = error.mul_(self.rates[:, None] / len(labels)).flatten(1)
            if seen.dtype == stack.weight.dtype:
                stack.weight_momentum.addmm_(error.T, seen, beta=MOMENTUM)
            else:
                stack.weight_momentum.mul_(MOMENTUM).add_(error.to(seen.dtype).T @ seen)
            stack.bias_momentum.mul_(MOMENTUM).add_(error.sum(0))
            stack.weight.add_(stack.weight_momentum, alpha=-rate)
            stack.bias.add_(stack.bias_momentum, alpha=-rate)

    def fit(self, features: FeatureRows, labels: Index, train: Index, steps: int, batch_size: int, seed: int) -> None:
        """Train all heads in one pass over the features.

        Args:
            features: of all rows.
            labels: (all rows,).
            train: rows to learn from.
            steps: number of steps.
            batch_size: B; a smaller training set is one batch.
            seed: of the order.
        """
        targets = torch.from_numpy(labels)
        stream = features.stream(batch_order(train, batch_size, steps, seed), self.span, self.device)
        batches = zip(stream, batch_order(train, batch_size, steps, seed), strict=True)
        for step, (seen, rows) in enumerate(batches):
            share = (1 + math.cos(math.pi * step / steps)) / 2
            self.step(seen, targets[torch.from_numpy(rows)].to(self.device), share)

    @torch.inference_mode()
    def logits(self, features: Tensor) -> Tensor:
        """(n, H, K) from (n, F), of the columns of ``span``."""
        features = features.float()
        found = [
            torch.addmm(stack.bias, features[:, columns], stack.weight.T).unflatten(1, (-1, self.classes))
            for columns, stack in zip(self._columns, self._stacks, strict=True)
        ]
        return torch.cat(found, dim=1)

    def test(self, features: FeatureRows, labels: Index, rows: Index) -> tuple[Tensor, Tensor]:
        """Classify rows.

        Args:
            features: of all rows.
            labels: (all rows,).
            rows: (n,) which to classify.

        Returns:
            Predicted classes (H, n), and the mean cross-entropy of each head (H,); not finite for a head that diverged.
        """
        predicted, losses = [], torch.zeros(len(self.settings), dtype=torch.float64)
        targets = torch.from_numpy(labels)
        stream = features.stream(chunks(rows, _ROWS), self.span, self.device)
        for seen, part in zip(stream, chunks(rows, _ROWS), strict=True):
            logits = self.logits(seen)
            truth = targets[torch.from_numpy(part)].to(self.device)[:, None].expand(-1, logits.shape[1])
            losses += F.cross_entropy(logits.transpose(1, 2), truth, reduction="none").sum(0).double().cpu()
            predicted.append(logits.argmax(2).T.cpu())
        return torch.cat(predicted, dim=1), losses / len(rows)


def batch_order(rows: Index, batch_size: int, steps: int, seed: int) -> Iterator[Index]:
    """Batches of shuffled rows; each pass leaves out the rest that fills no batch."""
    draws = np.random.default_rng(seed)
    size = min(batch_size, len(rows))
    made = 0
    while made < steps:
        order = draws.permutation(rows)
        for start in range(0, len(rows) - size + 1, size):
            if made == steps:
                break
            made += 1
            yield np.sort(order[start : start + size])  # neighbours on disk are read together
