"""Classifiers on frozen features: nearest neighbours and logistic regression, with honest splits.

Shapes: N samples, F features, M test samples, c classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, balanced_accuracy_score
from sklearn.model_selection import GroupKFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from geoexplora.errors import DataError

Floats = NDArray[np.float32]
Labels = NDArray[np.int64]
Folds = list[tuple[Labels, Labels]]


@dataclass(frozen=True)
class Scores:
    """How well a classifier does.

    Attributes:
        accuracy: share of test samples classified right.
        balanced_accuracy: mean over the classes of the share classified right.
        samples: number of test samples.
        classes: number of classes in the training samples.
    """

    accuracy: float
    balanced_accuracy: float
    samples: int
    classes: int


def knn_classifier(k: int, samples: int) -> Pipeline:
    """Majority vote of the nearest neighbours on standardized features, for features of unlike scales.

    Those of one encoder are alike: ``geoexplora.tasks.probe.knn``.

    Args:
        k: neighbours; at most ``samples`` are taken.
        samples: number of training samples.
    """
    return make_pipeline(StandardScaler(), KNeighborsClassifier(min(k, samples)))


def linear_classifier(seed: int) -> Pipeline:
    """Logistic regression on standardized features, every class with the same weight."""
    return make_pipeline(
        StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=500, tol=1e-3, random_state=seed)
    )


def score(classifier: Pipeline, features: Floats, labels: Labels, folds: Folds) -> Scores:
    """Train and test a classifier on each fold, and score all test samples together.

    Args:
        classifier: fitted anew for each fold.
        features: (N, F).
        labels: (N,).
        folds: pairs of indices of training and of test samples.

    Raises:
        DataError: if training samples are of one class only.
    """
    classes = count_classes(labels, folds)
    truth, predicted = [], []
    for train, test in folds:
        with threadpool_limits(limits=1):  # on matrices this small threads cost more than they give
            classifier.fit(features[train], labels[train])
            predicted.append(classifier.predict(features[test]))
        truth.append(labels[test])
    y, z = np.concatenate(truth), np.concatenate(predicted)
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # a class without test samples counts nothing
        balanced = float(balanced_accuracy_score(y, z))
    return Scores(float(accuracy_score(y, z)), balanced, len(y), classes)


def count_classes(labels: Labels, folds: Folds) -> int:
    """Number of classes among the training samples, the most of all folds.

    Raises:
        DataError: if there is only one in a fold.
    """
    counts = [len(np.unique(labels[train])) for train, _ in folds]
    if min(counts) < 2:
        raise DataError("the training samples are all of one class", "A probe needs labels of two classes or more.")
    return max(counts)


def leave_locations_out(locations: Labels, most: int = 10) -> Folds:
    """Folds that never have one location on both sides: each location alone, or at most ``most`` sets of them.

    Args:
        locations: (N,).
        most: number of folds at most.

    Raises:
        DataError: if there is only one location.
    """
    count = len(np.unique(locations))
    if count < 2:
        raise DataError("all samples lie at one location", "Use --holdout split, or data from several locations.")
    return list(GroupKFold(min(count, most)).split(locations, groups=locations))


def few_shot(folds: Folds, labels: Labels, count: int, seed: int) -> Iterator[tuple[Labels, Labels]]:
    """The same folds with at most ``count`` training samples of each class, drawn at random."""
    rng = np.random.default_rng(seed)
    for train, test in folds:
        kept = [rng.permutation(train[labels[train] == label])[:count] for label in np.unique(labels[train])]
        yield np.concatenate(kept), test
