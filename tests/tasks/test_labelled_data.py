"""What labelled data say: balanced weights as scikit-learn's, means of values, and what cannot work."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.utils.class_weight import compute_class_weight

from geoexplora.datamodules.fmow_rgb import FMoWRGBDataModule
from geoexplora.datamodules.fmow_sentinel import FMoWSentinelDataModule
from geoexplora.datamodules.torchgeo_source import TorchGeoDataModule
from geoexplora.datasets.sample_rgb_tree import write_fmow_rgb_tree
from geoexplora.datasets.tiles import Tile
from geoexplora.errors import ConfigError, DataError
from geoexplora.tasks import labelled_data
from geoexplora.tasks.labelled_data import look_at_labels

from ..datasets.torchgeo_trees import write_loveda

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


def datamodule_of(
    kind: Any, targets: Any, listed: bool = False, classes: Any = CLASSES, ignore: int | None = None, **splits: Any
) -> Any:
    """Val and test are as train unless they are given; None: there is no such split."""
    given = {"train": targets, "val": targets, "test": targets} | splits
    sources = {split: Source(kind, np.asarray(held), listed) for split, held in given.items() if held is not None}
    return SimpleNamespace(
        target=kind,
        classes=() if kind == "value" else classes,
        num_classes=None,
        ignore_index=ignore,
        source=lambda split: sources[split],
        eval_dataset=lambda split: sources[split],
        has_split=lambda split: split in sources,
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
        look_at_labels(options(), datamodule_of("class", [0, 1], True, val=None))


def masks_of(*values: int) -> NDArray[np.int64]:
    """A mask of each value."""
    return np.tile(np.array(values)[:, None, None], (1, 4, 4))


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only four of the images are looked at: of twelve the numbers 0, 3, 7 and 11."""
    monkeypatch.setattr(labelled_data, "MOST", 4)
    monkeypatch.setattr(labelled_data, "FEW", 4)


TWELVE = [0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 2]


@pytest.mark.usefixtures("sampled")
def test_balanced_weights_of_a_sample(caplog: pytest.LogCaptureFixture) -> None:
    """What a sample lacks may be there: it must not weigh nothing."""
    found = look_at_labels(options(class_weights="balanced"), datamodule_of("class", TWELVE))
    np.testing.assert_allclose(found.class_weights, [4 / (2 * 3), 4 / 2, 4 / 2])
    assert "no training images of lake in the 4 images looked at" in caplog.text
    assert "get the weight of the rarest one, 2" in caplog.text
    wanted = options(task="segmentation", class_weights="balanced")
    masks = masks_of(*TWELVE)
    found = look_at_labels(wanted, datamodule_of("mask", masks, ignore=1))
    np.testing.assert_allclose(found.class_weights, [4 / (2 * 3), 0, 4 / 2])
    found = look_at_labels(wanted, datamodule_of("mask", np.full_like(masks, 255), ignore=255))
    assert found.class_weights == (1, 1, 1), "nothing is known of any class"


@pytest.mark.usefixtures("sampled")
def test_a_class_that_a_sample_lacks(caplog: pytest.LogCaptureFixture) -> None:
    look_at_labels(options(task="segmentation"), datamodule_of("mask", masks_of(*TWELVE)))
    assert "no training pixels of lake in the 4 images looked at" in caplog.text
    assert "cannot be learned" not in caplog.text


