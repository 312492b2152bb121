"""SatMAE's lists of fMoW-RGB, and the ground truth archive."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from geoexplora.datasets import FMoWRGB, write_fmow_rgb_tree
from geoexplora.datasets import fmow_rgb_list as list_module
from geoexplora.datasets.fmow_rgb_list import candidates
from geoexplora.datasets.sample import CLASSES
from geoexplora.errors import DataError

TIME = "2017-02-16T10:21:01Z"
Rows = list[tuple[str, str, str]]


@pytest.fixture(scope="module")
def rgb_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only."""
    return write_fmow_rgb_tree(tmp_path_factory.mktemp("rgb") / "data", (20, 32), margin=12, limit=3)


@pytest.fixture
def own_rgb_tree(rgb_tree: Path, tmp_path: Path) -> Path:
    return shutil.copytree(rgb_tree, tmp_path / "own", ignore=shutil.ignore_patterns("*.npz"))


def rows_of(root: Path, split: str = "train", step: int = 2) -> Rows:
    """Every other image of a split, backwards."""
    images = sorted((root / "fmow-rgb" / split).rglob("*_rgb.jpg"))[::-step]
    return [(path.parents[1].name, str(path.relative_to(root / "fmow-rgb")), TIME) for path in images]


def write_list(
    root: Path, rows: Rows, header: Sequence[str] | None = ("category", "image_path", "timestamp"), index: bool = False
) -> Path:
    path = root / "train_62classes.csv"
    pd.DataFrame(rows, columns=header).to_csv(path, header=header is not None, index=index)
    return path


@pytest.mark.parametrize("index", [False, True])
@pytest.mark.parametrize("header", [None, ("category", "image_path", "timestamp"), ("a", "b", "c")])
@pytest.mark.parametrize("place", ["", "fmow-rgb"])
def test_a_list_decides(own_rgb_tree: Path, header: Sequence[str] | None, index: bool, place: str) -> None:
    rows = rows_of(own_rgb_tree)
    write_list(own_rgb_tree / place, rows, header, index)
    whole = {path: number for number, path in enumerate(_paths(FMoWRGB(own_rgb_tree, "train")))}
    dataset = FMoWRGB(own_rgb_tree, crop="tight")
    assert len(dataset) == len(rows) == len(whole)
    for number, (label, path, _) in enumerate(rows):
        assert dataset.path(number) == own_rgb_tree / "fmow-rgb" / path
        assert dataset.classes[dataset.labels[number]] == label
        content = json.loads(dataset.path(number).with_suffix(".json").read_text())
        width, height = content["bounding_boxes"][0]["box"][2:]
        assert dataset.read(number).image.shape == (3, height, width)
        assert dataset.image_ids[number] == int(path.split("_")[-2])
        assert dataset.location_ids[number] == int(path.split("_")[-3])
    assert len(FMoWRGB(own_rgb_tree, "val")) == len(list((own_rgb_tree / "fmow-rgb" / "val").rglob("*_rgb.jpg")))


def _paths(dataset: FMoWRGB) -> list[Path]:
    return [dataset.path(index) for index in range(len(dataset))]


@pytest.mark.parametrize(
    "change",
    [
        lambda root, path: str(root / "fmow-rgb" / path),
        lambda root, path: f"/atlas/u/someone/data/fmow-rgb/{path}",
        lambda root, path: f"/atlas/u/someone/fmow/{path}",
        lambda root, path: f"/atlas/u/someone/pictures/{path}",
        lambda root, path: f"fmow-rgb/{path}",
        lambda root, path: f"./{path}",
        lambda root, path: f"fmow-rgb/train/fmow-rgb/{path}",
    ],
)
def test_paths_of_other_machines(own_rgb_tree: Path, change: Callable[[Path, str], str]) -> None:
    rows = rows_of(own_rgb_tree)
    write_list(own_rgb_tree, rows)
    expected = FMoWRGB(own_rgb_tree)
    write_list(own_rgb_tree, [(label, change(own_rgb_tree, path), time) for label, path, time in rows])
    found = FMoWRGB(own_rgb_tree)
    assert [path.resolve() for path in _paths(found)] == _paths(expected)
    assert found.labels.tolist() == expected.labels.tolist()


