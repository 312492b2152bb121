"""The datamodule of fMoW-RGB, on trees cut from the sample."""

from __future__ import annotations

import logging
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tv

from geoexplora import registry
from geoexplora.bands import FMOW_RGB_STATISTICS
from geoexplora.datamodules import FMoWRGBDataModule
from geoexplora.datamodules.sampling import generator
from geoexplora.datasets import FMoWRGB, write_fmow_rgb_tree
from geoexplora.datasets.statistics import band_statistics
from geoexplora.errors import ConfigError, DataError
from geoexplora.transforms import random_box


@pytest.fixture(scope="module")
def rgb_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only; images of 64 to 96 px."""
    return write_fmow_rgb_tree(tmp_path_factory.mktemp("rgb") / "data", (24, 32), margin=32, limit=3)


def test_batches(rgb_tree: Path) -> None:
    datamodule = FMoWRGBDataModule(rgb_tree, image_size=24, batch_size=10)
    datamodule.setup("fit")
    batches = list(datamodule.train_dataloader())
    assert datamodule.classes == ("farm", "forest", "meadow", "residential", "water")
    assert datamodule.bands == ("R", "G", "B")
    assert datamodule.sensor.name == "rgb"
    for batch in batches:
        assert batch["image"].shape == (10, 3, 24, 24)
        assert batch["image"].dtype == torch.float32
        assert batch["label"].dtype == torch.int64
        assert (batch["unreadable"] == -1).all()
    figure = datamodule.plot({name: value[0] for name, value in batches[0].items()})
    assert figure.axes[0].get_title() in datamodule.classes


def test_splits(rgb_tree: Path, tmp_path: Path) -> None:
    datamodule = FMoWRGBDataModule(rgb_tree)
    assert [datamodule.has_split(split) for split in ("train", "val", "test", "test_gt")] == [True] * 4
    assert [datamodule.has_split(split) for split in ("seq", "seq_gt", "dev")] == [False] * 3
    assert len(datamodule.source("test")) == len(FMoWRGB(rgb_tree, "test"))
    assert datamodule.source("test") is datamodule.source("test_gt")
    with pytest.raises(DataError, match="unknown split"):
        datamodule.source("dev")
    (tmp_path / "val_62classes.csv").touch()
    assert FMoWRGBDataModule(tmp_path).has_split("val")
    assert not FMoWRGBDataModule(tmp_path).has_split("train")


def test_a_sample_is_cropped_normalized_and_resized(rgb_tree: Path) -> None:
    datamodule = FMoWRGBDataModule(rgb_tree, image_size=24, crop="full", seed=3)
    datamodule.setup("fit")
    mean, std = (torch.tensor(part)[:, None, None] for part in (FMOW_RGB_STATISTICS.mean, FMOW_RGB_STATISTICS.std))
    for key in [(0, 0), (0, 7), (4, 7), (2, 30)]:
        raw = FMoWRGB(rgb_tree, crop="full")[key[1]]["image"]
        draws = generator(3, *key)
        box = random_box(*raw.shape[1:], (0.2, 1.0), (3 / 4, 4 / 3), draws)
        expected = tv.resized_crop((raw - mean) / std, *box, [24, 24], InterpolationMode.BICUBIC, antialias=True)
        if torch.rand(1, generator=draws) < 0.5:
            expected = tv.hflip(expected)
        torch.testing.assert_close(datamodule.train_dataset[key]["image"], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("scale", [(0.05, 0.3), (0.2, 1.0), (1.0, 1.0)])
@pytest.mark.parametrize("size", [14, 24])
def test_least_side_spares_no_needed_pixel(size: int, scale: tuple[float, float], rgb_tree: Path) -> None:
    datamodule = FMoWRGBDataModule(rgb_tree, image_size=size, crop_scale=scale)
    least = datamodule.least_side
    assert least == math.ceil(size / math.sqrt(0.75 * scale[0])) or (scale[0] == 1 and least == math.ceil(size / 0.875))
    draws = torch.Generator().manual_seed(0)
    smallest = math.inf
    for long in (1, 1.2, 3):
        for _ in range(300):
            _, _, height, width = random_box(least, math.ceil(least * long), scale, (3 / 4, 4 / 3), draws)
            smallest = min(smallest, height, width)
            assert min(height, width) >= size  # nothing is enlarged
    assert smallest < 1.4 * size  # and not much more is read than needed
    assert int(size / 0.875) <= least  # what evaluation resizes the short side to


def test_images_are_shrunk_as_far_as_the_input_allows(rgb_tree: Path) -> None:
    datamodule = FMoWRGBDataModule(rgb_tree, image_size=14, crop="full", crop_scale=(0.5, 1))
    assert datamodule.least_side == 23
    source = datamodule.source("train")
    whole = FMoWRGB(rgb_tree, crop="full")
    for index in range(len(whole)):
        short, long = sorted(whole.read(index).image.shape[1:])
        factor = max(number for number in (1, 2, 4) if short >= 23 * number)
        assert sorted(source.read(index).image.shape[1:]) == [-(-short // factor), -(-long // factor)]
    datamodule.whole_tiles = 40
    assert datamodule.least_side == 40
    datamodule.setup("fit")
    assert min(source.read(0).image.shape[1:]) >= 40
    assert datamodule.train_dataset[0]["image"].shape == (3, 40, 40)


def test_shrinking_hardly_changes_a_sample(rgb_tree: Path) -> None:
    datamodule = FMoWRGBDataModule(rgb_tree, image_size=14, crop="full", crop_scale=(1, 1))
    view = datamodule.eval_dataset("val")
    differences = []
    for index in range(len(view)):
        shrunk = view[index]["image"]
        datamodule._sources["val"].least_side = None
        differences.append((view[index]["image"] - shrunk).abs().mean())
        datamodule.source("val")
    assert 0 < max(differences) < 0.05  # of a standard deviation


def test_statistics_of_the_data_at_hand(rgb_tree: Path) -> None:
    reference = FMoWRGBDataModule(rgb_tree)
    assert reference.normalization.mean == FMOW_RGB_STATISTICS.mean
    own = FMoWRGBDataModule(rgb_tree, bands=("B", "R"), statistics="dataset")
    expected = band_statistics(FMoWRGB(rgb_tree, bands=("B", "R")), ("B", "R"))
    np.testing.assert_allclose(own.normalization.mean, expected.mean)
    np.testing.assert_allclose(own.normalization.std, expected.std)


def test_settings_reach_the_dataset(rgb_tree: Path) -> None:
    options: dict[str, Any] = {
        "crop": "tight",
        "variant": "msrgb",
        "false_detection": True,
        "years": (2016, 2018),
        "missing": "skip",
        "max_unreadable": 0.5,
    }
    source = FMoWRGBDataModule(rgb_tree, **options).source("train")
    assert isinstance(source, FMoWRGB)
    assert source.crop == "tight"
    assert source.path(0).name.endswith("_msrgb.jpg")
    assert source.classes[-1] == "false_detection"
    assert source.unreadable.share == 0.5
    with pytest.raises(DataError, match="no sample is left"):
        FMoWRGBDataModule(rgb_tree, years=(2001, 2002)).source("train")


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_counted_in_the_main_process(
    rgb_tree: Path, tmp_path: Path, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    root = shutil.copytree(rgb_tree, tmp_path / "own")
    raw = FMoWRGB(root)
    raw.path(2).write_bytes(raw.path(2).read_bytes()[:-50])
    datamodule = FMoWRGBDataModule(root, image_size=16, batch_size=11, num_workers=workers)
    datamodule.setup("fit")
    with caplog.at_level(logging.WARNING):
        for batch in datamodule.train_dataloader():
            datamodule.check_unreadable(batch)
    assert set(datamodule.source("train").unreadable.seen) == {2}
    assert caplog.text.count(f"{raw.path(2)} cannot be used (it is truncated)") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop_scale": (0.5, 0.2)}, "crop scale"),
        ({"crop": "none"}, "unknown crop"),
        ({"variant": "none"}, "unknown variant"),
        ({"normalization": "none"}, "unknown normalization"),
        ({"bands": ("B99",)}, "unknown band"),
        ({"max_unreadable": 3}, "not a share"),
    ],
)
def test_wrong_options(rgb_tree: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FMoWRGBDataModule(rgb_tree, **options)


def test_registry_finds_it() -> None:
    assert registry.load(registry.DATASETS["fmow-rgb"].datamodule) is FMoWRGBDataModule
