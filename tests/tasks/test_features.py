"""Pooling, health, classifiers and folds."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch

from geoexplora.errors import DataError
from geoexplora.models.pooling import pool_tokens
from geoexplora.tasks.classifiers import few_shot, knn_classifier, leave_locations_out, linear_classifier, score
from geoexplora.tasks.features import extract_features, feature_health


def test_pooling():
    tokens = torch.arange(2 * 7 * 3).float().view(2, 7, 3)
    assert pool_tokens(tokens, 2, "cls").equal(tokens[:, 0])
    mean = pool_tokens(tokens, 2, "mean")
    assert mean.shape == (2, 6)
    torch.testing.assert_close(mean[:, :3], tokens[:, 1:4].mean(1))
    torch.testing.assert_close(mean[:, 3:], tokens[:, 4:].mean(1))


def test_health():
    torch.manual_seed(0)
    spread = feature_health(torch.randn(64, 32))
    assert spread["feature_std"] == pytest.approx(1, abs=0.1)
    assert 25 < spread["feature_rank"] <= 32
    collapsed = feature_health(torch.ones(64, 32) + 1e-6 * torch.randn(64, 32))
    assert collapsed["feature_std"] < 1e-3
    line = feature_health(torch.randn(64, 1) * torch.randn(1, 32))
    assert line["feature_rank"] == pytest.approx(1, abs=0.05)
    assert feature_health(torch.zeros(4, 8))["feature_std"] == 0


def test_features_leave_out_unreadable_images_and_put_the_mode_back():
    encoder = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=0).train()
    batch = {
        "image": torch.rand(3, 3, 32, 32),
        "label": torch.tensor([4, 5, 6]),
        "unreadable": torch.tensor([-1, 7, -1]),
    }
    found = extract_features(encoder, [batch])
    assert found.labels.tolist() == [4, 6]
    assert found.kept.tolist() == [True, False, True]
    assert found.features.shape == (2, 192)
    assert encoder.training


def test_classifiers_tell_clusters_apart():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 20)
    centres = 5 * rng.standard_normal((3, 8))
    features = (centres[labels] + rng.standard_normal((60, 8))).astype(np.float32)
    order = rng.permutation(60)
    folds = [(order[:40], order[40:])]
    for classifier in (knn_classifier(5, 40), linear_classifier(0)):
        found = score(classifier, features, labels, folds)
        assert found.accuracy > 0.9
        assert (found.samples, found.classes) == (20, 3)
    assert score(knn_classifier(500, 40), features, labels, folds).samples == 20, "no more neighbours than samples"
    with pytest.raises(DataError, match="all of one class"):
        score(linear_classifier(0), features, np.zeros(60, dtype=np.int64), folds)


def test_locations_stay_on_one_side():
    locations = np.repeat(np.arange(25), 3)
    folds = leave_locations_out(locations)
    assert len(folds) == 10
    assert sorted(np.concatenate([test for _, test in folds])) == list(range(75))
    assert all(not set(locations[train]) & set(locations[test]) for train, test in folds)
    with pytest.raises(DataError, match="one location"):
        leave_locations_out(np.zeros(5, dtype=np.int64))


def test_few_labels_of_each_class():
    labels = np.array([0] * 10 + [1] * 3 + [2] * 7)
    ((train, test),) = few_shot([(np.arange(20), np.arange(5))], labels, 5, seed=1)
    assert np.bincount(labels[train]).tolist() == [5, 3, 5]
    assert test.tolist() == list(range(5))
