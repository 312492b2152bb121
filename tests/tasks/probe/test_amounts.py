"""More labels or neighbours than there are."""

from __future__ import annotations

import numpy as np
import pytest

from geoexplora.cli.probe import ProbeOptions
from geoexplora.errors import ConfigError
from geoexplora.tasks.probe.amounts import tell_fewer_neighbours, usable_shots

NAMES = ("farm", "forest", "water")
SIZES = np.repeat([0, 1, 2], [5, 3, 1])


def test_few_labels_that_a_class_does_not_have(caplog):
    folds = [(np.arange(9), np.arange(0))]
    assert usable_shots((1,), SIZES, folds, (*NAMES, "absent")) == (1,)
    assert usable_shots((), SIZES, folds, NAMES) == ()
    assert not caplog.records
    assert usable_shots((9, 4, 1, 4), SIZES, folds, NAMES) == (1, 4)
    assert [record.getMessage() for record in caplog.records] == [
        "--few-shot 4: not balanced, as these classes have fewer training samples: forest 3, water 1",
        "--few-shot 9 is left out: no class has more than 5 training samples; without --few-shot all are learned from",
    ]


def test_few_labels_count_in_the_smallest_fold(caplog):
    folds = [(np.arange(9), np.arange(0)), (np.array([0, 1, 5, 6]), np.arange(0))]
    assert usable_shots((2, 3), SIZES, folds, NAMES) == (2, 3)
    assert "--few-shot 2: not balanced, as these classes have fewer training samples: water 0" in caplog.text
    assert "farm 2, forest 2, water 0" in caplog.text


def test_many_short_classes_are_not_all_named(caplog):
    labels = np.concatenate([np.arange(12), np.zeros(2, dtype=int)])
    usable_shots((2,), labels, [(np.arange(14), np.arange(0))], [f"c{number}" for number in range(12)])
    assert caplog.records[0].getMessage().endswith("c7 1, c8 1 and 3 more")


def test_more_labels_than_any_class_has_are_refused():
    with pytest.raises(ConfigError, match="--few-shot 6: no class has more than 5 training samples"):
        usable_shots((7, 6), SIZES, [(np.arange(9), np.arange(0))], NAMES)


def test_more_neighbours_than_samples_are_told(caplog):
    folds = [(np.arange(80), np.arange(0)), (np.arange(70), np.arange(0))]
    tell_fewer_neighbours(ProbeOptions(), folds)  # nobody asked for the usual 100 and 200
    tell_fewer_neighbours(ProbeOptions(k=(3, 70)), folds)
    tell_fewer_neighbours(ProbeOptions(k=(5000,), classifiers=("linear",)), folds)
    assert not caplog.records
    tell_fewer_neighbours(ProbeOptions(k=(3, 71, 5000)), folds)
    assert [record.getMessage() for record in caplog.records] == [
        "--k 71,5000: there are only 70 training samples, so that k is 70"
    ]
