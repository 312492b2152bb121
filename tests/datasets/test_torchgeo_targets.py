"""What TorchGeo's datasets say of their images: kinds of targets, classes, listed labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchgeo.datasets
from PIL import Image
from torch import Tensor
from torchgeo.datasets import BigEarthNet, NonGeoDataset, So2Sat

from geoexplora.bands import SENTINEL2
from geoexplora.datasets.torchgeo_opening import find_class, open_torchgeo
from geoexplora.datasets.torchgeo_source import TorchGeoTiles
from geoexplora.datasets.torchgeo_targets import class_names, target_kind
from geoexplora.errors import DataError
from geoexplora.torchgeo_facts import FACTS

from .torchgeo_trees import (
    CLASSES,
    TRAIN,
    land_cover,
    write_bigearthnet,
    write_eurosat,
    write_loveda,
    write_so2sat,
    write_ssl4eo_s12,
    write_tropical_cyclone,
)


def opened(name: str, root: Path, split: str = "train", **options: Any) -> TorchGeoTiles:
    return TorchGeoTiles(open_torchgeo(find_class(name), root, split), **options)


class InMemory(NonGeoDataset):
    """Samples that a test makes up; attributes as given."""

    def __init__(self, samples: list[dict[str, Any]], **attributes: Any) -> None:
        self.given = samples
        vars(self).update(attributes)

    def __len__(self) -> int:
        return len(self.given)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": torch.arange(3 * 4 * 5.0).view(3, 4, 5)} | self.given[index]


def test_eurosat(tmp_path: Path) -> None:
    tiles = opened("EuroSAT", write_eurosat(tmp_path), "val")
    assert (tiles.target, tiles.classes) == ("class", CLASSES)
    assert [tiles.read(index).target for index in range(4)] == tiles.labels.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("split", ["train", "val", "test_gt"])
def test_so2sat_lists_its_labels(tmp_path: Path, split: str) -> None:
    tiles = opened("So2Sat", write_so2sat(tmp_path), split, bands=("B2", "B12"))
    assert (tiles.target, tiles.classes) == ("class", So2Sat.classes)
    assert tiles.labels.tolist() == [0, 5, 10, 15]
    assert [tiles.read(index).target for index in range(TRAIN)] == [0, 5, 10, 15]
    assert tiles.dataset[3]["label"] == 15
    # Channel n of the 18, Sentinel-1's 8 first, holds 100 n to 100 n + 50.
    assert (tiles.read(1).image // 100).reshape(2, -1).T.tolist() == [[9, 18]] * 64


def test_bigearthnet(tmp_path: Path) -> None:
    tiles = opened("BigEarthNet", write_bigearthnet(tmp_path))
    assert (tiles.target, tiles.classes) == ("multilabel", tuple(BigEarthNet.class_sets[19]))
    assert tiles.bands == tuple(band for band in SENTINEL2.band_names if band != "B10")
    assert tiles.labels.tolist() == [-1] * TRAIN
    for index in range(TRAIN):
        folder = tiles.path(index)
        names = json.loads((folder / f"{folder.name}_labels_metadata.json").read_text())["labels"]
        numbers = [BigEarthNet.class_sets[43].index(name) for name in names]
        wanted = {BigEarthNet.label_converter[number] for number in numbers if number in BigEarthNet.label_converter}
        tile = tiles.read(index)
        assert isinstance(tile.target, np.ndarray)
        assert set(np.flatnonzero(tile.target).tolist()) == wanted
        assert tile.target.sum() == len(wanted)
        assert (tile.image.mean((1, 2)) // 1000 == np.arange(1, 13)).all()
    finer = TorchGeoTiles(BigEarthNet(tmp_path, bands="s2", num_classes=43, checksum=False))
    assert finer.classes == tuple(BigEarthNet.class_sets[43])
    assert np.shape(finer.read(0).target) == (43,)


def test_ssl4eo_s12_has_no_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchgeo.datasets.SSL4EOS12, "__len__", lambda dataset: 3)  # says 251,079 whatever is there
    tiles = opened("SSL4EOS12", write_ssl4eo_s12(tmp_path), bands=("B12", "B8A"))
    assert (tiles.target, tiles.classes, tiles.labels.tolist()) == ("none", (), [-1] * 3)
    for index in range(3):
        tile = tiles.read(index)
        assert tile.target is None
        first, second = (set(band.ravel().tolist()) for band in tile.image - 100 * index)
        assert (first, second) in [({13000}, {9000}), ({13001}, {9001})], "one of two seasons"


def test_loveda(tmp_path: Path) -> None:
    tiles = opened("LoveDA", write_loveda(tmp_path))
    assert tiles.target == "mask"
    assert tiles.classes[:3] == ("no-data", "background", "building")
    assert sorted(tiles.classes) == sorted(torchgeo.datasets.LoveDA.classes)
    for index in range(TRAIN):
        tile = tiles.read(index)
        assert isinstance(tile.target, np.ndarray)
        np.testing.assert_array_equal(tile.target, land_cover(int(tiles.path(index).stem) + 10 * len("Train")))
        np.testing.assert_array_equal(tile.image, tile.target * np.array([10, 20, 30])[:, None, None])
    test = opened("LoveDA", tmp_path, "test_gt")
    assert (test.target, test.classes, test.read(0).target) == ("none", (), None)


def test_wind_speeds(tmp_path: Path) -> None:
    tiles = opened("TropicalCyclone", write_tropical_cyclone(tmp_path))
    assert (tiles.target, tiles.classes) == ("value", ())
    found = [tiles.read(index).target for index in range(TRAIN)]
    assert found == [30.0, 37.0, 44.0, 51.0]
    assert all(isinstance(value, float) for value in found)


LONG, FLOAT = torch.ones((), dtype=torch.int64), torch.tensor(2.5)


@pytest.mark.parametrize(
    ("sample", "classes", "kind"),
    [
        ({}, ("a", "b"), "none"),
        ({"label": LONG}, ("a", "b"), "class"),
        ({"label": LONG[None]}, ("a", "b"), "class"),
        ({"label": LONG}, (), "value"),
        ({"label": FLOAT}, ("a", "b"), "value"),
        ({"label": FLOAT[None]}, (), "value"),
        ({"label": torch.tensor([0, 1])}, ("a", "b"), "multilabel"),
        ({"label": torch.tensor([True, False])}, ("a", "b"), "multilabel"),
        ({"label": torch.tensor([0, 1, 1])}, ("a", "b"), "none"),
        ({"label": torch.tensor([0, 1])}, (), "none"),
        ({"label": torch.tensor([0.5, 1])}, ("a", "b"), "none"),
        ({"label": torch.zeros(5, 4)}, ("a", "b"), "none"),
        ({"label": "a"}, ("a", "b"), "none"),
        ({"label": torch.tensor([0, 1]), "bbox_xyxy": torch.zeros(2, 4)}, ("a", "b"), "none"),
        ({"mask": torch.zeros(4, 5, dtype=torch.int64)}, (), "mask"),
        ({"mask": torch.zeros(1, 4, 5, dtype=torch.uint8)}, ("a", "b"), "mask"),
        ({"mask": torch.zeros(1, 5, dtype=torch.int64)}, ("a", "b"), "none"),
        ({"mask": torch.zeros(2, 4, 5, dtype=torch.int64)}, ("a", "b"), "none"),
        ({"mask": torch.zeros(4, 5)}, ("a", "b"), "none"),
        ({"mask": torch.zeros(4, 5, dtype=torch.bool), "label": LONG}, ("a", "b"), "mask"),
    ],
)
def test_kinds(sample: dict[str, Any], classes: tuple[str, ...], kind: str) -> None:
    assert target_kind(InMemory([]), sample, classes) == kind
    tiles = TorchGeoTiles(InMemory([sample] * 3, classes=classes))
    assert tiles.target == kind
    assert tiles.classes == (() if kind in {"none", "value"} else classes)
    assert tiles.labels.tolist() == [-1] * 3
    assert tiles.location_ids.tolist() == [0] * 3
    assert tiles.image_ids.tolist() == [0, 1, 2]
    target = tiles.read(1).target
    assert (target is None) == (kind == "none")
    if kind == "mask":
        assert np.shape(target) == (4, 5)


@pytest.mark.parametrize(
    ("attributes", "names"),
    [
        ({}, ()),
        ({"classes": ["a", "b"]}, ("a", "b")),
        ({"classes": np.array([0, 7])}, ("0", "7")),
        ({"class_set": ("x", "y")}, ("x", "y")),
        ({"num_classes": 3}, ("0", "1", "2")),
        ({"num_classes": 2, "class_sets": {2: ["p", "q"], 3: ["r", "s", "t"]}}, ("p", "q")),
        ({"classes": "words"}, ()),
    ],
)
def test_names_of_classes(attributes: dict[str, Any], names: tuple[str, ...]) -> None:
    assert class_names(InMemory([], **attributes)) == names


def test_the_better_of_two_targets_is_a_fact() -> None:
    assert FACTS["BigEarthNetV2"].target == "multilabel"
    fake = type("BigEarthNetV2", (InMemory,), {})
    sample = {"mask": torch.zeros(1, 4, 5, dtype=torch.int64), "label": torch.zeros(19, dtype=torch.int64)}
    assert target_kind(fake([]), sample, ("a",) * 19) == "multilabel"


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({"label": LONG}, {}, "image 1 of InMemory has no label\nAll tiles must have a label"),
        ({"label": LONG}, {"label": FLOAT}, r"has no label of this kind: torch\.float32 \(\)"),
        ({"label": torch.tensor([0, 1])}, {"label": LONG}, r"has no label of this kind: torch\.int64 \(\)"),
        (
            {"mask": torch.zeros(4, 5, dtype=torch.int64)},
            {"mask": torch.zeros(2, 4, 5, dtype=torch.int64)},
            r"has no mask of this kind: torch\.int64 \(2, 4, 5\)",
        ),
    ],
)
def test_a_target_of_another_kind(first: dict[str, Tensor], second: dict[str, Tensor], message: str) -> None:
    tiles = TorchGeoTiles(InMemory([first, second], classes=("a", "b")))
    with pytest.raises(DataError, match=message):
        tiles.read(1)


@pytest.mark.parametrize("wrong", [-1, 2, 7])
def test_listed_labels_are_classes(wrong: int) -> None:
    dataset = InMemory([{"label": LONG}] * 3, classes=("a", "b"), targets=[0, 1, wrong])
    with pytest.raises(DataError, match=f"lists the label {wrong} for image 2, which is none of the 2 classes 0 to 1"):
        TorchGeoTiles(dataset)


def test_the_target_is_that_of_the_tile_that_stands_in(tmp_path: Path) -> None:
    root = write_loveda(tmp_path)
    tiles = opened("LoveDA", root, max_unreadable=0.5)
    other = tiles.read(1).target
    mask = Path(str(tiles.path(0)).replace("images_png", "masks_png"))
    mask.write_bytes(b"broken")
    tile = tiles.read(0)
    assert tile.unreadable == 0
    np.testing.assert_array_equal(np.asarray(tile.target), np.asarray(other))
    Image.fromarray(np.zeros((24, 24), np.uint8)).save(mask)
    assert tiles.read(0).unreadable == -1
