"""Which splits are read, and which labels are refused."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from geoexplora.errors import DataError
from geoexplora.tasks.probe.probing import _class_names, _labelled_splits


class Data:
    """A datamodule whose splits have these labels; None: images alone."""

    classes = ("farm", "water")

    def __init__(self, **splits):
        self.splits = splits

    def has_split(self, split):
        return split in self.splits

    def source(self, split):
        return SimpleNamespace(target="none" if self.splits[split] is None else "class")

    def eval_dataset(self, split):
        return SimpleNamespace(labels=np.array(self.splits[split]))


def options(**changes):
    return SimpleNamespace(**{"holdout": "split", "test_split": "val", "dataset": "some"} | changes)


def test_splits_by_location_leave_out_those_without_labels():
    data = Data(train=[0, 1], val=[1, 0], test=None)
    assert _labelled_splits(options(holdout="location"), data) == ["train", "val"]
    assert _labelled_splits(options(), data) == ["train", "val"]


def test_a_test_split_without_labels_is_refused():
    with pytest.raises(DataError, match="some has no labelled split test there"):
        _labelled_splits(options(test_split="test"), Data(train=[0, 1], val=[1], test=None))


@pytest.mark.parametrize("labels", [[1, 1], [-1, -1]])
def test_one_class_is_refused_as_far_as_labels_are_listed(labels):
    data = Data(train=labels, val=labels)
    if labels[0] < 0:
        assert _labelled_splits(options(), data) == ["train", "val"]
    else:
        with pytest.raises(DataError, match="all images are of one class, water"):
            _labelled_splits(options(), data)


def test_class_names():
    assert _class_names(Data(), np.array([0, 1])) == ("farm", "water")
    unnamed = Data()
    unnamed.classes = ()
    assert _class_names(unnamed, np.array([0, 3])) == ("class 0", "class 1", "class 2", "class 3")
    with pytest.raises(DataError, match="1 of 2 images have no label"):
        _class_names(Data(), np.array([0, -1]))
