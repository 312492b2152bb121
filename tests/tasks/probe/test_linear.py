"""How a setting is chosen."""

from __future__ import annotations

import numpy as np
import pytest

from geoexplora.tasks.probe.heads import LinearHeads, Setting
from geoexplora.tasks.probe.linear import LinearProbe, hold_out, usual_steps
from geoexplora.tasks.probe.rows import FeatureRows

SETS = {"noise": slice(0, 4), "signal": slice(4, 8)}


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 40)
    noise = rng.standard_normal((120, 4))
    signal = 4 * rng.standard_normal((3, 4))[labels] + rng.standard_normal((120, 4))
    order = rng.permutation(120)
    return np.concatenate([noise, signal], axis=1).astype(np.float32), labels, [(order[:80], order[80:])]


@pytest.mark.parametrize("select", ["held-out", "test"])
def test_the_better_features_are_chosen(data, select):
    features, labels, folds = data
    found = LinearProbe(SETS, 3, 100, select, (1e-4, 0.3))(FeatureRows([features]), labels, folds, seed=0)
    assert found.chosen[0].features == "signal"
    assert (found.predicted == labels[folds[0][1]]).mean() > 0.9
    assert found.table.keys() == {Setting(name, rate) for name in SETS for rate in (1e-4, 0.3)}
    assert found.table[found.chosen[0]] == max(found.table.values())


def test_test_labels_do_not_choose(data):
    """Only with select=test does the choice depend on the labels of the test samples."""
    features, labels, folds = data
    test = folds[0][1]
    other = labels.copy()
    other[test] = np.random.default_rng(5).integers(0, 3, len(test))
    rows = FeatureRows([features])
    honest, same = (LinearProbe(SETS, 3, 30)(rows, given, folds, 0) for given in (labels, other))
    assert (honest.chosen, honest.table) == (same.chosen, same.table)
    assert honest.predicted.tolist() == same.predicted.tolist()
    told, otherwise = (LinearProbe(SETS, 3, 30, "test")(rows, given, folds, 0) for given in (labels, other))
    assert told.table != otherwise.table


def test_the_chosen_setting_is_trained_anew_on_all_training_samples(data):
    features, labels, folds = data
    train, test = folds[0]
    rows = FeatureRows([features])
    probe = LinearProbe({"signal": SETS["signal"]}, 3, 20, rates=(0.1,))
    heads = LinearHeads({"signal": SETS["signal"]}, (0.1,), 3, seed=4)
    heads.fit(rows, labels, train, 20, 256, seed=4)
    expected = heads.test(rows, labels, test)[0][0]
    assert probe(rows, labels, folds, seed=4).predicted.tolist() == expected.tolist()


@pytest.mark.parametrize("select", ["held-out", "test"])
def test_several_folds(data, select):
    features, labels, _ = data
    folds = [(np.arange(40, 120), np.arange(40)), (np.arange(80), np.arange(80, 120))]
    found = LinearProbe(SETS, 3, 20, select)(FeatureRows([features]), labels, folds, seed=0)
    assert len(found.predicted) == 80
    assert len(found.chosen) == (2 if select == "held-out" else 1)


def test_settings_that_diverge_are_not_chosen(data):
    features, labels, folds = data
    rows = FeatureRows([1e10 * features])
    found = LinearProbe(SETS, 3, 10, rates=(1e30, 1e-12))(rows, labels, folds, seed=0)
    assert found.chosen[0].rate == 1e-12
    assert found.table[Setting("signal", 1e30)] is None


def test_a_tenth_of_each_class_is_held_out():
    labels = np.array([0] * 40 + [1] * 3 + [2] * 1 + [3] * 26)
    rows = np.random.default_rng(0).permutation(70)
    fit, held = hold_out(rows, labels, 0.1, seed=1)
    assert np.bincount(labels[held], minlength=4).tolist() == [4, 1, 0, 3]
    assert sorted(np.concatenate([fit, held])) == list(range(70))
    assert held.tolist() != hold_out(rows, labels, 0.1, seed=2)[1].tolist()
    fit, held = hold_out(np.array([0, 41, 43]), labels, 0.1, seed=0)
    assert fit.tolist() == held.tolist() == [0, 41, 43]


def test_usual_steps():
    assert usual_steps(384_000) == 15_000, "the paper's"
    assert usual_steps(712_874) == 15_000
    assert usual_steps(25_600) == 10_000, "100 passes"
    assert usual_steps(666) == usual_steps(10) == 1000
