"""fMoW-RGB trees, as they should be."""

from __future__ import annotations

import json
import logging
import pickle
import shutil
from collections.abc import Sized
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from PIL import Image

from geoexplora.bands import RGB
from geoexplora.datasets import FMoWRGB, write_fmow_rgb_tree
from geoexplora.datasets import fmow_rgb_tree as tree_module
from geoexplora.datasets.fmow_index import OFFICIAL_CLASSES
from geoexplora.datasets.fmow_rgb_boxes import CROPS, crop_window
from geoexplora.datasets.sample import CLASSES
from geoexplora.errors import ConfigError, DataError

OFFICIAL = {"farm": "crop_field", "forest": "park", "meadow": "zoo", "residential": "airport", "water": "lake_or_pond"}


@pytest.fixture(scope="module")
def rgb_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only."""
    return write_fmow_rgb_tree(tmp_path_factory.mktemp("rgb") / "data", (20, 32), margin=12, limit=3)


@pytest.fixture
def own_rgb_tree(rgb_tree: Path, tmp_path: Path) -> Path:
    return shutil.copytree(rgb_tree, tmp_path / "own", ignore=shutil.ignore_patterns("*.npz"))


def annotation(dataset: FMoWRGB, index: int) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(dataset.path(index).with_suffix(".json").read_text())
    return content


def edit(path: Path, **values: Any) -> None:
    path = path.with_suffix(".json")
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    refresh(path)


def refresh(path: Path) -> None:
    """Overwriting a file in place does not show in its folder."""
    for index in path.parents[3].glob(".*.npz"):
        index.unlink()


def make_official(root: Path) -> None:
    """Give files and categories the names of official classes."""
    for split in ("train", "val", "test_gt"):
        for file in list((root / "fmow-rgb" / split).rglob("*.*")):
            old, _, rest = file.name.partition("_")
            new = OFFICIAL[old]
            target = file.parents[2] / new / file.parent.name.replace(old, new) / f"{new}_{rest}"
            target.parent.mkdir(parents=True, exist_ok=True)
            if file.suffix == ".json":
                file.write_text(file.read_text().replace(f'"{old}"', f'"{new}"'))
            file.rename(target)
        for old in OFFICIAL:
            shutil.rmtree(root / "fmow-rgb" / split / old, ignore_errors=True)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_samples(rgb_tree: Path, split: str) -> None:
    dataset = FMoWRGB(rgb_tree, split, crop="tight")
    assert dataset.classes == CLASSES
    assert dataset.bands == ("R", "G", "B")
    files = sorted((rgb_tree / "fmow-rgb" / dataset.split).rglob("*_rgb.jpg"))
    assert {dataset.path(index) for index in range(len(dataset))} == set(files)
    assert len(dataset) == len(files)
    for index in (0, 5, len(dataset) - 1):
        sample, content = dataset[index], annotation(dataset, index)
        x, y, width, height = content["bounding_boxes"][0]["box"]
        expected = np.asarray(Image.open(dataset.path(index)))[y : y + height, x : x + width]
        assert sample["image"].dtype == torch.float32
        np.testing.assert_allclose(sample["image"].numpy(), np.moveaxis(expected, -1, 0), atol=2)
        assert dataset.classes[sample["label"]] == content["bounding_boxes"][0]["category"]
        assert sample["label"].dtype == torch.int64
        assert sample["unreadable"] == -1
        name = f"{dataset.classes[sample['label']]}_{dataset.location_ids[index]}_{dataset.image_ids[index]}_rgb.jpg"
        assert dataset.path(index).name == name
    assert torch.equal(dataset[-1]["image"], dataset[len(dataset) - 1]["image"])
    with pytest.raises(IndexError):
        dataset[len(dataset)]
    order = list(zip(dataset.labels.tolist(), dataset.location_ids.tolist(), dataset.image_ids.tolist(), strict=True))
    assert order == sorted(order)


def test_crops(rgb_tree: Path) -> None:
    baseline, tight, full = (FMoWRGB(rgb_tree, crop=crop) for crop in CROPS)
    for index in range(len(full)):
        content = annotation(full, index)
        width, height = content["img_width"], content["img_height"]
        across, down = content["bounding_boxes"][0]["box"][2:]
        assert full.read(index).image.shape == (3, height, width)
        assert tight.read(index).image.shape == (3, down, across)
        left, top, right, bottom = crop_window((*content["bounding_boxes"][0]["box"],), width, height, "baseline")
        assert right - left > across or bottom - top > down
        np.testing.assert_array_equal(baseline.read(index).image, full.read(index).image[:, top:bottom, left:right])
    assert FMoWRGB(rgb_tree).crop == "baseline"


def test_the_coarse_variant_has_boxes_of_its_own(rgb_tree: Path) -> None:
    dataset = FMoWRGB(rgb_tree, variant="msrgb", crop="tight")
    assert len(dataset) == len(FMoWRGB(rgb_tree))
    assert dataset.path(0).name.endswith("_msrgb.jpg")
    assert dataset.read(0).image.shape[1:] == tuple(annotation(dataset, 0)["bounding_boxes"][0]["box"][:1:-1])


def test_bands_are_chosen_by_name_and_order(rgb_tree: Path) -> None:
    whole = FMoWRGB(rgb_tree)[0]["image"]
    chosen = FMoWRGB(rgb_tree, bands=("blue", "R"))
    assert chosen.bands == ("B", "R")
    assert torch.equal(chosen[0]["image"], whole[[2, 0]])
    assert chosen.sensor is RGB
    with pytest.raises(ConfigError, match="unknown band 'nir'"):
        FMoWRGB(rgb_tree, bands=("nir",))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop": "loose"}, "unknown crop 'loose'.*\nKnown: baseline, tight, full"),
        ({"variant": "rgbms"}, "unknown variant 'rgbms'\nDid you mean"),
        ({"least_side": 0}, "a least side of 0 px"),
    ],
)
def test_wrong_options(rgb_tree: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FMoWRGB(rgb_tree, **options)


def test_roots(rgb_tree: Path, tmp_path: Path) -> None:
    expected = FMoWRGB(rgb_tree)
    inside = FMoWRGB(rgb_tree / "fmow-rgb")
    assert inside.path(3) == expected.path(3)
    assert len(inside) == len(expected)
    shutil.copytree(rgb_tree / "fmow-rgb", tmp_path / "fmow")
    assert len(FMoWRGB(tmp_path)) == len(expected)
    with pytest.raises(DataError, match="unknown split 'dev'"):
        FMoWRGB(rgb_tree, "dev")


def test_official_classes_keep_their_numbers(own_rgb_tree: Path) -> None:
    make_official(own_rgb_tree)
    dataset = FMoWRGB(own_rgb_tree)
    assert dataset.classes == OFFICIAL_CLASSES
    found = {OFFICIAL_CLASSES[label] for label in dataset.labels}
    assert found == {path.name for path in (own_rgb_tree / "fmow-rgb" / "train").iterdir()}
    assert len(found) >= 4


def test_a_class_of_another_split_counts(own_rgb_tree: Path) -> None:
    (own_rgb_tree / "fmow-rgb" / "val" / "aaa").mkdir()
    dataset = FMoWRGB(own_rgb_tree)
    assert dataset.classes == ("aaa", *CLASSES)
    assert min(dataset.labels) == 1


def test_several_boxes_and_the_63rd_class(own_rgb_tree: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_official(own_rgb_tree)
    count = len(FMoWRGB(own_rgb_tree))
    with caplog.at_level(logging.WARNING):
        assert len(FMoWRGB(own_rgb_tree, false_detection=True)) == count
    assert "has no boxes of false_detection" in caplog.text
    first = FMoWRGB(own_rgb_tree).path(0)
    boxes = json.loads(first.with_suffix(".json").read_text())["bounding_boxes"]
    more = [
        {"ID": 0, "category": "false_detection", "box": [1, 2, 9, 7]},
        {"ID": 1, "category": "zoo", "box": [3, 0, 5, 5]},
        {"ID": 2, "category": "zoo", "box": [3, 0, 2, 5]},  # too small: left out
        {"ID": 3, "category": "zoo", "box": [3.0, 0.0, 6.0, 5.0]},
    ]
    edit(first, bounding_boxes=boxes + more)
    without, with_it = (FMoWRGB(own_rgb_tree, crop="tight", false_detection=flag) for flag in (False, True))
    assert without.classes == OFFICIAL_CLASSES
    assert with_it.classes == (*OFFICIAL_CLASSES, "false_detection")
    assert len(without) == count + 2
    assert len(with_it) == count + 3
    at = with_it.labels.tolist().index(62)
    assert with_it.read(at).image.shape == (3, 7, 9)
    assert with_it.path(at) == first
    zoo = [index for index in range(len(without)) if without.path(index) == first]
    assert [without.classes[without.labels[index]] for index in zoo[1:]] == ["zoo", "zoo"]
    assert [without.read(index).image.shape for index in zoo[1:]] == [(3, 5, 5), (3, 5, 6)]


def test_a_single_box_without_a_list(own_rgb_tree: Path) -> None:
    dataset = FMoWRGB(own_rgb_tree)
    edit(dataset.path(0), bounding_boxes=annotation(dataset, 0)["bounding_boxes"][0])
    assert torch.equal(FMoWRGB(own_rgb_tree)[0]["image"], dataset[0]["image"])


def test_years(own_rgb_tree: Path) -> None:
    dataset = FMoWRGB(own_rgb_tree, years=(2017, 2017))
    count = len(dataset)
    assert set(dataset.timestamps) == {np.datetime64("2017-02-16T10:21:01")}
    edit(dataset.path(0), timestamp="2016-12-31T23:59:59.5Z")
    edit(dataset.path(1), timestamp="2016-12-31T23:30:00-01:00")
    assert len(FMoWRGB(own_rgb_tree, years=(2017, 2020))) == count - 1
    assert len(FMoWRGB(own_rgb_tree)) == count
    edit(dataset.path(2), timestamp="soon")
    assert len(FMoWRGB(own_rgb_tree)) == count
    with pytest.raises(DataError, match=r"1 samples of .*train have no timestamp such as .*farm_0_2_rgb\.jpg"):
        FMoWRGB(own_rgb_tree, years=(2017, 2020))
    with pytest.raises(DataError, match=f"no sample is left of .*: .*{count - 2} outside the years 1990 to 1991"):
        edit(dataset.path(2), timestamp="1991-01-01T00:00:00Z")
        edit(dataset.path(3), timestamp="1990-01-01T00:00:00Z")
        assert len(FMoWRGB(own_rgb_tree, years=(1990, 1991))) == 2
        for index in (2, 3):
            dataset.path(index).unlink()
        FMoWRGB(own_rgb_tree, years=(1990, 1991), missing="skip")


def test_the_index_is_kept_and_made_anew(own_rgb_tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    original = tree_module.read_annotation

    def watched(path: Path) -> Any:
        read.append(path)
        return original(path)

    monkeypatch.setattr(tree_module, "read_annotation", watched)
    dataset = FMoWRGB(own_rgb_tree)
    assert len(read) == len(dataset)
    again = FMoWRGB(own_rgb_tree, crop="full", false_detection=True)
    assert len(read) == len(dataset)
    assert again.path(5) == dataset.path(5)
    assert again.timestamps[5] == dataset.timestamps[5]
    target = dataset.path(0).with_name("farm_0_77_rgb.jpg")
    shutil.copy(dataset.path(0), target)
    shutil.copy(dataset.path(0).with_suffix(".json"), target.with_suffix(".json"))
    more = FMoWRGB(own_rgb_tree)
    assert len(more) == len(dataset) + 1
    assert target in {more.path(index) for index in range(len(more))}
    assert len(read) == len(dataset) + len(more)
    more.path(1).unlink()
    with pytest.raises(DataError, match="1 of the"):
        FMoWRGB(own_rgb_tree)


def test_a_read_only_folder(own_rgb_tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = len(FMoWRGB(own_rgb_tree))
    (own_rgb_tree / "fmow-rgb" / ".train-rgb.index.npz").unlink()

    def refuse(path: Path, **_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "touch", refuse)
    assert len(FMoWRGB(own_rgb_tree)) == expected
    assert not list((own_rgb_tree / "fmow-rgb").glob(".*"))


def test_least_side(tmp_path: Path) -> None:
    root = write_fmow_rgb_tree(tmp_path, (16, 40), margin=44, limit=4)
    dataset, shrunk = FMoWRGB(root, crop="full"), FMoWRGB(root, crop="full", least_side=30)
    factors = set()
    for index in range(len(dataset)):
        whole, small = dataset.read(index).image, shrunk.read(index).image
        assert min(small.shape[1:]) >= 30
        factor = max(number for number in (1, 2, 4, 8) if min(whole.shape[1:]) // number >= 30)
        factors.add(factor)
        for long, short in zip(whole.shape[1:], small.shape[1:], strict=True):
            assert long / factor <= short < long / factor + 2
        np.testing.assert_allclose(small.mean((1, 2)), whole.mean((1, 2)), atol=3)
    assert factors == {2, 4}
    shrunk.least_side = None
    np.testing.assert_array_equal(shrunk.read(0).image, dataset.read(0).image)


def test_workers_share_arrays_not_lists(rgb_tree: Path) -> None:
    dataset = FMoWRGB(rgb_tree)
    held = {name: value for name, value in vars(dataset).items() if isinstance(value, Sized) and len(value) > 20}
    assert len(held) >= 6
    assert all(isinstance(value, np.ndarray | str) for value in held.values())
    assert not any(value.dtype == object for value in held.values() if isinstance(value, np.ndarray))
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[0]["image"], dataset[0]["image"])


def test_transforms_and_plot(rgb_tree: Path) -> None:
    dataset = FMoWRGB(rgb_tree, transforms=lambda sample: {**sample, "image": sample["image"] / 255})
    assert dataset[0]["image"].max() <= 1
    figure = dataset.plot({**dataset[0], "prediction": 4}, suptitle="a title")
    assert "predicted: water" in figure.axes[0].get_title()
    plt.close(figure)


def test_the_tree_writer(rgb_tree: Path) -> None:
    with pytest.raises(DataError, match="fmow-rgb exists already"):
        write_fmow_rgb_tree(rgb_tree)
