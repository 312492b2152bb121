"""Weighted neighbours against lightly's and against a slow loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lightly.utils.benchmarking import knn_predict as lightly_knn
from torch.nn import functional as F

from geoexplora.tasks.probe.knn import knn_predict, usable_neighbours
from geoexplora.tasks.probe.rows import FeatureRows

CLASSES = 5


@pytest.fixture
def data():
    rng = np.random.default_rng(1)
    labels = rng.integers(0, CLASSES, 120)
    features = rng.standard_normal((120, 16)).astype(np.float32) + rng.standard_normal((CLASSES, 16))[labels]
    return features.astype(np.float32), labels, rng.permutation(120)


def slow(features, labels, train, test, k, temperature):
    """One image and one neighbour after the other."""
    answers = []
    for one in test:
        norms = np.linalg.norm(features[train], axis=1) * np.linalg.norm(features[one])
        similar = features[train] @ features[one] / norms
        votes = np.zeros(CLASSES)
        for at in np.argsort(-similar)[:k]:
            votes[labels[train[at]]] += np.exp(similar[at] / temperature)
        answers.append(votes.argmax())
    return np.array(answers)


@pytest.mark.parametrize("temperature", [0.07, 0.5])
@pytest.mark.parametrize("chunk", [(32_768, 2_048), (13, 7), (3, 100)])
def test_equals_lightly_and_a_slow_loop(data, temperature, chunk):
    features, labels, order = data
    train, test = order[:80], order[80:]
    neighbours = (1, 5, 20, 80)
    rows = FeatureRows([features[:50], features[50:]])
    got = knn_predict(rows, labels, train, test, neighbours, CLASSES, temperature=temperature, chunk=chunk)
    unit = F.normalize(torch.from_numpy(features), dim=1)
    for k, predicted in zip(neighbours, got, strict=True):
        bank, names = unit[train].T, torch.from_numpy(labels[train])
        theirs = lightly_knn(unit[test], bank, names, CLASSES, knn_k=k, knn_t=temperature)[:, 0].numpy()
        assert predicted.tolist() == theirs.tolist()
        assert predicted.tolist() == slow(features, labels, train, test, k, temperature).tolist()


def test_half_features_and_some_columns(data):
    features, labels, order = data
    train, test = order[:80], order[80:]
    wide = np.concatenate([100 * features[::-1], features], axis=1).astype(np.float16)
    got = knn_predict(FeatureRows([wide]), labels, train, test, [5], CLASSES, columns=slice(16, 32))
    expected = slow(wide[:, 16:].astype(np.float32), labels, train, test, 5, 0.07)
    assert got[0].tolist() == expected.tolist()


def test_a_low_temperature_asks_the_nearest_alone(data):
    features, labels, order = data
    train, test = order[:80], order[80:]
    rows = FeatureRows([features])
    one, all_of_them = knn_predict(rows, labels, train, test, (1, 80), CLASSES, temperature=1e-5)
    assert one.tolist() == all_of_them.tolist()


def test_no_more_neighbours_than_samples():
    assert usable_neighbours((10, 20, 100, 200), 50) == (10, 20, 50)
    assert usable_neighbours((10, 20), 3) == (3,)
