"""Which splits are read, and which labels are refused."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from geoexplora.errors import ConfigError, DataError
from geoexplora.tasks.probe.probing import _cache_folder, _class_names, _labelled_splits


class Data:
    """A datamodule whose splits have these labels; None: images alone."""

    classes = ("farm", "water")

    def __init__(self, places=None, **splits):
        self.splits = splits
        self.places = places or {}

    def has_split(self, split):
        return split in self.splits

    def source(self, split):
        return SimpleNamespace(target="none" if self.splits[split] is None else "class")

    def eval_dataset(self, split):
        labels = np.array(self.splits[split])
        return SimpleNamespace(labels=labels, location_ids=np.array(self.places.get(split, np.arange(len(labels)))))


def options(**changes):
    return SimpleNamespace(**{"holdout": "split", "test_split": "val", "dataset": "some", "few_shot": None} | changes)


def test_splits_by_location_leave_out_those_without_labels():
    data = Data(train=[0, 1], val=[1, 0], test=None)
    assert _labelled_splits(options(holdout="location"), data) == ["train", "val"]
    assert _labelled_splits(options(), data) == ["train", "val"]


def test_a_test_split_without_labels_is_refused():
    with pytest.raises(DataError, match="some has no labelled split test there") as caught:
        _labelled_splits(options(test_split="test"), Data(train=[0, 1], val=[1], test=None))
    assert "Add it, or take --test-split val, or use --holdout location to split by place." in str(caught.value)


def test_what_cannot_be_done_is_not_advised():
    """Each remedy would only lead to the other one."""
    one_place = Data({"train": [0, 0, 0], "val": [0, 0]}, train=[0, 1, 1], val=[1, 0])
    with pytest.raises(DataError, match="all labelled images of some lie at one location") as caught:
        _labelled_splits(options(holdout="location"), one_place)
    assert "Use --holdout split --test-split val." in str(caught.value)
    del one_place.splits["val"]
    for more in ({"holdout": "location"}, {"test_split": "val"}):
        with pytest.raises(DataError, match="Add") as caught:
            _labelled_splits(options(**more), one_place)
        assert "--holdout" not in str(caught.value)


def test_a_split_that_is_announced_but_not_there_is_not_advised():
    class Announced(Data):
        def source(self, split):
            if split == "test":
                raise DataError("TorchGeo finds no test", "Add it.")
            return super().source(split)

    with pytest.raises(DataError, match="some has no labelled split val there") as caught:
        _labelled_splits(options(), Announced(train=[0, 1], test=[0, 1]))
    assert "--test-split" not in str(caught.value)


@pytest.mark.parametrize(
    ("holdout", "places", "only"),
    [("split", {}, "water"), ("location", {"train": [0, 0], "val": [0, 1]}, "farm")],
    ids=["split", "location"],
)
def test_training_samples_of_one_class_are_refused(holdout, places, only):
    """Though there are two classes in all; beside location 0 there is only one farm."""
    data = Data(places, train=[1, 1], val=[1, 0])
    with pytest.raises(DataError, match=f"all training samples are of one class, {only}"):
        _labelled_splits(options(holdout=holdout), data)


def test_features_of_random_weights_are_not_kept_in_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    assert _cache_folder(SimpleNamespace(output=None, init=None)) is None
    assert _cache_folder(SimpleNamespace(output=None, init=str(tmp_path))) == tmp_path / "features"


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


def test_more_labels_than_any_class_has_are_refused_before_features_are_computed():
    data = Data(train=[0, 1, 1], val=[0, 1, 1, 1])
    with pytest.raises(ConfigError, match="--few-shot 3: no class has more than 2 training samples"):
        _labelled_splits(options(few_shot=(3,)), data)
    assert _labelled_splits(options(few_shot=(2, 3)), data) == ["train", "val"]
