"""fMoW-Sentinel trees, as they should be."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Sized
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import rasterio
import torch
from matplotlib import pyplot as plt

from geoexplora.bands import FMOW_SENTINEL_BANDS, SENTINEL2
from geoexplora.datasets.fmow_index import OFFICIAL_CLASSES, SPLITS
from geoexplora.datasets.fmow_sentinel import FMoWSentinel
from geoexplora.errors import ConfigError, DataError

CLASSES = ("farm", "forest", "meadow", "residential", "water")


def edit_csv(path: Path, **columns: object) -> None:
    frame = pd.read_csv(path, index_col=0)
    frame.assign(**columns).to_csv(path)


def rename_category(root: Path, old: str, new: str) -> None:
    """In all csv files and folders."""
    for split in SPLITS:
        path = root / f"{split}.csv"
        path.write_text(path.read_text().replace(f",{old},", f",{new},"))
        folder = root / "fmow-sentinel" / split
        for file in list((folder / old).glob("*/*.tif")):
            target = folder / new / file.parent.name.replace(old, new) / file.name.replace(old, new)
            target.parent.mkdir(parents=True, exist_ok=True)
            file.rename(target)


def test_samples(fmow_tree: Path) -> None:
    dataset = FMoWSentinel(fmow_tree)
    assert dataset.classes == CLASSES
    assert dataset.bands == FMOW_SENTINEL_BANDS
    frame = pd.read_csv(fmow_tree / "train.csv")
    assert len(dataset) == len(frame)
    for index in (0, 5, len(dataset) - 1):
        sample, row = dataset[index], frame.iloc[index]
        with rasterio.open(dataset.path(index)) as file:
            expected = file.read([number + 1 for number in SENTINEL2.indices(FMOW_SENTINEL_BANDS)])
        assert sample["image"].dtype == torch.float32
        np.testing.assert_array_equal(sample["image"].numpy(), expected)
        assert sample["label"].dtype == torch.int64
        assert dataset.classes[sample["label"]] == row["category"]
        assert dataset.path(index).name == f"{row['category']}_{row['location_id']}_{row['image_id']}.tif"
        assert sample["unreadable"] == -1
    assert torch.equal(dataset[-1]["image"], dataset[len(dataset) - 1]["image"])
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def test_bands_are_chosen_by_name_and_order(fmow_tree: Path) -> None:
    whole = FMoWSentinel(fmow_tree, bands=SENTINEL2.band_names)[0]["image"]
    chosen = FMoWSentinel(fmow_tree, bands=("B8A", "red", "B02"))
    assert chosen.bands == ("B8A", "B4", "B2")
    assert torch.equal(chosen[0]["image"], whole[[8, 3, 1]])
    with pytest.raises(ConfigError, match="unknown band 'B13'"):
        FMoWSentinel(fmow_tree, bands=("B13",))


def test_splits(fmow_tree: Path) -> None:
    by_split = {split: FMoWSentinel(fmow_tree, split) for split in SPLITS}
    blocks = {split: set(dataset.location_ids.tolist()) for split, dataset in by_split.items()}
    assert not blocks["train"] & blocks["val"]
    assert not blocks["train"] & blocks["test_gt"]
    assert all(set(dataset.labels.tolist()) == set(range(5)) for dataset in by_split.values())
    assert len(FMoWSentinel(fmow_tree, "test")) == len(by_split["test_gt"])
    with pytest.raises(DataError, match="unknown split 'dev'"):
        FMoWSentinel(fmow_tree, "dev")


def test_root_may_be_the_inner_folder(own_tree: Path) -> None:
    beside = FMoWSentinel(own_tree / "fmow-sentinel")
    for split in SPLITS:
        shutil.move(own_tree / f"{split}.csv", own_tree / "fmow-sentinel" / f"{split}.csv")
    for root in (own_tree, own_tree / "fmow-sentinel"):
        inside = FMoWSentinel(root)
        assert len(inside) == len(beside)
        assert inside.path(3) == beside.path(3)


def test_index_column_column_order_and_fractional_seconds(own_tree: Path) -> None:
    expected = FMoWSentinel(own_tree)
    frame = pd.read_csv(own_tree / "train.csv", index_col=0)
    frame["timestamp"] = [
        "2017-02-16T10:21:01.024Z" if row % 2 else "2017-02-16T10:21:01Z" for row in range(len(frame))
    ]
    frame[["timestamp", "image_id", "polygon", "location_id", "category"]].to_csv(own_tree / "train.csv", index=False)
    dataset = FMoWSentinel(own_tree)
    np.testing.assert_array_equal(dataset.labels, expected.labels)
    np.testing.assert_array_equal(dataset.image_ids, expected.image_ids)
    assert set(dataset.timestamps) == {np.datetime64("2017-02-16T10:21:01")}


def test_the_csv_decides_not_the_folder(own_tree: Path) -> None:
    frame = pd.read_csv(own_tree / "train.csv", index_col=0)
    frame.iloc[::2].to_csv(own_tree / "train.csv")
    dataset = FMoWSentinel(own_tree)
    assert len(dataset) == len(frame.iloc[::2])
    assert dataset.image_ids.tolist() == frame["image_id"].tolist()[::2]


def test_year_filter(own_tree: Path) -> None:
    frame = pd.read_csv(own_tree / "train.csv", index_col=0)
    frame.loc[0, "timestamp"] = "1999-12-31T23:59:59Z"
    frame.loc[1, "timestamp"] = "2020-12-31T23:59:59.9Z"
    frame.loc[2, "timestamp"] = "2021-01-01T00:00:00Z"
    frame.to_csv(own_tree / "train.csv")
    assert len(FMoWSentinel(own_tree)) == len(frame) - 2
    assert len(FMoWSentinel(own_tree, years=None)) == len(frame)
    assert len(FMoWSentinel(own_tree, years=(2020, 2021))) == 2


def test_official_classes_keep_their_numbers(own_tree: Path) -> None:
    assert len(OFFICIAL_CLASSES) == len(set(OFFICIAL_CLASSES)) == 62
    assert tuple(sorted(OFFICIAL_CLASSES)) == OFFICIAL_CLASSES
    names = {"farm": "crop_field", "forest": "park", "meadow": "zoo", "residential": "airport", "water": "lake_or_pond"}
    for old, new in names.items():
        rename_category(own_tree, old, new)
    dataset = FMoWSentinel(own_tree)
    assert dataset.classes == OFFICIAL_CLASSES
    assert set(dataset.labels.tolist()) == {OFFICIAL_CLASSES.index(name) for name in names.values()}


def test_a_class_of_another_split_counts(own_tree: Path) -> None:
    path = own_tree / "val.csv"
    path.write_text(path.read_text().replace(",water,", ",aaa,"))
    dataset = FMoWSentinel(own_tree)
    assert dataset.classes == ("aaa", *CLASSES)
    assert set(dataset.labels.tolist()) == set(range(1, 6))


def test_tile_sizes_vary(unlabelled_tree: Path) -> None:
    dataset = FMoWSentinel(unlabelled_tree)
    assert dataset.classes == ("unlabelled",)
    shapes = {tuple(dataset[index]["image"].shape[1:]) for index in range(len(dataset))}
    assert len(shapes) > 10
    assert all(20 <= side <= 40 for shape in shapes for side in shape)


@pytest.mark.parametrize(
    "profile",
    [
        {"interleave": "band", "compress": "deflate"},
        {"interleave": "pixel", "compress": "lzw", "predictor": 2},
        {"interleave": "pixel", "compress": None},
        {"interleave": "pixel", "compress": "zstd"},
        {"interleave": "pixel", "tiled": True, "blockxsize": 16, "blockysize": 16},
        {"interleave": "pixel", "dtype": "float32", "compress": "deflate", "predictor": 3},
        {"interleave": "band", "dtype": "int16", "BIGTIFF": "YES"},
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(16, 18), (13, 20), (13, 13)])
def test_any_geotiff_reads_as_gdal_reads_it(own_tree: Path, profile: dict[str, object], shape: tuple[int, int]) -> None:
    dataset = FMoWSentinel(own_tree)
    # 13 rows look like 13 bands: the ambiguity must not be guessed at.
    image = np.random.default_rng(0).integers(1, 5000, (13, *shape)).astype(str(profile.get("dtype", "uint16")))
    options = {"driver": "GTiff", "count": 13, "height": shape[0], "width": shape[1], "dtype": image.dtype, **profile}
    with rasterio.open(dataset.path(0), "w", **options) as file:
        file.write(image)
    keep = list(SENTINEL2.indices(FMOW_SENTINEL_BANDS))
    np.testing.assert_array_equal(dataset[0]["image"].numpy(), image[keep].astype(np.float32))


def test_transforms(fmow_tree: Path) -> None:
    dataset = FMoWSentinel(fmow_tree, transforms=lambda sample: {**sample, "image": sample["image"] * 0})
    assert (dataset[0]["image"] == 0).all()


def test_workers_share_arrays_not_frames(fmow_tree: Path) -> None:
    dataset = FMoWSentinel(fmow_tree)
    held = {name: value for name, value in vars(dataset).items() if isinstance(value, Sized) and len(value) > 20}
    assert held
    assert all(isinstance(value, np.ndarray | str) for value in held.values())
    assert not any(value.dtype == object for value in held.values() if isinstance(value, np.ndarray))
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[0]["image"], dataset[0]["image"])


def test_plot(fmow_tree: Path) -> None:
    dataset = FMoWSentinel(fmow_tree)
    figure = dataset.plot({**dataset[0], "prediction": 4}, suptitle="a title")
    assert "predicted: water" in figure.axes[0].get_title()
    picture = np.asarray(figure.axes[0].images[0].get_array())
    assert picture.shape == (16, 16, 3)
    assert picture.min() == 0
    assert picture.max() == 1
    plt.close(figure)
    grey = FMoWSentinel(fmow_tree, bands=("B11", "B12"))
    figure = grey.plot(grey[0], show_titles=False)
    assert np.asarray(figure.axes[0].images[0].get_array()).shape == (16, 16)
    plt.close(figure)