def test_the_order_of_places() -> None:
    path = "/a/train/fmow-rgb/train/zoo/zoo_1/zoo_1_2_rgb.jpg"
    tail = "train/zoo/zoo_1/zoo_1_2_rgb.jpg"
    assert candidates(path, "rgb") == [path, tail, f"train/fmow-rgb/{tail}"]
    assert candidates(tail, "rgb") == [tail]
    assert candidates(tail, "msrgb") == ["train/zoo/zoo_1/zoo_1_2_msrgb.jpg"]
    assert candidates("a_msrgb.jpg", "msrgb") == ["a_msrgb.jpg"]


def test_absolute_paths_may_leave_the_root(own_rgb_tree: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere" / "zoo_5"
    elsewhere.mkdir(parents=True)
    source = own_rgb_tree / "fmow-rgb" / rows_of(own_rgb_tree)[0][1]
    shutil.copy(source, elsewhere / "picture.jpg")
    write_list(own_rgb_tree, [("farm", str(elsewhere / "picture.jpg"), TIME)])
    dataset = FMoWRGB(own_rgb_tree)
    assert dataset.path(0) == elsewhere / "picture.jpg"
    assert dataset.read(0).image.shape[0] == 3


def test_without_json_the_image_is_whole(own_rgb_tree: Path) -> None:
    rows = rows_of(own_rgb_tree)
    write_list(own_rgb_tree, rows)
    full = FMoWRGB(own_rgb_tree, crop="full")
    assert not list((own_rgb_tree / "fmow-rgb").glob(".*.npz"))  # nothing was read that should be kept
    tight = FMoWRGB(own_rgb_tree, crop="tight")
    assert tight.read(0).image.shape != full.read(0).image.shape
    tight.path(0).with_suffix(".json").unlink()
    again = FMoWRGB(own_rgb_tree, crop="tight")
    np.testing.assert_array_equal(again.read(0).image, full.read(0).image)
    assert again.read(1).image.shape == tight.read(1).image.shape


def test_the_coarse_variant(own_rgb_tree: Path) -> None:
    write_list(own_rgb_tree, rows_of(own_rgb_tree))
    dataset = FMoWRGB(own_rgb_tree, variant="msrgb")
    assert all(path.name.endswith("_msrgb.jpg") for path in _paths(dataset))
    assert max(dataset.read(0).image.shape[1:]) < 20


def test_the_box_of_the_label(own_rgb_tree: Path) -> None:
    rows = rows_of(own_rgb_tree)
    path = (own_rgb_tree / "fmow-rgb" / rows[0][1]).with_suffix(".json")
    content = json.loads(path.read_text())
    boxes = [("false_detection", [0, 0, 9, 9]), (rows[0][0], [1, 1, 5, 6]), (rows[0][0], [1, 1, 7, 7])]
    content["bounding_boxes"] = [{"ID": 0, "category": name, "box": box} for name, box in boxes]
    path.write_text(json.dumps(content))
    write_list(own_rgb_tree, rows)
    assert FMoWRGB(own_rgb_tree, crop="tight").read(0).image.shape == (3, 6, 5)
    content["bounding_boxes"] = content["bounding_boxes"][:1]
    path.unlink()
    path.write_text(json.dumps(content))
    write_list(own_rgb_tree, [*rows, rows[0]])
    with pytest.raises(DataError, match=rf"2 boxes or JSON files [^:]*:\n[^:]*{path.name}: it has no box of the categ"):
        FMoWRGB(own_rgb_tree, crop="tight")


def test_the_index_of_a_list(own_rgb_tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of(own_rgb_tree)
    write_list(own_rgb_tree, rows)
    expected = FMoWRGB(own_rgb_tree)
    assert (own_rgb_tree / "fmow-rgb" / ".train_62classes-rgb.index.npz").is_file()

    def refuse(path: Path) -> Any:
        raise AssertionError(path)

    with monkeypatch.context() as patch:
        patch.setattr(list_module, "read_annotation", refuse)
        assert _paths(FMoWRGB(own_rgb_tree)) == _paths(expected)
        write_list(own_rgb_tree, rows[1:])
        with pytest.raises(AssertionError):
            FMoWRGB(own_rgb_tree)
    assert len(FMoWRGB(own_rgb_tree)) == len(rows) - 1


def test_numbers_mean_what_the_paths_say(own_rgb_tree: Path) -> None:
    rows = rows_of(own_rgb_tree)
    numbers = {name: str(number) for number, name in enumerate(reversed(CLASSES))}
    write_list(own_rgb_tree, [(numbers[label], path, time) for label, path, time in rows])
    dataset = FMoWRGB(own_rgb_tree)
    assert [dataset.classes[label] for label in dataset.labels] == [label for label, _, _ in rows]
    confused = [(numbers[label], path, time) for label, path, time in rows]
    confused[0] = ("77", *confused[0][1:])
    write_list(own_rgb_tree, confused)
    with pytest.raises(DataError, match=r"numbers as labels, such as '77' for .*\nWrite the names of the categories"):
        FMoWRGB(own_rgb_tree)
    write_list(own_rgb_tree, [("3", "somewhere/picture.jpg", TIME)])
    with pytest.raises(DataError, match="it cannot be told what they mean"):
        FMoWRGB(own_rgb_tree)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read as csv"),
        (b"\xff\xfe\x00\x81", r"train_62classes\.csv"),
        (b"path,label,timestamp\nx.jpg,zoo,2017", r"has other columns than label, path .*'x\.jpg,zoo,2017'\nThe lists"),
        (b"zoo,x.jpg", "has other columns"),
        (b"label,path,timestamp\n", "has other columns"),
        (b"zoo,x.tif,2017\nzoo,x.jpg,2017", "no image"),
        (b"l,p,t\nzoo,x.tif,2017\nzoo,x.jpg,2017", r"1 malformed path: 'x\.tif' in line 2"),
        (
            b"l,p,t\nzoo,x.jpg,2017\n,x.jpg,2017\n,x.jpg,2017\nzoo,x.jpg,1",
            "2 malformed labels: '' in line 3, '' in line 4",
        ),
    ],
)
def test_malformed_lists(own_rgb_tree: Path, content: bytes, message: str) -> None:
    (own_rgb_tree / "train_62classes.csv").write_bytes(content)
    if message == "no image":  # its first line could be a header; its image is not there
        message = r"none of the 1 images of .*classes\.csv is there, such as .*x\.jpg"
    with pytest.raises(DataError, match=message):
        FMoWRGB(own_rgb_tree)