@pytest.mark.parametrize(("task", "kind"), [("classification", "class"), ("segmentation", "mask")])
def test_a_few_images_that_lack_a_class_say_nothing(
    task: str, kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of many classes 64 images nearly always lack some: a warning each time would not be read any more."""
    monkeypatch.setattr(labelled_data, "FEW", 4)
    labels = np.asarray(TWELVE) if kind == "class" else masks_of(*TWELVE)
    look_at_labels(options(task=task), datamodule_of(kind, labels))
    assert not caplog.text


def test_an_ignored_class_is_not_missed(caplog: pytest.LogCaptureFixture) -> None:
    look_at_labels(options(task="segmentation"), datamodule_of("mask", masks_of(0, 1, 2), ignore=0))
    assert not caplog.text
    look_at_labels(options(task="segmentation"), datamodule_of("mask", masks_of(0, 2, 2, 0), ignore=1))
    assert not caplog.text


def test_several_labels(caplog: pytest.LogCaptureFixture) -> None:
    wanted = options(task="multilabel")
    look_at_labels(wanted, datamodule_of("multilabel", [[1, 0, 1], [0, 1, 1]]))
    assert not caplog.text, "one that all have beside others that only some have is no reason to stop"
    look_at_labels(wanted, datamodule_of("multilabel", [[1, 0, 1], [0, 0, 1]]))
    assert "no training images of lake: it cannot be learned" in caplog.text
    for same, told in (([1, 0, 1], "field, town"), ([0, 0, 0], "none")):
        with pytest.raises(DataError, match=f"all training images have the same labels: {told}"):
            look_at_labels(wanted, datamodule_of("multilabel", [same, same]))
    look_at_labels(wanted, datamodule_of("multilabel", [[1, 0, 1], [0, 1, 0]], val=[[0, 1, 0], [0, 1, 0]]))
    assert "all validation images have the same labels: lake: their scores say little" in caplog.text


@pytest.mark.usefixtures("sampled")
def test_several_labels_of_a_sample(caplog: pytest.LogCaptureFixture) -> None:
    labels = np.zeros((12, 3), dtype=np.int64)
    labels[0, 0] = labels[5, 1] = labels[11, 2] = 1
    look_at_labels(options(task="multilabel"), datamodule_of("multilabel", labels))
    assert "no training images of lake in the 4 images looked at" in caplog.text
    look_at_labels(options(task="multilabel"), datamodule_of("multilabel", np.roll(labels, 5, axis=0)))
    assert "all training images of the 4 images looked at have the same labels: none" in caplog.text


def test_validation_masks_of_nothing_but_the_ignored_value() -> None:
    data = datamodule_of("mask", masks_of(0, 1), ignore=255, val=masks_of(255, 255))
    with pytest.raises(DataError, match="all validation pixels are of no class, only of the ignored value") as problem:
        look_at_labels(options(task="segmentation"), data)
    assert "--ignore-index" in str(problem.value)


@pytest.mark.usefixtures("sampled")
def test_a_sample_of_validation_masks(caplog: pytest.LogCaptureFixture) -> None:
    data = datamodule_of("mask", masks_of(0, 1), ignore=255, val=masks_of(*[255] * 5, 0, *[255] * 6))
    look_at_labels(options(task="segmentation"), data)
    assert "all validation pixels of the 4 images looked at are of no class" in caplog.text


@pytest.mark.parametrize("split", ["train", "val", "test"])
@pytest.mark.parametrize("value", [3, 255])
def test_masks_without_names_of_classes(split: str, value: int) -> None:
    masks = masks_of(0, 1, 2, value)
    data = datamodule_of("mask", masks_of(0, 1, 2), classes=(), **{split: masks})
    for split_of in ("train", "val", "test"):
        data.source(split_of).classes = ()
    with pytest.raises(DataError, match=rf"tile_3\.tif has the value {value} in its mask, which is none of the 3"):
        look_at_labels(options(task="segmentation", num_classes=3), data)
    data.ignore_index = value
    assert look_at_labels(options(task="segmentation", num_classes=3), data).classes[2] == "class 2"


def test_the_test_split_is_looked_at() -> None:
    assert look_at_labels(options(), datamodule_of("class", [0, 1], True)).tested_on == "test"
    assert look_at_labels(options(), datamodule_of("class", [0, 1], True, test=None)).tested_on == "val"
    for listed in (True, False):
        with pytest.raises(DataError, match=r"tile_1\.tif has the label 9"):
            look_at_labels(options(), datamodule_of("class", [0, 1], listed, test=[0, 9]))
    values = options(task="regression")
    assert look_at_labels(values, datamodule_of("value", [1.0, 2.0])).tested_on == "test"
    with pytest.raises(DataError, match=r"tile_1\.tif has the value nan"):
        look_at_labels(values, datamodule_of("value", [1.0, 2.0], test=[0.0, np.nan]))


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_split_with_other_targets(split: str) -> None:
    data = datamodule_of("class", [0, 1])
    data.source(split).target = "value"
    with pytest.raises(DataError, match=f"the split {split} of data has a value for each image"):
        look_at_labels(options(), data)


def test_no_labels_to_validate_by() -> None:
    data = datamodule_of("class", [0, 1])
    data.source("val").target = "none"
    with pytest.raises(DataError, match="the split val of data has no labels"):
        look_at_labels(options(), data)


def test_a_test_split_that_is_not_there_or_broken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root, wanted = write_loveda(tmp_path / "loveda"), options(task="segmentation", dataset="loveda")

    def look() -> str:
        data = TorchGeoDataModule(root, name="LoveDA", normalization="standardize", image_size=16)
        return look_at_labels(wanted, data).tested_on

    with caplog.at_level(logging.INFO, "geoexplora"):
        assert look() == "val"
    assert "the test split has no labels" in caplog.text
    for path in (root / "Test").rglob("*.png"):
        path.write_bytes(b"broken")
    with pytest.raises(DataError, match="cannot be read"):
        look()
    shutil.rmtree(root / "Test")
    assert look() == "val"
    assert "finds no LoveDA" in caplog.text
    assert "(split test): the best weights will be tested on the val split" in caplog.text


@pytest.mark.parametrize("missing", ["error", "skip"])
def test_a_test_split_that_is_announced_but_not_there(
    missing: Any, own_tree: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A csv file comes with the others; the tiles are another archive. Some that are missing are another matter."""

    def look() -> str:
        return look_at_labels(options(), FMoWSentinelDataModule(own_tree, missing=missing)).tested_on

    assert look() == "test"
    files = sorted((own_tree / "fmow-sentinel/test_gt").rglob("*.tif"))
    files[0].unlink()
    if missing == "error":
        with pytest.raises(DataError, match=rf"1 of the {len(files)} tiles that .*test_gt\.csv names are missing"):
            look()
    else:
        assert look() == "test"
    caplog.clear()
    shutil.rmtree(own_tree / "fmow-sentinel/test_gt")
    assert look() == "val"
    assert f"none of the {len(files)} tiles that {own_tree / 'test_gt.csv'} names is there" in caplog.text
    assert "the best weights will be tested on the val split" in caplog.text


@pytest.mark.parametrize("missing", ["error", "skip"])
def test_a_list_of_test_images_that_are_not_there(
    missing: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = write_fmow_rgb_tree(tmp_path / "data", (24, 40), limit=2)
    for split in ("train", "val", "test"):
        images = sorted((root / f"fmow-rgb/{split}{'_gt' if split == 'test' else ''}").rglob("*_rgb.jpg"))
        rows = [f"{path.parent.parent.name},{path.relative_to(root / 'fmow-rgb')},2016-01-01" for path in images]
        (root / f"{split}_62classes.csv").write_text("\n".join(rows) + "\n")

    def look() -> str:
        return look_at_labels(options(), FMoWRGBDataModule(root, missing=missing)).tested_on

    assert look() == "test"
    shutil.rmtree(root / "fmow-rgb/test_gt")
    assert look() == "val"
    assert "test_62classes.csv is there" in caplog.text
    assert "the best weights will be tested on the val split" in caplog.text
