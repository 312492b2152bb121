"""Classifiers over labels and seeds, and how their results are reported."""

from __future__ import annotations

import csv
import json
import math

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import accuracy_score, balanced_accuracy_score

from geoexplora.errors import DataError
from geoexplora.tasks.probe.evaluation import LOGISTIC_LIMIT, Estimate, Evaluation, Result
from geoexplora.tasks.probe.heads import Setting
from geoexplora.tasks.probe.linear import LinearProbe
from geoexplora.tasks.probe.report import format_results, to_record, write_report
from geoexplora.tasks.probe.rows import FeatureRows

CLASSES = ("farm", "forest", "water")


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), [60, 40, 20])
    centres = 2 * rng.standard_normal((3, 8))
    features = (centres[labels] + rng.standard_normal((120, 8))).astype(np.float32)
    order = rng.permutation(120)
    return FeatureRows([features]), labels, [(order[:70], order[70:])]


def evaluation(**changes):
    settings = {
        "classes": 3,
        "columns": slice(0, 8),
        "linear": LinearProbe({"a": slice(0, 4), "b": slice(0, 8)}, 3, 20, rates=(0.01, 0.1)),
        "neighbours": (3, 10),
        "temperature": 0.07,
        "classifiers": None,
        "shots": (),
        "repeats": 1,
        "seed": 0,
        "device": torch.device("cpu"),
    }
    return Evaluation(**settings | changes)


def test_estimate():
    values = (0.5, 0.6, 0.75, 0.65)
    estimate = Estimate(values)
    low, high = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    assert estimate.mean - estimate.interval == pytest.approx(low)
    assert estimate.mean + estimate.interval == pytest.approx(high)
    assert Estimate((0.5,)).interval is None


def test_measures_equal_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    truth, predicted = rng.integers(0, 3, 50), rng.integers(0, 4, 50)
    confusion = np.zeros((5, 5), dtype=np.int64)
    np.add.at(confusion, (truth, predicted), 1)
    result = Result("knn", None, [confusion])
    assert result.accuracy.mean == pytest.approx(accuracy_score(truth, predicted))
    with pytest.warns(UserWarning, match="y_pred contains classes"):
        expected = balanced_accuracy_score(truth, predicted)
    assert result.balanced_accuracy.mean == pytest.approx(expected)
    assert np.isnan(result.class_accuracies[3:]).all()


def test_what_depends_on_the_seed_is_repeated(data):
    results = evaluation(repeats=3).run(*data)
    assert [one.classifier for one in results] == ["knn k=3", "knn k=10", "linear", "logistic"]
    assert [len(one.confusions) for one in results] == [1, 1, 3, 1]
    few = evaluation(repeats=3, shots=(2, 5)).run(*data)
    assert [(one.labels, one.classifier) for one in few[:3]] == [(2, "knn k=3"), (2, "knn k=6"), (2, "linear")]
    assert {len(one.confusions) for one in few} == {3}
    assert all(one.confusions[0].sum() == 50 for one in few)
    again = evaluation(repeats=3, shots=(5,)).run(*data)
    assert [one.accuracy for one in again] == [one.accuracy for one in few if one.labels == 5]


def test_seeds_draw_other_labels(data):
    (result,) = evaluation(repeats=4, shots=(1,), classifiers=("logistic",)).run(*data)
    assert len(set(result.accuracy.values)) > 1
    assert result.accuracy.interval > 0


def test_one_label_a_class_leaves_none_to_choose_by(data, caplog):
    evaluation(shots=(2,), classifiers=("linear",)).run(*data)
    assert not caplog.records
    evaluation(shots=(1,), classifiers=("linear",), repeats=2).run(*data)
    assert caplog.text.count("one label a class leaves none to hold out") == 1


def test_logistic_regression_is_for_few_samples(data, monkeypatch):
    assert LOGISTIC_LIMIT == 10_000
    monkeypatch.setattr("geoexplora.tasks.probe.evaluation.LOGISTIC_LIMIT", 69)
    assert {one.classifier for one in evaluation().run(*data)} == {"knn k=3", "knn k=10", "linear"}
    assert "logistic" in {one.classifier for one in evaluation(classifiers=("logistic",)).run(*data)}
    assert "logistic" in {one.classifier for one in evaluation(shots=(3,)).run(*data)}


