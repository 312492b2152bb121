"""What labelled data say: balanced weights as scikit-learn's, means of values, and what cannot work."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from sklearn.utils.class_weight import compute_class_weight

from geoexplora.datasets.tiles import Tile
from geoexplora.errors import ConfigError, DataError
from geoexplora.tasks.labelled_data import look_at_labels

CLASSES = ("field", "lake", "town")


class Source:
    """Targets in memory."""

    def __init__(self, kind: Any, targets: Any, listed: bool = False) -> None:
        self.target, self.targets = kind, targets
        self.classes = () if kind == "value" else CLASSES
        self.labels = np.asarray(targets) if listed else np.full(len(targets), -1)

    def __len__(self) -> int:
        return len(self.targets)

    def read(self, index: int) -> Tile:
        target = self.targets[index]
        return Tile(np.zeros((1, 4, 4)), target if np.ndim(target) else target.item(), -1)

    def path(self, index: int) -> str:
        return f"tile_{index}.tif"


def datamodule_of(kind: Any, targets: Any, listed: bool = False, val: bool = True, classes: Any = CLASSES) -> Any:
    source = Source(kind, np.asarray(targets), listed)
    return SimpleNamespace(
        target=kind,
        classes=() if kind == "value" else classes,
        ignore_index=None,
        source=lambda split: source,
        eval_dataset=lambda split: source,
        has_split=lambda split: split == "train" or val,
    )


def options(**more: Any) -> Any:
    given = {"task": "classification", "dataset": "data", "num_classes": None, "class_weights": None,
             "ignore_index": None, "batch_size": 4, "seed": 0}  # fmt: skip
    return SimpleNamespace(**given | more)


@pytest.mark.parametrize("listed", [True, False])
def test_balanced_weights(listed: bool) -> None:
    labels = np.array([0] * 7 + [1] * 2 + [2])
    found = look_at_labels(options(class_weights="balanced"), datamodule_of("class", labels, listed))
    np.testing.assert_allclose(found.class_weights, compute_class_weight("balanced", classes=np.arange(3), y=labels))
    assert found.classes == CLASSES


def test_balanced_weights_of_pixels() -> None:
    rng = np.random.default_rng(0)
    masks = rng.choice([0, 1, 2, 255], (5, 4, 4), p=[0.5, 0.2, 0.1, 0.2])
    wanted = options(task="segmentation", class_weights="balanced", ignore_index=255)
    found = look_at_labels(wanted, datamodule_of("mask", masks))
    pixels = masks[masks != 255]
    np.testing.assert_allclose(found.class_weights, compute_class_weight("balanced", classes=np.arange(3), y=pixels))


def test_an_absent_class(caplog: pytest.LogCaptureFixture) -> None:
    found = look_at_labels(options(class_weights="balanced"), datamodule_of("class", [0, 0, 0, 2], True))
    assert "no training images of lake" in caplog.text
    weights = compute_class_weight("balanced", classes=np.array([0, 2]), y=np.array([0, 0, 0, 2]))
    np.testing.assert_allclose(found.class_weights, [weights[0], 0, weights[1]])
    assert all(np.isfinite(found.class_weights or ()))


def test_given_weights() -> None:
    found = look_at_labels(options(class_weights=(1.0, 2.0, 3.0)), datamodule_of("class", [0, 1, 2], True))
    assert found.class_weights == (1.0, 2.0, 3.0)
    with pytest.raises(ConfigError, match="2 numbers for 3 classes"):
        look_at_labels(options(class_weights=(1.0, 2.0)), datamodule_of("class", [0, 1, 2], True))


def test_values() -> None:
    values = np.random.default_rng(1).normal(300, 20, 50)
    found = look_at_labels(options(task="regression"), datamodule_of("value", values))
    assert found.mean == pytest.approx(values.mean())
    assert found.std == pytest.approx(values.std())
    assert found.classes == ()
    with pytest.raises(DataError, match="the same value"):
        look_at_labels(options(task="regression"), datamodule_of("value", np.ones(5)))


@pytest.mark.parametrize("listed", [True, False])
def test_one_class(listed: bool) -> None:
    with pytest.raises(DataError, match="one class, lake"):
        look_at_labels(options(class_weights="balanced"), datamodule_of("class", [1, 1, 1], listed))


def test_labels_out_of_range() -> None:
    with pytest.raises(DataError, match=r"tile_2\.tif has the label 5"):
        look_at_labels(options(), datamodule_of("class", [0, 1, 5], True))
    with pytest.raises(DataError, match=r"tile_2\.tif has the label 5"):
        look_at_labels(options(class_weights="balanced"), datamodule_of("class", [0, 1, 5]))


def test_classes_without_names() -> None:
    data = datamodule_of("class", [0, 1, 2], True, classes=())
    with pytest.raises(ConfigError, match="--num-classes N"):
        look_at_labels(options(), data)
    assert look_at_labels(options(num_classes=3), data).classes == ("class 0", "class 1", "class 2")
    with pytest.raises(ConfigError, match="--num-classes 4 does not fit data, which has 3: field, lake, town"):
        look_at_labels(options(num_classes=4), datamodule_of("class", [0, 1, 2], True))


@pytest.mark.parametrize("task", ["multilabel", "segmentation", "regression"])
def test_another_kind_of_target(task: str) -> None:
    with pytest.raises(ConfigError, match="has one class for each image") as problem:
        look_at_labels(options(task=task), datamodule_of("class", [0, 1], True))
    assert "--task classification" in str(problem.value)
    with pytest.raises(ConfigError, match="has no labels"):
        look_at_labels(options(task=task), datamodule_of("none", [0, 1]))


def test_no_validation_split() -> None:
    with pytest.raises(DataError, match="no labelled split val"):
        look_at_labels(options(), datamodule_of("class", [0, 1], True, val=False))