def test_missing_images(own_rgb_tree: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = rows_of(own_rgb_tree)
    write_list(own_rgb_tree, rows)
    (own_rgb_tree / "fmow-rgb" / rows[1][1]).unlink()
    with pytest.raises(DataError, match=rf"1 of the {len(rows)} images of .*classes\.csv are missing; the first of"):
        FMoWRGB(own_rgb_tree)
    with caplog.at_level(logging.WARNING):
        assert len(FMoWRGB(own_rgb_tree, missing="skip")) == len(rows) - 1
    assert rows[1][1] in caplog.text
    write_list(own_rgb_tree, [(label, path, "someday") for label, path, _ in rows])
    with pytest.raises(DataError, match="have no timestamp"):
        FMoWRGB(own_rgb_tree, missing="skip", years=(2000, 2020))


def hide(root: Path, move: bool = True) -> Path:
    """Turn ``test_gt`` into what is published: numbered folders of images, the ground truth apart."""
    base = root / "fmow-rgb"
    pairs = []
    for number, place in enumerate(sorted((base / "test_gt").glob("*/*"))):
        target = base / "test" / f"{number:07d}"
        target.mkdir(parents=True)
        pairs.append({"input": str(place.relative_to(base)), "output": f"test/{number:07d}"})
        for image in place.glob("*.jpg"):
            name = f"{number:07d}_{'_'.join(image.name.split('_')[-2:])}"
            shutil.move(image, target / name) if move else shutil.copy(image, target / name)
    mapping = base / "test_gt_mapping.json"
    mapping.write_text(json.dumps(pairs))
    return mapping


def test_ground_truth(own_rgb_tree: Path) -> None:
    expected = FMoWRGB(own_rgb_tree, "test")
    hide(own_rgb_tree)
    found = FMoWRGB(own_rgb_tree, "test")
    assert len(found) == len(expected)
    assert found.path(0).parent.parent.name == "test"
    for index in range(len(found)):
        np.testing.assert_array_equal(found.read(index).image, _whole(expected, index, found))
    assert found.labels.tolist() == expected.labels.tolist()
    assert found.location_ids.tolist() == expected.location_ids.tolist()
    assert found.image_ids.tolist() == expected.image_ids.tolist()
    found.path(2).unlink()
    with pytest.raises(DataError, match=f"1 of the {len(found)} images .* are missing"):
        FMoWRGB(own_rgb_tree, "test")


def _whole(expected: FMoWRGB, index: int, found: FMoWRGB) -> np.ndarray[Any, Any]:
    # The images have moved: put this one back for the comparison.
    shutil.copy(found.path(index), expected.path(index))
    image = expected.read(index).image
    expected.path(index).unlink()
    return image


def test_images_copied_to_the_ground_truth(own_rgb_tree: Path) -> None:
    mapping = hide(own_rgb_tree, move=False)
    mapping.unlink()
    dataset = FMoWRGB(own_rgb_tree, "test")
    assert dataset.path(0).parents[2].name == "test_gt"


def test_a_labelled_test_folder(own_rgb_tree: Path) -> None:
    expected = FMoWRGB(own_rgb_tree, "test")
    (own_rgb_tree / "fmow-rgb" / "test_gt").rename(own_rgb_tree / "fmow-rgb" / "test")
    assert FMoWRGB(own_rgb_tree, "test").labels.tolist() == expected.labels.tolist()
    (own_rgb_tree / "fmow-rgb" / "test").rename(own_rgb_tree / "fmow-rgb" / "seq_gt")
    assert FMoWRGB(own_rgb_tree, "seq").labels.tolist() == expected.labels.tolist()
    with pytest.raises(DataError, match="neither a list nor a folder of the split 'test_gt'"):
        FMoWRGB(own_rgb_tree, "test")


@pytest.mark.parametrize("ground_truth", [True, False])
def test_no_labels(own_rgb_tree: Path, ground_truth: bool) -> None:
    hide(own_rgb_tree).unlink()
    if not ground_truth:
        shutil.rmtree(own_rgb_tree / "fmow-rgb" / "test_gt")
    message = r"have no labels: there is no .*test_gt_mapping\.json\nUnpack groundtruth\.tar\.bz2"
    with pytest.raises(DataError, match=message):
        FMoWRGB(own_rgb_tree, "test")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("junk", "cannot be read"),
        ("[1]", "cannot be read"),
        ('[{"input": "test_gt/farm/farm_0"}]', "cannot be read"),
        ('[{"input": "test/0000001", "output": "test_gt/farm/farm_0"}]', "'test/0000001' as a folder of ground truth"),
    ],
)
def test_a_malformed_mapping(own_rgb_tree: Path, content: str, message: str) -> None:
    hide(own_rgb_tree).write_text(content)
    with pytest.raises(DataError, match=message):
        FMoWRGB(own_rgb_tree, "test")
