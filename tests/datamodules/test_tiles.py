"""Views, loaders and datamodules, on trees cut from the sample."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from matplotlib import pyplot as plt
from torch.utils.data import DataLoader
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tv

from geoexplora import registry
from geoexplora.bands import FMOW_SENTINEL_BANDS, FMOW_SENTINEL_STATISTICS
from geoexplora.datamodules import FMoWSentinelDataModule, PhotographsDataModule, StepBatchSampler
from geoexplora.datamodules.sampling import generator
from geoexplora.datasets import FMoWSentinel
from geoexplora.errors import ConfigError, DataError, user_message
from geoexplora.transforms import Normalization, random_box


def batches(datamodule: FMoWSentinelDataModule) -> list[dict[str, torch.Tensor]]:
    datamodule.setup("fit")
    return list(datamodule.train_dataloader())


def assert_equal(first: list[dict[str, torch.Tensor]], second: list[dict[str, torch.Tensor]]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_batches(unlabelled_tree: Path) -> None:
    datamodule = FMoWSentinelDataModule(unlabelled_tree, image_size=24, batch_size=10)
    found = batches(datamodule)
    assert len(found) == len(datamodule.train_dataloader()) == 5
    assert datamodule.classes == ("unlabelled",)
    assert datamodule.bands == FMOW_SENTINEL_BANDS
    assert datamodule.sensor.name == "sentinel-2"
    assert not datamodule.has_split("val")
    assert datamodule.val_dataset is None
    for batch in found:
        assert batch["image"].shape == (10, 10, 24, 24)
        assert batch["image"].dtype == torch.float32
        assert batch["label"].dtype == torch.int64
        assert (batch["unreadable"] == -1).all()
        assert 0 < batch["image"].mean() < 1


def test_a_sample_is_the_reference_preprocessing(unlabelled_tree: Path) -> None:
    datamodule = FMoWSentinelDataModule(unlabelled_tree, image_size=24, seed=3)
    datamodule.setup("fit")
    statistics = FMOW_SENTINEL_STATISTICS.select(FMOW_SENTINEL_BANDS)
    mean, std = (np.array(part)[:, None, None] for part in (statistics.mean, statistics.std))
    for key in [(0, 0), (0, 7), (4, 7), (2, 30)]:
        raw = FMoWSentinel(unlabelled_tree)[key[1]]["image"].double().numpy()
        low = mean - 2 * std
        levels = np.clip((raw - low) / (4 * std) * 255, 0, 255).astype(np.uint8)
        draws = generator(3, *key)
        box = random_box(*raw.shape[1:], (0.2, 1.0), (3 / 4, 4 / 3), draws)
        image = torch.from_numpy(levels).float() / 255
        expected = tv.resized_crop(image, *box, [24, 24], InterpolationMode.BICUBIC, antialias=False)
        if torch.rand(1, generator=draws) < 0.5:
            expected = tv.hflip(expected)
        found = datamodule.train_dataset[key]["image"]
        # A level is 1/255: float32 and float64 may truncate a rare pixel to neighbouring ones.
        assert ((found - expected).abs() > 1e-5).float().mean() < 0.005
        assert (found - expected).abs().max() < 0.01


def test_evaluation_view(fmow_tree: Path) -> None:
    datamodule = FMoWSentinelDataModule(fmow_tree, image_size=16)
    view = datamodule.eval_dataset("test")
    raw = FMoWSentinel(fmow_tree, "test")
    np.testing.assert_array_equal(view.labels, raw.labels)
    np.testing.assert_array_equal(view.location_ids, raw.location_ids)
    assert [int(view[index]["label"]) for index in range(len(view))] == view.labels.tolist()
    normalized = datamodule.normalization(raw[4]["image"])
    resized = tv.resize(normalized, [18, 18], InterpolationMode.BICUBIC, antialias=False)
    torch.testing.assert_close(view[4]["image"], tv.center_crop(resized, [16, 16]), rtol=0, atol=2e-6)
    assert torch.equal(view[4]["image"], view[4]["image"])
    loaded = next(iter(datamodule.eval_dataloader("test")))
    assert torch.equal(loaded["image"][4], view[4]["image"])


def test_order_does_not_depend_on_workers(fmow_tree: Path) -> None:
    none = batches(FMoWSentinelDataModule(fmow_tree, image_size=16, batch_size=20, seed=4))
    two = batches(FMoWSentinelDataModule(fmow_tree, image_size=16, batch_size=20, seed=4, num_workers=2))
    other = batches(FMoWSentinelDataModule(fmow_tree, image_size=16, batch_size=20, seed=5))
    assert_equal(none, two)
    assert not torch.equal(none[0]["image"], other[0]["image"])


def test_training_is_taken_up_again(fmow_tree: Path) -> None:
    whole = FMoWSentinelDataModule(fmow_tree, image_size=16, batch_size=20)
    whole.num_batches = 7
    rest = FMoWSentinelDataModule(fmow_tree, image_size=16, batch_size=20)
    rest.num_batches, rest.first_batch = 7, 4
    assert_equal(batches(whole)[4:], batches(rest))
    assert len(rest.train_dataloader()) == 7


def test_augmentation_depends_on_the_epoch(fmow_tree: Path) -> None:
    datamodule = FMoWSentinelDataModule(fmow_tree, image_size=16)
    datamodule.setup("fit")
    view = datamodule.train_dataset
    torch.manual_seed(1)
    first = view[(1, 5)]["image"]
    torch.manual_seed(2)
    assert torch.equal(first, view[(1, 5)]["image"])
    assert not torch.equal(first, view[(2, 5)]["image"])
    assert torch.equal(view[5]["image"], view[(0, 5)]["image"])


class Recorder(LightningModule):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[dict[str, torch.Tensor]] = []

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.seen.append(batch)
        return self.weight.sum() * batch["image"].mean()

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        self.seen.append(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def trainer(**options: object) -> Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return Trainer(
        accelerator="cpu",
        use_distributed_sampler=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **quiet,
        **options,
    )


def test_lightning_normalizes_once(fmow_tree: Path) -> None:
    datamodule = FMoWSentinelDataModule(fmow_tree, image_size=16, batch_size=20)
    datamodule.num_batches = 4
    recorder = Recorder()
    trainer(max_steps=4, limit_val_batches=0).fit(recorder, datamodule=datamodule)
    direct = FMoWSentinelDataModule(fmow_tree, image_size=16, batch_size=20)
    direct.num_batches = 4
    assert_equal(recorder.seen, batches(direct))
    recorder.seen.clear()
    trainer().validate(recorder, datamodule=datamodule, verbose=False)
    assert_equal(recorder.seen, list(direct.eval_dataloader("val")))


def test_lightning_epochs_differ(fmow_tree: Path) -> None:
    recorder = Recorder()
    datamodule = FMoWSentinelDataModule(fmow_tree, image_size=16, batch_size=32)
    trainer(max_epochs=2, limit_val_batches=0).fit(recorder, datamodule=datamodule)
    count = len(datamodule.train_dataloader())
    assert len(recorder.seen) == 2 * count
    assert not torch.equal(recorder.seen[0]["label"], recorder.seen[count]["label"])


def test_lightning_takes_the_order_up_again(fmow_tree: Path, tmp_path: Path) -> None:
    """A trainer that counts epochs goes on with the order of the next one."""

    def epochs(number: int, checkpoint: Path | None = None) -> tuple[list[dict[str, torch.Tensor]], Trainer]:
        recorder, datamodule = Recorder(), FMoWSentinelDataModule(fmow_tree, image_size=16, batch_size=32)
        lightning = trainer(max_epochs=number, limit_val_batches=0)
        lightning.fit(recorder, datamodule=datamodule, ckpt_path=checkpoint)
        return recorder.seen, lightning

    _, first = epochs(1)
    first.save_checkpoint(tmp_path / "one.ckpt")
    whole, _ = epochs(3)
    resumed, _ = epochs(3, tmp_path / "one.ckpt")
    assert_equal(resumed, whole[len(whole) // 3 :])


def test_validation_is_opened_on_demand(own_tree: Path) -> None:
    datamodule = FMoWSentinelDataModule(own_tree, image_size=16, batch_size=20)
    recorder = Recorder()
    trainer(max_epochs=1, limit_train_batches=1).fit(recorder, datamodule=datamodule)
    assert_equal(recorder.seen[1:], list(datamodule.eval_dataloader("val")))
    raw = FMoWSentinel(own_tree, "val")
    for index in range(len(raw)):  # a val.csv without its tiles
        raw.path(index).unlink()
    datamodule = FMoWSentinelDataModule(own_tree, image_size=16, batch_size=20)
    trainer(max_epochs=1, limit_train_batches=1, limit_val_batches=0).fit(recorder, datamodule=datamodule)
    assert datamodule.val_dataset is None
    with pytest.raises(DataError, match=r"val\.csv names is there"):
        trainer(max_epochs=1, limit_train_batches=1).fit(Recorder(), datamodule=datamodule)


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_tiles_are_counted_in_the_main_process(
    own_tree: Path, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    raw = FMoWSentinel(own_tree)
    for index in (2, 3):
        raw.path(index).write_bytes(b"II*\0broken")
    datamodule = FMoWSentinelDataModule(own_tree, image_size=16, batch_size=11, num_workers=workers)
    datamodule.num_batches = 9
    with caplog.at_level(logging.WARNING):
        recorder = Recorder()
        trainer(max_steps=9, limit_val_batches=0).fit(recorder, datamodule=datamodule)
    assert set(datamodule.source("train").unreadable.seen) == {2, 3}
    assert caplog.text.count(f"{raw.path(2)} cannot be used (") == 1
    for index in range(4, 15):
        raw.path(index).write_bytes(b"")
    with pytest.raises(DataError) as caught:
        trainer(max_steps=99, limit_val_batches=0).fit(Recorder(), datamodule=datamodule)
    assert user_message(caught.value).startswith(f"{int(0.1 * len(raw)) + 1} of {len(raw)} tiles")


def test_an_error_in_a_worker_keeps_its_clear_message(own_tree: Path) -> None:
    import rasterio

    raw = FMoWSentinel(own_tree)
    with rasterio.open(raw.path(0), "w", driver="GTiff", count=4, height=9, width=9, dtype="uint16") as file:
        file.write(np.ones((4, 9, 9), np.uint16))
    messages = []
    for workers in (0, 1):
        datamodule = FMoWSentinelDataModule(own_tree, num_workers=workers, batch_size=64)
        with pytest.raises(DataError) as caught:
            batches(datamodule)
        messages.append(user_message(caught.value))
    assert "Traceback" in str(caught.value)
    assert messages[0] == messages[1]
    assert messages[0].startswith(f"{raw.path(0)} has 4 bands, not 13\nAll tiles")


def test_stored_normalization_and_other_bands(fmow_tree: Path) -> None:
    first = FMoWSentinelDataModule(fmow_tree, bands=("B4", "B3", "B2"), normalization="standardize", image_size=16)
    stored = Normalization.from_dict(first.normalization.to_dict())
    again = FMoWSentinelDataModule(fmow_tree, bands=("red", "green", "blue"), normalization=stored, image_size=16)
    assert_equal(batches(first), batches(again))
    with pytest.raises(ConfigError, match="normalization is for B4,B3,B2, the images hold B2,B3,B4"):
        FMoWSentinelDataModule(fmow_tree, bands=("B2", "B3", "B4"), normalization=stored)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop_scale": (0.5, 0.2)}, "crop scale"),
        ({"batch_size": 0}, "batch size 0"),
        ({"num_workers": -1}, "-1 workers"),
        ({"normalization": "none"}, "unknown normalization"),
        ({"bands": ("B99",)}, "unknown band"),
        ({"max_unreadable": 3}, "not a share"),
    ],
)
def test_wrong_options(fmow_tree: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FMoWSentinelDataModule(fmow_tree, **options)


def test_plot_shows_the_sensors_units(fmow_tree: Path) -> None:
    datamodule = FMoWSentinelDataModule(fmow_tree, image_size=16)
    datamodule.setup("fit")
    sample = datamodule.train_dataset[0]
    figure = datamodule.plot(sample)
    assert figure.axes[0].get_title() == datamodule.classes[sample["label"]]
    plt.close(figure)


def test_photographs() -> None:
    datamodule = PhotographsDataModule(image_size=32, batch_size=8, length=64, years=(2000, 2020))
    datamodule.setup("fit")
    loader = datamodule.train_dataloader()
    assert isinstance(loader, DataLoader)
    assert isinstance(loader.batch_sampler, StepBatchSampler)
    found = list(loader)
    assert len(found) == 8
    assert found[0].keys() == {"image", "index", "unreadable"}
    assert found[0]["image"].shape == (8, 3, 32, 32)
    assert not datamodule.has_split("val")
    assert datamodule.sensor.name == "rgb"
    with pytest.raises(DataError, match="no split 'val'"):
        datamodule.eval_dataset("val")
    figure = datamodule.plot({name: value[0] for name, value in found[0].items()})
    plt.close(figure)


def test_registry_finds_them() -> None:
    for name, expected in [("fmow-sentinel", FMoWSentinelDataModule), ("photographs", PhotographsDataModule)]:
        assert registry.load(registry.DATASETS[name].datamodule) is expected
