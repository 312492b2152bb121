"""Which classifiers are tried on which labels, how often, and what came of it.

Shapes: N samples, M test samples, K classes.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from sklearn.metrics import confusion_matrix
from threadpoolctl import threadpool_limits

from geoexplora.tasks.classifiers import Folds, count_classes, few_shot, linear_classifier
from geoexplora.tasks.probe.heads import Setting
from geoexplora.tasks.probe.knn import knn_predict, usable_neighbours
from geoexplora.tasks.probe.linear import LinearProbe
from geoexplora.tasks.probe.rows import FeatureRows, Index, chunks

log = logging.getLogger(__name__)

Classifier = Literal["knn", "linear", "logistic"]

LOGISTIC_LIMIT = 10_000
"""Logistic regression is tried unasked up to so many training samples: it holds their features in memory."""

_ROWS = 4096
"""Rows classified at once."""


@dataclass(frozen=True)
class Estimate:
    """A measure over seeds.

    Attributes:
        values: one for each seed.
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean over the seeds."""
        return float(np.mean(self.values))

    @property
    def interval(self) -> float | None:
        """Half the width of the 95 % confidence interval of the mean (Student's t); None for one value."""
        count = len(self.values)
        if count < 2:
            return None
        return float(stats.t.ppf(0.975, count - 1) * np.std(self.values, ddof=1) / count**0.5)


@dataclass
class Result:
    """What one classifier reached with so many labels.

    Attributes:
        classifier: its name.
        labels: training samples of each class; None: all.
        confusions: (K, K) for each seed that it depends on: test samples by true and predicted class.
        chosen: settings of the linear probe, for each seed and fold.
        tables: accuracies of all its settings where they were chosen, for each seed.
    """

    classifier: str
    labels: int | None
    confusions: list[NDArray[np.int64]] = field(default_factory=list)
    chosen: list[Setting] = field(default_factory=list)
    tables: list[dict[Setting, float | None]] = field(default_factory=list)

    @property
    def accuracy(self) -> Estimate:
        """Share of test samples classified right."""
        return Estimate(tuple(float(np.trace(one) / one.sum()) for one in self.confusions))

    @property
    def balanced_accuracy(self) -> Estimate:
        """Mean over the classes of the share classified right."""
        return Estimate(tuple(float(np.nanmean(_recalls(one))) for one in self.confusions))

    @cached_property
    def confusion(self) -> NDArray[np.int64]:
        """(K, K), summed over seeds."""
        return np.sum(self.confusions, axis=0)

    @property
    def class_accuracies(self) -> NDArray[np.float64]:
        """(K,) share of each class's test samples classified right, over all seeds; NaN without any."""
        return _recalls(self.confusion)

    @property
    def usual_setting(self) -> Setting | None:
        """The setting that was chosen most often, of the linear probe."""
        return Counter(self.chosen).most_common(1)[0][0] if self.chosen else None


def _recalls(confusion: NDArray[np.int64]) -> NDArray[np.float64]:
    with np.errstate(invalid="ignore"):
        return np.diag(confusion) / confusion.sum(1)


@dataclass(frozen=True)
class Evaluation:
    """The classifiers to try.

    Attributes:
        classes: number K of classes.
        columns: features of ``knn`` and ``logistic``.
        linear: the linear probe.
        neighbours: numbers k of neighbours.
        temperature: of the neighbours' votes.
        classifiers: which to try; None: all, ``logistic`` on up to 10,000 training samples.
        shots: training samples of each class, for one table each, in rising order; empty: all.
        repeats: number of seeds.
        seed: the first seed.
        device: where to compute.
    """

    classes: int
    columns: slice
    linear: LinearProbe
    neighbours: Sequence[int]
    temperature: float
    classifiers: Sequence[Classifier] | None
    shots: Sequence[int]
    repeats: int
    seed: int
    device: torch.device

    def run(self, features: FeatureRows, labels: Index, folds: Folds) -> list[Result]:
        """Try all on the same folds.

        Args:
            features: (N, F).
            labels: (N,).
            folds: pairs of rows to train and to test on.

        Raises:
            DataError: if there is only one class to learn.
        """
        truth = labels[np.concatenate([test for _, test in folds])]
        results: dict[tuple[int | None, str], Result] = {}

        def add(name: str, predicted: Index) -> Result:
            result = results.setdefault((shots, name), Result(name, shots))
            result.confusions.append(confusion_matrix(truth, predicted, labels=range(self.classes)))
            return result

        if 1 in self.shots and "linear" in self._wanted and self.linear.select == "held-out":
            log.warning(
                "one label a class leaves none to hold out: the linear probe's setting is chosen on what it learns"
            )
        for shots in sorted(set(self.shots)) or (None,):
            for seed in range(self.seed, self.seed + self.repeats):
                drawn = folds if shots is None else list(few_shot(folds, labels, shots, seed))
                count_classes(labels, drawn)
                first = seed == self.seed
                depends = shots is not None or first  # on the seed: the labels drawn
                if "knn" in self._wanted and depends:
                    for k, predicted in self._knn(features, labels, drawn):
                        add(f"knn k={k}", predicted)
                if "linear" in self._wanted:
                    found = self.linear(features, labels, drawn, seed)
                    result = add("linear", found.predicted)
                    result.chosen += found.chosen
                    result.tables.append(found.table)
                if "logistic" in self._wanted and depends and self._logistic_fits(shots, drawn, say=first):
                    add("logistic", self._logistic(features, labels, drawn))
        return list(results.values())

    @property
    def _wanted(self) -> Sequence[Classifier]:
        return ("knn", "linear", "logistic") if self.classifiers is None else self.classifiers

    def _logistic_fits(self, shots: int | None, folds: Folds, *, say: bool) -> bool:
        """Whether logistic regression was asked for, or has few enough training samples; says where not."""
        largest = max(len(train) for train, _ in folds)
        if self.classifiers is not None or largest <= LOGISTIC_LIMIT:
            return True
        if say:
            log.info(
                "logistic regression is left out on %d training samples%s; ask for it by --classifiers logistic",
                largest,
                "" if shots is None else f" ({shots} a class)",
            )
        return False

    def _knn(self, features: FeatureRows, labels: Index, folds: Folds) -> Iterator[tuple[int, Index]]:
        """Each k with the classes (M,) it predicts."""
        usable = usable_neighbours(self.neighbours, min(len(train) for train, _ in folds))
        predicted = [
            knn_predict(
                features, labels, train, test, usable, self.classes,
                columns=self.columns, temperature=self.temperature, device=self.device,
            )
            for train, test in folds
        ]  # fmt: skip
        yield from zip(usable, np.concatenate(predicted, axis=1), strict=True)

    def _logistic(self, features: FeatureRows, labels: Index, folds: Folds) -> Index:
        """Predicted classes (M,)."""
        predicted = []
        for train, test in folds:
            model = linear_classifier(self.seed)
            with threadpool_limits(limits=1):  # on matrices this small threads cost more than they give
                model.fit(self._array(features, train), labels[train])
                predicted += [model.predict(self._array(features, part)) for part in chunks(test, _ROWS)]
        return np.concatenate(predicted)

    def _array(self, features: FeatureRows, rows: Index) -> NDArray[np.float32]:
        return features.read(rows, self.columns).float().numpy()