def test_logistic_regression_counts_the_samples_drawn(data, monkeypatch, caplog):
    """3 classes of at least 10 training samples: 6, 15 and 30 of them."""
    monkeypatch.setattr("geoexplora.tasks.probe.evaluation.LOGISTIC_LIMIT", 15)
    with caplog.at_level("INFO"):
        results = evaluation(shots=(2, 5, 10), repeats=2).run(*data)
    assert [one.labels for one in results if one.classifier == "logistic"] == [2, 5]
    assert caplog.text.count("logistic regression is left out on 30 training samples (10 a class)") == 1
    asked = evaluation(shots=(10,), classifiers=("logistic",)).run(*data)
    assert [one.labels for one in asked] == [10]


def test_numbers_of_labels_count_once_and_rise(data):
    (once,) = evaluation(shots=(5,), repeats=3, classifiers=("logistic",)).run(*data)
    results = evaluation(shots=(5, 1, 5), repeats=3, classifiers=("logistic",)).run(*data)
    assert [one.labels for one in results] == [1, 5]
    assert results[1].accuracy == once.accuracy


def test_one_class_to_learn_is_refused(data):
    features, labels, folds = data
    only = folds[0][0][labels[folds[0][0]] == 1]
    with pytest.raises(DataError, match="the training samples are all of one class"):
        evaluation().run(features, labels, [(only, folds[0][1])])


def results():
    first, second = np.array([[8, 2, 0], [1, 9, 0], [0, 0, 0]]), np.array([[9, 1, 0], [1, 9, 0], [0, 0, 0]])
    small, large = Setting("cls-1", 0.001), Setting("cls-4+mean", 0.1)
    tables = [{small: 0.5, large: None}, {small: 0.7, large: 0.9}]
    return [
        Result("knn k=10", None, [first]),
        Result("linear", None, [first, second], [small, small, large], tables),
        Result("knn k=10", 5, [first, second]),
    ]


def test_the_table():
    lines = format_results(results(), "held-out").splitlines()
    interval = Estimate((0.85, 0.9)).interval
    assert lines[0].split() == ["labels", "classifier", "accuracy", "balanced", "accuracy", "setting"]
    assert lines[1].split() == ["all", "knn", "k=10", "0.8500", "0.8500"]
    assert f"all        linear      0.8750 ± {interval:.4f}  0.8750 ± {interval:.4f}    cls-1, rate 0.001" in lines[2]
    assert lines[2].endswith("(1 other chosen, too)")
    assert lines[3].startswith("5 a class ")
    assert lines[4] == (
        "20 test samples, 2 classes; ± is the 95 % confidence interval of the mean over 2 seeds;"
        " setting chosen on held-out training samples"
    )
    assert "chosen on the test samples" in format_results(results(), "test")
    starts = {line.index("0.8") for line in lines[1:4]}
    assert len(starts) == 1, "aligned"


def test_the_record():
    record = json.loads(json.dumps(to_record(results(), CLASSES), allow_nan=False))
    linear = record["results"][1]
    assert linear["accuracy"]["values"] == [0.85, 0.9]
    assert linear["chosen"][2] == {"features": "cls-4+mean", "rate": 0.1}
    assert linear["class_accuracies"] == {"farm": 0.85, "forest": 0.9, "water": None}
    assert linear["confusion"][0] == [17, 3, 0]
    settings = {one["features"]: one["accuracy"] for one in record["linear_settings"]}
    assert settings == {"cls-1": pytest.approx(0.6), "cls-4+mean": None}


@pytest.mark.parametrize(("amounts", "shown"), [((10, 5, 1), "10 labels a class"), ((None, 5), "linear: accuracy")])
def test_the_picture_is_of_the_most_labels(tmp_path, monkeypatch, amounts, shown):
    titles = []
    monkeypatch.setattr("geoexplora.tasks.probe.report.plot_confusion", lambda *words: titles.append(words[-1]))
    write_report(tmp_path, [Result("linear", labels, [np.eye(3, dtype=int)]) for labels in amounts], CLASSES, {})
    (title,) = titles
    assert shown in title


def test_the_report(tmp_path):
    write_report(tmp_path, results(), CLASSES, {"pool": "cls"})
    assert json.loads((tmp_path / "probe.json").read_text())["settings"] == {"pool": "cls"}
    with (tmp_path / "per_class.csv").open() as stream:
        rows = list(csv.reader(stream))
    assert rows[0] == ["class", "test samples", "knn k=10", "linear", "knn k=10 5 labels"]
    assert rows[1] == ["farm", "10", "0.8000", "0.8500", "0.8500"]
    assert rows[3] == ["water", "0", "", "", ""]
    assert (tmp_path / "confusion.png").stat().st_size > 1000
    assert math.isnan(results()[0].class_accuracies[2])
