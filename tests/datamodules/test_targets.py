"""Targets on their way into batches, and those that do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from numpy.typing import NDArray
from PIL import Image

from geoexplora.bands import RGB
from geoexplora.datamodules.targets import check_target, target_title
from geoexplora.datamodules.tiles import TilesDataModule
from geoexplora.datamodules.torchgeo_source import TorchGeoDataModule
from geoexplora.datamodules.views import EvaluationView, TrainView
from geoexplora.datasets.tiles import Target, TargetKind, Tile
from geoexplora.errors import DataError
from geoexplora.transforms.crop import EvaluationCrop, TrainCrop, WholeTile
from geoexplora.transforms.normalization import Normalization

from ..datasets.torchgeo_trees import (
    TRAIN,
    VAL,
    write_bigearthnet,
    write_loveda,
    write_resisc45,
    write_tropical_cyclone,
)


class OneTile:
    """A source of one tile, or of one that stands in for it."""

    bands, sensor = RGB.band_names, RGB

    def __init__(self, kind: TargetKind, target: Target, count: int = 3, unreadable: int = -1) -> None:
        self.target: TargetKind = kind
        self.classes = tuple("abcdefgh"[:count])
        self.tile = Tile(np.arange(3 * 4 * 6, dtype=np.uint8).reshape(3, 4, 6), target, unreadable)

    def __len__(self) -> int:
        return 1

    def path(self, index: int) -> Path:
        return Path(f"tile_{index}.tif")

    def read(self, index: int) -> Tile:
        return self.tile

    def note_unreadable(self, index: int) -> None:
        raise AssertionError


def mask(*values: int, shape: tuple[int, int] = (4, 6)) -> NDArray[Any]:
    """Of these values, over and over."""
    return np.resize(np.array(values, dtype=np.int64), shape)


GOOD: list[tuple[TargetKind, Target, int, int | None]] = [
    ("none", None, 0, None),
    ("class", 0, 3, None),
    ("class", 2, 3, None),
    ("class", 99, 0, None),
    ("multilabel", np.array([0, 1, 1]), 3, None),
    ("multilabel", np.array([True, False]), 0, None),
    ("mask", mask(0, 1, 2), 3, None),
    ("mask", mask(0, 255), 3, 255),
    ("mask", mask(-1, 2), 3, -1),
    ("mask", mask(255), 3, 255),
    ("mask", mask(0, 99), 0, None),
    ("value", -3.5, 0, None),
]

BAD: list[tuple[TargetKind, Target, int, int | None, str]] = [
    ("class", 3, 3, None, "the label 3, which is none of the 3 classes 0 to 2\nCorrect its label"),
    ("class", -1, 3, None, "the label -1, which is none of the 3 classes 0 to 2"),
    ("class", -1, 0, None, "the label -1, which is no class"),
    ("class", 3, 3, 3, "the label 3, which is none of the 3 classes 0 to 2"),
    ("multilabel", np.array([0, 1]), 3, None, "a vector of 2 labels, but there are 3 classes"),
    ("multilabel", np.array([0, 1, 2]), 3, None, "the value 2 in its vector of labels, which are 0 or 1"),
    ("multilabel", np.array([0, -1]), 0, None, "the value -1 in its vector of labels"),
    ("mask", mask(0, 3), 3, None, "the value 3 in its mask, which is none of the 3 classes 0 to 2\n"),
    ("mask", mask(0, 255, 7), 3, 255, "the value 7 in its mask, which is none of the 3 classes 0 to 2\n"),
    ("mask", mask(-1), 0, None, "the value -1 in its mask, which is no class\n"),
    ("mask", mask(0, shape=(6, 4)), 3, None, "a mask of 6 x 4 pixels, but an image of 4 x 6\nCorrect or remove"),
    ("value", float("nan"), 0, None, "the value nan\nCorrect its label"),
    ("value", float("-inf"), 0, None, "the value -inf\n"),
]


@pytest.mark.parametrize(("kind", "target", "count", "ignore"), GOOD)
def test_good_targets(kind: TargetKind, target: Target, count: int, ignore: int | None) -> None:
    source = OneTile(kind, target, count)
    assert check_target(source.tile, source, 0, ignore) is target


@pytest.mark.parametrize(("kind", "target", "count", "ignore", "message"), BAD)
@pytest.mark.parametrize("unreadable", [-1, 7])
def test_bad_targets_name_the_file(
    kind: TargetKind, target: Target, count: int, ignore: int | None, message: str, unreadable: int
) -> None:
    source = OneTile(kind, target, count, unreadable)
    name = "tile_7.tif has " if unreadable < 0 else "the tile that stands in for tile_7.tif has "
    train = TrainView(source, TrainCrop(torch.clone, 8), ignore_index=ignore)
    for view in (train, EvaluationView(source, EvaluationCrop(torch.clone, 8), ignore)):
        with pytest.raises(DataError) as caught:
            view[7]
        assert str(caught.value).startswith(name + message)
    unlabelled = TrainView(source, TrainCrop(torch.clone, 8), ignore_index=ignore, unlabelled=True)
    assert unlabelled[7].keys() == {"image", "index", "unreadable"}


@pytest.mark.parametrize("told", [0, 3, 8])
def test_a_number_of_classes_that_is_settled(told: int) -> None:
    """It goes before what the source says, and stands in where the source says nothing."""
    source = OneTile("mask", mask(0, 255, 7), told)
    assert check_target(source.tile, source, 0, 255, 8) is source.tile.target
    train = TrainView(source, TrainCrop(torch.clone, 8), ignore_index=255, num_classes=7)
    for view in (train, EvaluationView(source, EvaluationCrop(torch.clone, 8), 255, num_classes=7)):
        with pytest.raises(DataError, match=r"tile_4\.tif has the value 7 in its mask, which is none of the 7 classes"):
            view[4]


@pytest.mark.parametrize(("kind", "target", "count", "ignore"), GOOD)
def test_samples(kind: TargetKind, target: Target, count: int, ignore: int | None) -> None:
    source = OneTile(kind, target, count)
    views = [
        TrainView(source, TrainCrop(torch.clone, 8), ignore_index=ignore),
        TrainView(source, WholeTile(torch.clone, 8), ignore_index=ignore),
        EvaluationView(source, EvaluationCrop(torch.clone, 8), ignore),
    ]
    extra = {"none": set(), "mask": {"mask"}}.get(kind, {"label"})
    for view, more in zip(views, (set(), {"size"}, set()), strict=True):
        sample = view[0]
        assert sample.keys() == {"image", "index", "unreadable"} | extra | more
        assert sample["image"].shape == (3, 8, 8)
        if kind == "mask":
            assert (sample["mask"].shape, sample["mask"].dtype) == ((8, 8), torch.int64)
            assert set(sample["mask"].unique().tolist()) <= set(np.unique(np.asarray(target)).tolist())
        elif kind != "none":
            assert sample["label"].dtype == (torch.float32 if kind == "value" else torch.int64)
            np.testing.assert_array_equal(sample["label"].numpy(), np.asarray(target))


def one_batch(datamodule: TilesDataModule) -> dict[str, torch.Tensor]:
    datamodule.setup("fit")
    batch: dict[str, torch.Tensor] = next(iter(datamodule.train_dataloader()))
    return batch


def test_several_labels(tmp_path: Path) -> None:
    root = write_bigearthnet(tmp_path)
    stored = Normalization("standardize", ("B2", "B3"), (2000.0, 3000.0), (100.0, 100.0))
    datamodule = TorchGeoDataModule(
        root, name="BigEarthNet", bands=("B2", "B3"), normalization=stored, image_size=16, batch_size=TRAIN
    )
    batch = one_batch(datamodule)
    assert (datamodule.target, len(datamodule.classes)) == ("multilabel", 19)
    assert (batch["label"].shape, batch["label"].dtype) == ((TRAIN, 19), torch.int64)
    assert ((batch["label"] == 0) | (batch["label"] == 1)).all()
    figure = datamodule.plot({name: value[0] for name, value in batch.items()} | {"image": torch.rand(2, 16, 16)})
    assert figure.axes[0].get_title() == target_title(batch["label"][0], datamodule.classes)
    plt.close(figure)


def test_numbers(tmp_path: Path) -> None:
    datamodule = TorchGeoDataModule(
        write_tropical_cyclone(tmp_path), name="TropicalCyclone", image_size=16, batch_size=TRAIN
    )
    batch = one_batch(datamodule)
    assert (datamodule.target, datamodule.classes) == ("value", ())
    assert batch["label"].dtype == torch.float32
    assert batch["label"].tolist() == [30.0 + 7 * index for index in batch["index"].tolist()]


def test_masks(tmp_path: Path) -> None:
    datamodule = TorchGeoDataModule(write_loveda(tmp_path), name="LoveDA", image_size=16, batch_size=TRAIN)
    batch = one_batch(datamodule)
    assert (datamodule.target, len(datamodule.classes), datamodule.ignore_index) == ("mask", 8, 0)
    assert datamodule.classes[0] == "no-data"
    assert (batch["mask"].shape, batch["mask"].dtype) == ((TRAIN, 16, 16), torch.int64)
    assert "label" not in batch
    val = next(iter(datamodule.eval_dataloader("val")))
    # The images of this tree are ten, twenty and thirty times their masks, in rectangles: far from edges that holds.
    red = datamodule.normalization.inverse(val["image"])[:, 0] / 10
    assert ((red - val["mask"]).abs() < 0.1).float().mean() > 0.5
    assert val["mask"].shape == (VAL, 16, 16)
    assert next(iter(datamodule.eval_dataloader("test"))).keys() == {"image", "index", "unreadable"}
    assert len(datamodule.classes) == 8, "the test split, which has no masks, takes nothing away"


def test_a_mask_of_another_size(tmp_path: Path) -> None:
    datamodule = TorchGeoDataModule(write_loveda(tmp_path), name="LoveDA", image_size=16, batch_size=TRAIN)
    datamodule.setup("fit")
    path = datamodule.source("train").path(2)
    small = Image.fromarray(np.zeros((12, 24), np.uint8))
    small.save(str(path).replace("images_png", "masks_png"))
    with pytest.raises(DataError) as caught:
        next(iter(datamodule.train_dataloader()))
    assert str(caught.value).startswith(f"{path} has a mask of 12 x 24 pixels, but an image of 24 x 24\n")


def test_a_value_of_a_mask_that_is_no_class(tmp_path: Path) -> None:
    root = write_loveda(tmp_path)
    for path in root.rglob("masks_png/*.png"):
        Image.fromarray(np.full((24, 24), 255, np.uint8)).save(path)
    datamodule = TorchGeoDataModule(root, name="LoveDA", image_size=16, batch_size=TRAIN)
    with pytest.raises(DataError, match="has the value 255 in its mask, which is none of the 8 classes 0 to 7"):
        one_batch(datamodule)
    datamodule.num_classes = 256
    assert (one_batch(datamodule)["mask"] == 255).all()
    assert (datamodule.eval_dataset("val")[0]["mask"] == 255).all()
    datamodule.ignore_index, datamodule.num_classes = 255, None
    assert (one_batch(datamodule)["mask"] == 255).all()
    assert (datamodule.eval_dataset("val")[0]["mask"] == 255).all()
    datamodule.ignore_index, datamodule.unlabelled = None, True
    assert one_batch(datamodule).keys() == {"image", "index", "unreadable"}
    assert datamodule.eval_dataset("val")[0].keys() == {"image", "index", "unreadable"}


def test_classes_are_unchanged(tmp_path: Path) -> None:
    datamodule = TorchGeoDataModule(write_resisc45(tmp_path), name="RESISC45", image_size=16, batch_size=2 * TRAIN)
    batch = one_batch(datamodule)
    assert datamodule.target == "class"
    assert batch["label"].tolist() == [index // TRAIN for index in batch["index"].tolist()]
    datamodule.unlabelled = True
    assert "label" not in one_batch(datamodule)
    assert int(datamodule.eval_dataset("val")[VAL]["label"]) == 1, "the kNN probe needs them"


@pytest.mark.parametrize(
    ("label", "classes", "title"),
    [
        (None, ("a", "b"), None),
        (torch.tensor(1), ("a", "b"), "b"),
        (torch.tensor([1, 0, 1]), ("a", "b", "c"), "a, c"),
        (torch.tensor([0, 0]), ("a", "b"), ""),
        (torch.tensor([0, 1]), (), "1"),
        (torch.tensor(2.25), (), "2.25"),
    ],
)
def test_titles(label: torch.Tensor | None, classes: tuple[str, ...], title: str | None) -> None:
    assert target_title(label, classes) == title
