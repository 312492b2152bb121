"""The datamodule of the bundled sample."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from geoexplora.bands import FMOW_SENTINEL_BANDS, FMOW_SENTINEL_STATISTICS, SENTINEL2
from geoexplora.datamodules import SampleDataModule
from geoexplora.datasets import sample
from geoexplora.datasets.sample_dataset import area_splits
from geoexplora.datasets.statistics import band_statistics
from geoexplora.errors import ConfigError, DataError
from geoexplora.registry import find_dataset, load

SPLITS = ("train", "val", "test_gt")


@pytest.mark.parametrize("target", ["class", "mask"])
@pytest.mark.parametrize("fold", [0, 6])
def test_splits_keep_to_their_areas(target: Any, fold: int) -> None:
    datamodule = SampleDataModule(target=target, fold=fold, image_size=16, batch_size=8, years=(2000, 2020))
    assert [datamodule.has_split(name) for name in (*SPLITS, "test", "extra")] == [True] * 4 + [False]
    for split in SPLITS:
        assert set(datamodule.eval_dataset(split).location_ids.tolist()) == set(area_splits(fold)[split])
    assert datamodule.target == target
    assert datamodule.classes == sample.CLASSES
    assert (datamodule.sensor, datamodule.bands) == (SENTINEL2, FMOW_SENTINEL_BANDS)
    with pytest.raises(DataError, match="the sample has no split 'extra'\nIt has: train, val, test_gt"):
        datamodule.source("extra")


def test_batches() -> None:
    datamodule = SampleDataModule(image_size=24, batch_size=8)
    datamodule.setup("fit")
    batch = next(iter(datamodule.train_dataloader()))
    assert batch.keys() == {"image", "index", "unreadable", "label"}
    assert batch["image"].shape == (8, 10, 24, 24)
    np.testing.assert_array_equal(batch["label"], datamodule.eval_dataset("train").labels[batch["index"]])
    assert datamodule.ignore_index is None


def test_masks() -> None:
    datamodule = SampleDataModule(target="mask", tile_size=32, image_size=32, batch_size=8)
    datamodule.setup("fit")
    batch = next(iter(datamodule.train_dataloader()))
    assert batch["mask"].shape == (8, 32, 32)
    assert set(batch["mask"].unique().tolist()) <= {0, 1, 2, 3, 4, 255}
    assert datamodule.ignore_index == 255
    view = datamodule.eval_dataset("test")
    assert torch.equal(view[2]["mask"], torch.as_tensor(view.source.read(2).target, dtype=torch.int64))
    assert torch.equal(view[2]["image"], datamodule.normalization(torch.from_numpy(
        view.source.read(2).image.astype(np.float32))))  # fmt: skip


def test_the_whole_scene_without_targets() -> None:
    datamodule = SampleDataModule(target="none", tile_size=96, image_size=16, batch_size=4)
    assert [datamodule.has_split(name) for name in SPLITS] == [True, False, False]
    datamodule.setup("fit")
    assert len(datamodule.source("train")) == 768 * 1536 // 96**2
    assert next(iter(datamodule.train_dataloader())).keys() == {"image", "index", "unreadable"}
    assert (datamodule.target, datamodule.classes) == ("none", ())


def test_statistics() -> None:
    reference = SampleDataModule().normalization
    wanted = FMOW_SENTINEL_STATISTICS.select(FMOW_SENTINEL_BANDS)
    assert (reference.method, reference.mean, reference.std) == ("clip-uint8", wanted.mean, wanted.std)
    own = SampleDataModule(statistics="dataset", normalization="standardize")
    found = band_statistics(own.source("train"), own.bands)
    assert (own.normalization.mean, own.normalization.std) == (found.mean, found.std)
    assert own.normalization.mean != reference.mean
    stored = SampleDataModule(statistics="dataset", normalization=reference)
    assert stored.normalization == reference


@pytest.mark.parametrize("target", [None, "class", "mask"])
def test_registry_finds_it(target: str | None) -> None:
    entry = find_dataset("sample")
    assert (entry.needs_root, entry.sensor, entry.settings) == (False, "sentinel-2", ("tile_size", "fold"))
    assert entry.targets == ("class", "mask")
    chosen = {} if target is None else {"target": target}
    datamodule = load(entry.datamodule)(None, tile_size=32, fold=3, **chosen)
    assert isinstance(datamodule, SampleDataModule)
    assert datamodule.target == (target or "class")
    assert set(datamodule.eval_dataset("test").location_ids.tolist()) == {3}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fold": 8}, "the sample has no fold 8"),
        ({"bands": ("B99",)}, "unknown band"),
        ({"batch_size": 0}, "batch size 0"),
        ({"normalization": "none"}, "unknown normalization"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SampleDataModule(**options)
