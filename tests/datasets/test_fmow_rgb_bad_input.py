"""fMoW-RGB trees that are not as they should be: one clear message with the remedy."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from geoexplora.datasets import FMoWRGB, write_fmow_rgb_tree
from geoexplora.errors import DataError, SplitNotFoundError


@pytest.fixture(scope="module")
def rgb_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only."""
    return write_fmow_rgb_tree(tmp_path_factory.mktemp("rgb") / "data", 24, margin=12, limit=3)


@pytest.fixture
def own_rgb_tree(rgb_tree: Path, tmp_path: Path) -> Path:
    return shutil.copytree(rgb_tree, tmp_path / "own", ignore=shutil.ignore_patterns("*.npz"))


def json_file(root: Path, number: int = 0) -> Path:
    return sorted((root / "fmow-rgb" / "train").rglob("*_rgb.json"))[number]


def with_boxes(*boxes: Any, size: tuple[int, int] | None = (48, 48)) -> str:
    sides = {} if size is None else {"img_width": size[0], "img_height": size[1]}
    entries = [box if isinstance(box, dict) else {"ID": 0, "category": "farm", "box": box} for box in boxes]
    return json.dumps({"bounding_boxes": entries, "timestamp": "2017-02-16T10:21:01Z"} | sides)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "it is no JSON"),
        ('{"bounding_boxes": [', "it is no JSON"),
        ("[1, 2]", "it has no bounding_boxes"),
        ("{}", "it has no bounding_boxes"),
        ('{"bounding_boxes": []}', "it has no bounding_boxes"),
        ('{"bounding_boxes": "none"}', "it has no bounding_boxes"),
        (with_boxes("1,2,3,4"), "a box is not [x, y, width, height]: '1,2,3,4'"),
        (with_boxes([1, 2, 3]), "a box is not [x, y, width, height]: [1, 2, 3]"),
        (with_boxes([1, 2, 3, None]), "a box is not [x, y, width, height]: [1, 2, 3, None]"),
        (with_boxes([1, 2, 3, True]), "a box is not [x, y, width, height]: [1, 2, 3, True]"),
        (with_boxes([1, 2, float("nan"), 4]), "a box is not [x, y, width, height]: [1, 2, nan, 4]"),
        (with_boxes([1, 2, 10**12, 4]), "a box is not [x, y, width, height]"),
        (with_boxes({"box": [1, 2, 3, 4]}), "the box [1, 2, 3, 4] has no category"),
        (with_boxes({"box": [1, 2, 3, 4], "category": 7}), "the box [1, 2, 3, 4] has no category"),
        (with_boxes([1, 2, 0, 9]), "the box [1, 2, 0, 9] has no area"),
        (with_boxes([1, 2, 9, -9]), "the box [1, 2, 9, -9] has no area"),
        (with_boxes([48, 2, 9, 9]), "the box [48, 2, 9, 9] lies outside the image of 48 x 48 px"),
        (with_boxes([2, 48, 9, 9]), "the box [2, 48, 9, 9] lies outside the image of 48 x 48 px"),
        (with_boxes([-9, 2, 9, 9]), "the box [-9, 2, 9, 9] lies outside the image of"),
        (with_boxes([2, -10, 9, 9], size=None), "the box [2, -10, 9, 9] lies outside the image\n"),
    ],
)
def test_unusable_boxes(own_rgb_tree: Path, content: str, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    count = len(FMoWRGB(own_rgb_tree))
    path = json_file(own_rgb_tree)
    path.unlink()
    path.write_text(content)
    with pytest.raises(DataError) as caught:
        FMoWRGB(own_rgb_tree)
    message = str(caught.value)
    assert message.startswith("1 box or JSON file of ")
    assert f"\n  {path}: {reason}" in message
    assert "--missing skip" in message
    with caplog.at_level(logging.WARNING):
        assert len(FMoWRGB(own_rgb_tree, missing="skip")) == count - 1
    assert f"{path}: {reason.strip()}" in caplog.text


def test_the_usable_boxes_of_a_file_are_kept(own_rgb_tree: Path) -> None:
    count = len(FMoWRGB(own_rgb_tree))
    path = json_file(own_rgb_tree)
    path.unlink()
    path.write_text(with_boxes([1, 2, 9, 9], [0, 0, 0, 0], [60, 0, 5, 5], [3, 3, 8, 8], [0, 0, 2, 40]))
    with pytest.raises(DataError, match="2 boxes or JSON files"):
        FMoWRGB(own_rgb_tree)
    assert len(FMoWRGB(own_rgb_tree, missing="skip")) == count + 1


def test_boxes_partly_outside_are_clipped(own_rgb_tree: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = json_file(own_rgb_tree)
    path.unlink()
    width, height = Image.open(path.with_suffix(".jpg")).size
    boxes = [-3, 5, 10, 10], [width - 5, height - 4, 60, 60], [5, 5, 10, 10]
    path.write_text(with_boxes(*boxes, size=(width, height)))
    with caplog.at_level(logging.WARNING):
        dataset = FMoWRGB(own_rgb_tree, crop="tight")
    assert "2 boxes of" in caplog.text
    assert "partly outside their image and are clipped" in caplog.text
    assert [dataset.read(index).image.shape for index in range(3)] == [(3, 10, 7), (3, 4, 5), (3, 10, 10)]
    caplog.clear()
    FMoWRGB(own_rgb_tree, crop="full")
    assert "clipped" not in caplog.text


def test_a_box_outside_an_image_of_untold_size(own_rgb_tree: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = json_file(own_rgb_tree)
    path.unlink()
    path.write_text(with_boxes([500, 5, 10, 10], size=None))
    dataset = FMoWRGB(own_rgb_tree)
    with caplog.at_level(logging.WARNING):
        assert dataset[0]["unreadable"] == 0
    assert "the box [500, 5, 10, 10] has no area within the image of" in caplog.text


def test_an_image_without_json(own_rgb_tree: Path) -> None:
    path = json_file(own_rgb_tree)
    path.unlink()
    with pytest.raises(DataError, match=rf"{path.stem}\.jpg: no JSON file describes it"):
        FMoWRGB(own_rgb_tree)


def test_unknown_categories(own_rgb_tree: Path) -> None:
    path = json_file(own_rgb_tree)
    path.unlink()
    path.write_text(with_boxes({"category": "farn", "box": [1, 2, 9, 9]}))
    with pytest.raises(DataError, match=r"has boxes of the category 'farn', which is no class\nDid you mean farm"):
        FMoWRGB(own_rgb_tree)


def test_missing_images(own_rgb_tree: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = FMoWRGB(own_rgb_tree)
    gone = [whole.path(index) for index in range(0, 14, 2)]
    for path in gone:
        path.unlink()
    with pytest.raises(DataError) as caught:
        FMoWRGB(own_rgb_tree)
    message = str(caught.value)
    assert message.startswith(f"7 of the {len(whole)} images of {own_rgb_tree / 'fmow-rgb' / 'train'} are missing")
    assert [str(path) in message for path in gone] == [True] * 5 + [False] * 2
    with caplog.at_level(logging.WARNING):
        rest = FMoWRGB(own_rgb_tree, missing="skip")
    assert str(gone[0]) in caplog.text
    assert len(rest) == len(whole) - 7
    assert rest.path(0) == whole.path(1)
    for index in range(len(rest)):
        rest.path(index).unlink()
    for missing in ("skip", "error"):
        with pytest.raises(SplitNotFoundError, match=f"none of the {len(whole)} images of .*train is there, such as"):
            FMoWRGB(own_rgb_tree, missing=missing)  # type: ignore[arg-type]


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere does not exist\nGive the folder that holds fmow-rgb/"):
        FMoWRGB(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="file is not a folder"):
        FMoWRGB(tmp_path / "file")
    with pytest.raises(DataError, match="neither a list nor a folder of the split 'val'"):
        FMoWRGB(tmp_path, "val")
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match="no sample is left"):
        FMoWRGB(tmp_path)


def damage_truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-300])


def damage_empty(path: Path) -> None:
    path.write_bytes(b"")


def damage_other_format(path: Path) -> None:
    path.write_text("<html>not found</html>")


def damage_png(path: Path) -> None:
    Image.fromarray(np.zeros((48, 48, 3), np.uint8)).save(path, format="png")


def damage_remove(path: Path) -> None:
    path.unlink()


REASONS = {
    damage_truncate: "it is truncated",
    damage_empty: "it is empty",
    damage_other_format: "it is no JPEG file: it starts with the bytes",
    damage_png: "it is no JPEG file: it is a PNG file",
    damage_remove: "No such file or directory",
}


@pytest.mark.parametrize("damage", REASONS)
def test_the_next_readable_image_stands_in(
    own_rgb_tree: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    dataset = FMoWRGB(own_rgb_tree)
    last = len(dataset) - 1
    for index in (3, 4, last):
        damage(dataset.path(index))
    with caplog.at_level(logging.WARNING):
        sample = dataset[3]
        dataset[3]
    assert sample["unreadable"] == 3
    assert torch.equal(sample["image"], dataset[5]["image"])
    assert sample["label"] == dataset.labels[5]
    told = re.findall(rf"{re.escape(str(dataset.path(3)))} cannot be used \((.+)\); the next", caplog.text)
    assert len(told) == 1
    assert REASONS[damage] in told[0]
    assert torch.equal(dataset[last]["image"], dataset[0]["image"])
    assert set(dataset.unreadable.seen) == {3, last}


def test_too_many_unreadable_images(own_rgb_tree: Path) -> None:
    dataset = FMoWRGB(own_rgb_tree, max_unreadable=0.05)
    limit = max(1, int(0.05 * len(dataset)))
    bad = list(range(0, 2 * (limit + 1), 2))
    for index in bad:
        damage_truncate(dataset.path(index))
    for index in bad[:-1]:
        dataset[index]
    with pytest.raises(DataError, match=rf"{limit + 1} of {len(dataset)} tiles .*share of 5\.0%"):
        dataset[bad[-1]]


def test_a_wholly_unreadable_tree_ends_the_search(own_rgb_tree: Path) -> None:
    dataset = FMoWRGB(own_rgb_tree)
    for index in range(len(dataset)):
        damage_empty(dataset.path(index))
    with pytest.raises(DataError, match="cannot be read or hold no data"):
        dataset[0]
