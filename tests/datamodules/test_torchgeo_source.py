"""The datamodule of TorchGeo's datasets."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt

from geoexplora.bands import SENTINEL2
from geoexplora.datamodules.torchgeo_source import TorchGeoDataModule
from geoexplora.errors import ConfigError, DataError
from geoexplora.registry import find_dataset, load
from geoexplora.tasks.run_records import data_record
from geoexplora.transforms.normalization import Normalization

from ..datasets.torchgeo_trees import (
    CLASSES,
    EUROSAT_ON_DISK,
    TRAIN,
    VAL,
    files,
    photograph,
    spectrum,
    write_eurosat,
    write_resisc45,
)


@pytest.fixture(scope="module")
def resisc45(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only."""
    return write_resisc45(tmp_path_factory.mktemp("resisc45"))


@pytest.fixture(scope="module")
def eurosat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only."""
    return write_eurosat(tmp_path_factory.mktemp("eurosat"))


def test_batches(resisc45: Path) -> None:
    datamodule = TorchGeoDataModule(resisc45, name="RESISC45", image_size=16, batch_size=3, years=(2000, 2020))
    datamodule.setup("fit")
    batches = list(datamodule.train_dataloader())
    assert sum(len(batch["image"]) for batch in batches) >= len(CLASSES) * TRAIN - 2
    assert batches[0]["image"].shape == (3, 3, 16, 16)
    assert batches[0]["image"].dtype == torch.float32
    assert {int(label) for batch in batches for label in batch["label"]} == {0, 1}
    assert datamodule.classes == CLASSES
    assert [datamodule.has_split(split) for split in ("train", "val", "test", "test_gt", "extra")] == [1, 1, 1, 1, 0]
    view = datamodule.eval_dataset("val")
    assert view.labels.tolist() == [0] * VAL + [1] * VAL
    assert [int(view[index]["label"]) for index in range(len(view))] == view.labels.tolist()
    figure = datamodule.plot(view[0])
    assert figure.axes[0].get_title() == CLASSES[0]
    plt.close(figure)


def test_statistics_are_those_of_the_training_images(eurosat: Path, caplog: pytest.LogCaptureFixture) -> None:
    bands = ("B12", "B8A", "B2")
    with caplog.at_level(logging.INFO, logger="geoexplora"):
        datamodule = TorchGeoDataModule(
            eurosat, name="EuroSAT", bands=bands, normalization="standardize", statistics="reference"
        )
    text = "no reference statistics are known for TorchGeo's EuroSAT; taking those of its training images"
    assert text in caplog.text
    stack = np.stack([spectrum(100 * number + index) for number in range(len(CLASSES)) for index in range(TRAIN)])
    pixels = stack[:, [EUROSAT_ON_DISK.index(band) for band in bands]].astype(np.float64)
    np.testing.assert_allclose(datamodule.normalization.mean, pixels.mean((0, 2, 3)), rtol=1e-9)
    np.testing.assert_allclose(datamodule.normalization.std, pixels.std((0, 2, 3)), rtol=1e-9)
    assert (datamodule.sensor, datamodule.bands, datamodule.normalization.bands) == (SENTINEL2, bands, bands)
    caplog.clear()
    again = TorchGeoDataModule(eurosat, name="EuroSAT", bands=bands, normalization="standardize", statistics="dataset")
    assert again.normalization.to_dict() == datamodule.normalization.to_dict()
    assert not caplog.text


def test_stored_normalization_is_kept(resisc45: Path) -> None:
    stored = Normalization("standardize", ("B", "R"), (30.0, 100.0), (5.0, 6.0))
    datamodule = TorchGeoDataModule(
        resisc45, name="RESISC45", bands=("blue", "red"), image_size=24, normalization=stored, antialias=True
    )
    assert datamodule.normalization == stored
    with pytest.raises(ConfigError, match="normalization is for B,R, the images hold R,G,B"):
        TorchGeoDataModule(resisc45, name="RESISC45", normalization=stored)


def test_resuming_notices_other_data(tmp_path: Path) -> None:
    root = write_resisc45(tmp_path)

    def record() -> dict[str, object]:
        return data_record(TorchGeoDataModule(root, name="RESISC45"))

    before = record()
    assert before == record()
    path = files(root)[0]
    path.rename(path.with_name("Forest_9.jpg"))
    split = root / "resisc45-train.txt"
    split.write_text(split.read_text().replace("Forest_1.jpg", "Forest_9.jpg"))
    assert record()["rows"] != before["rows"]
    assert record()["images"] == before["images"]


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_images_are_noted_in_the_main_process(tmp_path: Path, workers: int) -> None:
    root = write_resisc45(tmp_path)
    datamodule = TorchGeoDataModule(
        root, name="RESISC45", image_size=16, batch_size=8, num_workers=workers, max_unreadable=0.2
    )
    datamodule.setup("fit")
    source = datamodule.source("train")
    source.path(5).write_bytes(b"broken")
    for batch in datamodule.train_dataloader():
        datamodule.check_unreadable(batch)
    assert set(source.unreadable.seen) == {5}
    assert "River_2.jpg (it is no image of a known format)" in source.unreadable.seen[5]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"name": "RESISC"}, ConfigError, "no dataset 'RESISC'"),
        ({"name": "NAIP"}, ConfigError, "GeoDataset"),
        ({"name": "UCMerced"}, DataError, "finds no UCMerced"),
        ({"bands": ("B2",)}, ConfigError, "unknown band 'B2' for rgb"),
        ({"max_unreadable": 2}, ConfigError, "not a share"),
        ({"batch_size": 0}, ConfigError, "batch size 0"),
        ({"normalization": "none"}, ConfigError, "unknown normalization"),
    ],
)
def test_wrong_options(resisc45: Path, options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TorchGeoDataModule(resisc45, **({"name": "RESISC45"} | options))


def test_splits_that_are_not_there(tmp_path: Path) -> None:
    root = write_resisc45(tmp_path)
    datamodule = TorchGeoDataModule(root, name="RESISC45")
    with pytest.raises(DataError, match=r"TorchGeo's RESISC45 cannot read .*resisc45-test\.txt"):
        datamodule.source("test")
    with pytest.raises(DataError, match="RESISC45 has no split 'extra'\nIt has: train, val, test_gt"):
        datamodule.source("extra")


def test_registry_finds_it(resisc45: Path) -> None:
    entry = find_dataset("torchgeo:RESISC45")
    datamodule = load(entry.datamodule)(resisc45, **entry.arguments)
    assert isinstance(datamodule, TorchGeoDataModule)
    expected = np.stack([photograph(0), photograph(1)]).transpose(0, 3, 1, 2)
    found = np.stack([datamodule.source("train").read(index).image for index in (0, 1)])
    assert np.abs(found - expected).mean() < 5  # what JPEG leaves
