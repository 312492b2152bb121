"""The linear probe of DINOv2 and ExPLoRA: many settings trained at once, one of them chosen (arXiv 2304.07193, B.3).

Shapes: M test rows, H settings.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from geoexplora.tasks.classifiers import Folds
from geoexplora.tasks.probe.heads import LinearHeads, Setting
from geoexplora.tasks.probe.rows import FeatureRows, Index

RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
"""DINOv2's learning rates for 256 images in a batch."""

BATCH_SIZE, MOST_STEPS, MOST_PASSES, LEAST_STEPS = 256, 15_000, 100, 1_000
"""The paper's 10 epochs of 1500 steps; of few data 100 passes, but no fewer steps than the rates need to get anywhere:
on the bundled sample (666 training tiles, small ViT) 260 steps reach an accuracy of 0.49, 1000 of 0.59, 2000 of 0.60;
with 1000 standardized features are no better, so that the protocol stays as it is."""

HELD_OUT = 0.1

Select = Literal["held-out", "test"]


@dataclass(frozen=True)
class LinearProbe:
    """How linear heads are trained and one of them is chosen.

    Attributes:
        sets: columns of each set of features.
        classes: number of classes.
        steps: steps of the training; None: as ``usual_steps`` says.
        select: choose the setting on a held-out tenth of the training samples and train it anew on all of them; or
            on the test samples, as papers do.
        rates: learning rates for 256 images in a batch.
        device: where to compute.
        products: type of the matrix products in training.
    """

    sets: Mapping[str, slice]
    classes: int
    steps: int | None = None
    select: Select = "held-out"
    rates: Sequence[float] = RATES
    device: torch.device | str = "cpu"
    products: torch.dtype = torch.float32

    def __call__(self, features: FeatureRows, labels: Index, folds: Folds, seed: int) -> LinearOutcome:
        """Train, choose and test on each fold.

        Args:
            features: of all rows.
            labels: (all rows,).
            folds: pairs of training and test rows.
            seed: of first weights, order, and the samples held out.
        """
        if self.select == "test":
            return self._chosen_on_test(features, labels, folds, seed)
        predicted, chosen, ranks = [], [], []
        for train, test in folds:
            fit, held = hold_out(train, labels, HELD_OUT, seed)
            ranks.append(
                _Ranking.of(*self._train(features, labels, fit, seed).test(features, labels, held), labels[held])
            )
            setting = ranks[-1].best(self._settings)
            alone = {setting.features: self.sets[setting.features]}
            best = self._train(features, labels, train, seed, alone, [setting.rate])
            predicted.append(best.test(features, labels, test)[0][0].numpy())
            chosen.append(setting)
        return LinearOutcome(np.concatenate(predicted), chosen, _mean(ranks).table(self._settings))

    def _chosen_on_test(self, features: FeatureRows, labels: Index, folds: Folds, seed: int) -> LinearOutcome:
        tested = [self._train(features, labels, train, seed).test(features, labels, test) for train, test in folds]
        sizes = torch.tensor([len(test) for _, test in folds], dtype=torch.float64)
        losses = torch.stack([loss for _, loss in tested], dim=1) @ (sizes / sizes.sum())
        predicted = torch.cat([found for found, _ in tested], dim=1)
        ranking = _Ranking.of(predicted, losses, labels[np.concatenate([test for _, test in folds])])
        best = ranking.best(self._settings)
        row = predicted[self._settings.index(best)].numpy()
        return LinearOutcome(row, [best], ranking.table(self._settings))

    @property
    def _settings(self) -> list[Setting]:
        return [Setting(name, rate) for name in self.sets for rate in self.rates]

    def _train(
        self,
        features: FeatureRows,
        labels: Index,
        rows: Index,
        seed: int,
        sets: Mapping[str, slice] | None = None,
        rates: Sequence[float] | None = None,
    ) -> LinearHeads:
        heads = LinearHeads(
            sets or self.sets, rates or self.rates, self.classes, seed=seed, device=self.device, products=self.products
        )
        steps = self.steps or usual_steps(len(rows))
        heads.fit(features, labels, rows, steps, BATCH_SIZE, seed)
        return heads


@dataclass(frozen=True)
class LinearOutcome:
    """What a linear probe found.

    Attributes:
        predicted: (M,) classes of the test rows of all folds, in order.
        chosen: the setting of each fold, or the one of all of them.
        table: accuracy of each setting where it was chosen; None for one that diverged.
    """

    predicted: NDArray[np.int64]
    chosen: list[Setting]
    table: dict[Setting, float | None]


def usual_steps(samples: int) -> int:
    """Steps of a training on so many samples: 15,000, or 100 passes if these are fewer, but at least 1,000."""
    passes = math.ceil(MOST_PASSES * samples / min(BATCH_SIZE, samples))
    return min(MOST_STEPS, max(LEAST_STEPS, passes))


def hold_out(rows: Index, labels: Index, share: float, seed: int) -> tuple[Index, Index]:
    """Part rows class by class.

    Args:
        rows: training rows.
        labels: (all rows,).
        share: of each class to hold out, at least one of two or more.
        seed: of the draw.

    Returns:
        The rows to learn from and those held out; where no class has two rows, all of them twice.
    """
    draws = np.random.default_rng(seed)
    held = []
    for label in np.unique(labels[rows]):
        members = rows[labels[rows] == label]
        count = max(1, round(share * len(members))) if len(members) > 1 else 0
        held.append(draws.permutation(members)[:count])
    out = np.sort(np.concatenate(held))
    if not len(out):
        return rows, rows
    return np.setdiff1d(rows, out), out


@dataclass(frozen=True)
class _Ranking:
    """Accuracies (H,) and losses (H,) of all settings; both NaN where a setting diverged."""

    accuracies: NDArray[np.float64]
    losses: NDArray[np.float64]

    @classmethod
    def of(cls, predicted: torch.Tensor, losses: torch.Tensor, truth: Index) -> _Ranking:
        right = (predicted == torch.from_numpy(truth)).double().mean(1)
        sound = losses.isfinite()
        return cls(right.where(sound, torch.nan).numpy(), losses.where(sound, torch.nan).numpy())

    def best(self, settings: list[Setting]) -> Setting:
        """The most accurate setting; of equal ones that of the least loss. A diverged one only if all did."""
        order = np.lexsort((np.nan_to_num(self.losses, nan=np.inf), -np.nan_to_num(self.accuracies, nan=-1.0)))
        return settings[order[0]]

    def table(self, settings: list[Setting]) -> dict[Setting, float | None]:
        values = (None if math.isnan(value) else value for value in self.accuracies.tolist())
        return dict(zip(settings, values, strict=True))


def _mean(rankings: list[_Ranking]) -> _Ranking:
    return _Ranking(
        np.mean([one.accuracies for one in rankings], axis=0), np.mean([one.losses for one in rankings], axis=0)
    )
