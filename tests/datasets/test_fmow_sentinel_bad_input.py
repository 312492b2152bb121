"""fMoW-Sentinel trees that are not as they should be: one clear message with the remedy."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import rasterio
import tifffile
import torch

from geoexplora.bands import SENTINEL2
from geoexplora.datasets.fmow_sentinel import FMoWSentinel
from geoexplora.errors import DataError, SplitNotFoundError


def overwrite(path: Path, image: np.ndarray[Any, Any], **more: Any) -> None:
    count, height, width = image.shape
    options = {"driver": "GTiff", "count": count, "height": height, "width": width, "dtype": image.dtype} | more
    with rasterio.open(path, "w", **options) as file:
        file.write(image)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere does not exist\nGive the folder"):
        FMoWSentinel(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="file is not a folder"):
        FMoWSentinel(tmp_path / "file")


def test_no_csv(own_tree: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError) as caught:
        FMoWSentinel(tmp_path / "empty")
    assert str(tmp_path / "empty" / "train.csv") in str(caught.value)
    assert str(tmp_path / "empty" / "fmow-sentinel" / "train.csv") in str(caught.value)
    (own_tree / "val.csv").unlink()
    with pytest.raises(DataError, match=r"no csv file for the split 'val'.*There is only train.csv, test_gt.csv"):
        FMoWSentinel(own_tree, "val")


def test_missing_columns(own_tree: Path) -> None:
    path = own_tree / "train.csv"
    frame = pd.read_csv(path, index_col=0)
    frame.rename(columns={"timestamp": "time"}).drop(columns="image_id").to_csv(path)
    with pytest.raises(DataError, match="has no column image_id, timestamp; it has category, location_id, time, pol"):
        FMoWSentinel(own_tree)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00\x81", b'category,"\n1,2'])
def test_not_a_csv(own_tree: Path, content: bytes) -> None:
    (own_tree / "train.csv").write_bytes(content)
    with pytest.raises(DataError, match=r"train\.csv"):
        FMoWSentinel(own_tree)


def test_no_rows(own_tree: Path) -> None:
    rows = len(FMoWSentinel(own_tree))
    with pytest.raises(DataError, match=f"no tile is left of the {rows} rows of .*: {rows} outside the years 1990 to"):
        FMoWSentinel(own_tree, years=(1990, 1991))
    pd.read_csv(own_tree / "train.csv", index_col=0).iloc[:0].to_csv(own_tree / "train.csv")
    with pytest.raises(DataError, match="no tile is left of the 0 rows"):
        FMoWSentinel(own_tree)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("timestamp", "yesterday", r"1 malformed timestamp value: 'yesterday' in line 4\n.*look like 2017-"),
        ("timestamp", "", "1 malformed timestamp value: '' in line 4"),
        ("image_id", "12a", "1 malformed image_id value: '12a' in line 4"),
        ("image_id", "1.5", "1 malformed image_id value: '1.5' in line 4"),
        ("location_id", "-3", "1 malformed location_id value: '-3' in line 4"),
        ("category", "", "1 malformed category value: '' in line 4"),
    ],
)
def test_malformed_values(own_tree: Path, column: str, value: str, message: str) -> None:
    frame = pd.read_csv(own_tree / "train.csv", index_col=0, dtype=str)
    frame.loc["2", column] = value
    frame.to_csv(own_tree / "train.csv")
    with pytest.raises(DataError, match=message):
        FMoWSentinel(own_tree)


def test_a_line_cut_short(own_tree: Path) -> None:
    path = own_tree / "train.csv"
    path.write_text(path.read_text() + "999,forest\n")
    with pytest.raises(DataError, match="1 malformed location_id value: ''"):
        FMoWSentinel(own_tree)


def test_missing_files(own_tree: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = FMoWSentinel(own_tree)
    gone = [whole.path(index) for index in range(0, 14, 2)]
    for path in gone:
        path.unlink()
    with pytest.raises(DataError) as caught:
        FMoWSentinel(own_tree)
    message = str(caught.value)
    assert f"7 of the {len(whole)} tiles" in message
    assert [str(path) in message for path in gone] == [True] * 5 + [False] * 2
    assert "--missing skip" in message
    with caplog.at_level(logging.WARNING):
        rest = FMoWSentinel(own_tree, missing="skip")
    assert "7 of the" in caplog.text
    assert str(gone[0]) in caplog.text
    assert len(rest) == len(whole) - 7
    assert rest.path(0) == whole.path(1)
    for index in range(len(rest)):
        rest.path(index).unlink()
    for missing in ("skip", "error"):
        with pytest.raises(
            SplitNotFoundError, match=rf"none of the {len(whole)} tiles that .*train\.csv names is there"
        ):
            FMoWSentinel(own_tree, missing=missing)


def damage_truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:700])


def damage_empty(path: Path) -> None:
    path.write_bytes(b"")


def damage_other_format(path: Path) -> None:
    path.write_text("<html>not found</html>")


def damage_nodata(path: Path) -> None:
    overwrite(path, np.zeros((13, 16, 16), np.uint16))


def damage_nan(path: Path) -> None:
    overwrite(path, np.full((13, 16, 16), np.nan, np.float32))


def damage_tagged_float(path: Path) -> None:
    overwrite(path, np.full((13, 16, 16), -9999, np.float32), nodata=-9999)


def damage_tagged_integer(path: Path) -> None:
    overwrite(path, np.full((13, 16, 16), 65535, np.uint16), nodata=65535, interleave="band")


def damage_tagged_bigtiff(path: Path) -> None:
    overwrite(path, np.full((13, 16, 16), 7, np.uint16), nodata=7, BIGTIFF="YES")


def damage_remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize(
    "damage",
    [
        damage_truncate,
        damage_empty,
        damage_other_format,
        damage_nodata,
        damage_nan,
        damage_tagged_float,
        damage_tagged_integer,
        damage_tagged_bigtiff,
        damage_remove,
    ],
)
def test_the_next_readable_tile_stands_in(own_tree: Path, damage: Any, caplog: pytest.LogCaptureFixture) -> None:
    dataset = FMoWSentinel(own_tree)
    last = len(dataset) - 1
    damage(dataset.path(3))
    damage(dataset.path(4))
    damage(dataset.path(last))
    with caplog.at_level(logging.WARNING):
        sample = dataset[3]
        dataset[3]
    assert sample["unreadable"] == 3
    assert torch.equal(sample["image"], dataset[5]["image"])
    assert sample["label"] == dataset.labels[5]
    assert caplog.text.count(str(dataset.path(3))) == 1
    assert torch.equal(dataset[last]["image"], dataset[0]["image"])
    assert set(dataset.unreadable.seen) == {3, last}


def test_too_many_unreadable_tiles(own_tree: Path) -> None:
    dataset = FMoWSentinel(own_tree, max_unreadable=0.05)
    limit = int(0.05 * len(dataset))
    bad = list(range(0, 2 * (limit + 1), 2))
    for index in bad:
        damage_truncate(dataset.path(index))
    for index in bad[:-1]:
        dataset[index]
    with pytest.raises(DataError) as caught:
        dataset[bad[-1]]
    message = str(caught.value)
    assert f"{limit + 1} of {len(dataset)} tiles" in message
    assert "share of 5.0%" in message
    assert str(dataset.path(0)) in message


def test_one_unreadable_tile_is_always_borne(own_tree: Path) -> None:
    dataset = FMoWSentinel(own_tree, max_unreadable=0)
    damage_truncate(dataset.path(0))
    damage_truncate(dataset.path(2))
    assert dataset[0]["unreadable"] == 0
    with pytest.raises(DataError, match="2 of"):
        dataset[2]


def test_a_wholly_unreadable_tree_ends_the_search(own_tree: Path) -> None:
    dataset = FMoWSentinel(own_tree)
    for index in range(len(dataset)):
        damage_empty(dataset.path(index))
    with pytest.raises(DataError, match="cannot be read or hold no data"):
        dataset[0]


@pytest.mark.parametrize("count", [10, 14, 3, 1])
def test_wrong_number_of_bands(own_tree: Path, count: int) -> None:
    dataset = FMoWSentinel(own_tree)
    overwrite(dataset.path(2), np.ones((count, 16, 16), np.uint16))
    with pytest.raises(DataError, match=rf"{dataset.path(2).name} has {count} bands?, not 13\nAll tiles must"):
        dataset[2]


@pytest.mark.parametrize("interleave", ["pixel", "band"])
@pytest.mark.parametrize(
    ("count", "height", "width"), [(3, 13, 16), (3, 16, 13), (16, 13, 13), (13, 13, 16), (13, 16, 13), (13, 13, 13)]
)
def test_bands_are_not_told_from_sizes(own_tree: Path, count: int, height: int, width: int, interleave: str) -> None:
    dataset = FMoWSentinel(own_tree, bands=SENTINEL2.band_names)
    image = np.arange(1, count * height * width + 1, dtype=np.uint16).reshape(count, height, width)
    overwrite(dataset.path(0), image, interleave=interleave)
    if count == 13:
        np.testing.assert_array_equal(dataset[0]["image"].numpy(), image)
    else:
        with pytest.raises(DataError, match=f"has {count} bands, not 13"):
            dataset[0]


@pytest.mark.parametrize(("height", "width"), [(1, 5), (5, 1), (1, 1)])
@pytest.mark.parametrize(
    "options", [{"ENDIANNESS": "BIG"}, {"interleave": "band"}, {"BIGTIFF": "YES"}, {"tiled": True}]
)
def test_layouts(own_tree: Path, height: int, width: int, options: dict[str, Any]) -> None:
    dataset = FMoWSentinel(own_tree, bands=SENTINEL2.band_names)
    image = np.arange(1, 13 * height * width + 1, dtype=np.uint16).reshape(13, height, width)
    overwrite(dataset.path(0), image, nodata=9, **options)
    read = dataset[0]["image"].numpy()
    assert (read == image).sum() == image.size - 1
    assert (read[image == 9] != 9).all()


@pytest.mark.parametrize("damage", [damage_truncate, damage_empty, damage_nodata, damage_remove])
def test_the_warning_tells_the_reason(own_tree: Path, damage: Any, caplog: pytest.LogCaptureFixture) -> None:
    dataset = FMoWSentinel(own_tree, max_unreadable=0)
    damage(dataset.path(0))
    damage(dataset.path(2))
    with caplog.at_level(logging.WARNING):
        dataset[0]
    reasons = {damage_nodata: "it holds nothing but nodata or NaN", damage_remove: "No such file or directory"}
    told = re.search(rf"{re.escape(str(dataset.path(0)))} cannot be used \((.+)\); the next", caplog.text)
    assert told is not None
    assert reasons.get(damage, "") in told[1]
    with pytest.raises(DataError, match=rf"{re.escape(str(dataset.path(2)))} \(.+\)"):
        dataset[2]


def test_missing_pixels_hold_the_bands_mean(own_tree: Path) -> None:
    dataset = FMoWSentinel(own_tree)
    image = np.full((13, 16, 16), 7, np.float32)
    image[1, 2, 3] = np.nan
    image[2, 0, 0], image[2, 0, 1], image[2, 1, 1] = np.nan, 7 + 254, -np.inf
    image[11] = np.nan
    overwrite(dataset.path(0), image)
    read = dataset[0]["image"]
    assert read[0, 2, 3] == 7
    assert read[1, 0, 0] == read[1, 1, 1] == 8  # 254 pixels with a sum of 254 * 8
    assert (read[8] == torch.tensor(1732.16362238)).all()  # B11 has no pixel of its own: the published mean
    assert (read[[2, 3, 4, 5, 6, 7, 9]] == 7).all()


@pytest.mark.parametrize(
    ("kind", "value"), [("float32", -9999), ("float32", -3.4e38), ("int16", -1), ("uint16", 65535)]
)
def test_nodata_pixels_are_missing(own_tree: Path, kind: str, value: float) -> None:
    dataset = FMoWSentinel(own_tree)
    image = np.full((13, 16, 16), 7, kind)
    image[:, :8] = value
    overwrite(dataset.path(0), image, nodata=value)
    sample = dataset[0]
    assert sample["unreadable"] == -1
    assert (sample["image"] == 7).all()
    overwrite(dataset.path(0), image)  # without the tag it is a value like others
    assert (dataset[0]["image"][:, :8] == torch.tensor(value, dtype=torch.float32)).all()


@pytest.mark.parametrize("value", [-9999, 0.5, float("nan")])
def test_a_tag_that_the_type_cannot_hold(own_tree: Path, value: float) -> None:
    dataset = FMoWSentinel(own_tree, bands=SENTINEL2.band_names)
    image = np.random.default_rng(0).integers(0, 9999, (13, 16, 16), dtype=np.uint16)
    with tifffile.TiffWriter(dataset.path(0)) as file:
        file.write(
            image, planarconfig="separate", photometric="minisblack", extratags=[(42113, 2, 0, str(value), True)]
        )
    np.testing.assert_array_equal(dataset[0]["image"].numpy(), image)
