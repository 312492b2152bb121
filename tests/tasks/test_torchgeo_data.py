"""Batches of TorchGeo's datamodules: bands by name, raw values normalized exactly once, sizes and masks."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kornia.augmentation as K
import numpy as np
import pytest
import rasterio
import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import Dataset
from torchgeo.datamodules import (
    BaseDataModule,
    BigEarthNetDataModule,
    EuroSATDataModule,
    LoveDADataModule,
    NonGeoDataModule,
    RESISC45DataModule,
    So2SatDataModule,
    SSL4EOLDataModule,
    SSL4EOS12DataModule,
    TreeSatAIDataModule,
    UCMercedDataModule,
)
from torchgeo.datamodules.eurosat import MEAN, STD
from torchgeo.datasets import BigEarthNet
from torchgeo.models import ViTSmall16_Weights

from geoexplora.bands import (
    FMOW_SENTINEL_BANDS,
    FMOW_SENTINEL_GROUPS,
    FMOW_SENTINEL_STATISTICS,
    IMAGENET_STATISTICS,
    LANDSAT_TM,
    RGB,
    SENTINEL1,
    SENTINEL2,
)
from geoexplora.datamodules.torchgeo_source import TorchGeoDataModule
from geoexplora.errors import ConfigError, DataError
from geoexplora.tasks.pretrain.mae import ExPLoRAPretrain
from geoexplora.tasks.torchgeo_data import BatchAdapter, RawAugmentation
from geoexplora.tasks.torchgeo_input import DataImages
from geoexplora.transforms.normalization import METHODS, Normalization
from geoexplora.weights.load import build_encoder
from geoexplora.weights.sources.libraries import torchgeo_hints
from geoexplora.weights.spec import EncoderSpec
from geoexplora.weights.write import save_encoder

from ..datasets.torchgeo_trees import (
    EUROSAT_ON_DISK,
    files,
    write_bigearthnet,
    write_eurosat,
    write_loveda,
    write_resisc45,
    write_so2sat,
    write_ssl4eo_l,
    write_ssl4eo_s12,
    write_ucmerced,
)

IMAGENET = Normalization.from_statistics("standardize", IMAGENET_STATISTICS)
STAGES = {"train": "training", "val": "validating", "test": "testing", "predict": "predicting"}


def sentinel(bands: tuple[str, ...] = FMOW_SENTINEL_BANDS, method: str = "clip-uint8") -> Normalization:
    return Normalization.from_statistics(method, FMOW_SENTINEL_STATISTICS.select(bands))


def at_stage(datamodule: BaseDataModule, stage: str = "train") -> BaseDataModule:
    """The datamodule as if a trainer were at that stage, which decides on TorchGeo's augmentation."""
    flags = dict.fromkeys([*STAGES.values(), "sanity_checking"], False) | {STAGES[stage]: True}
    datamodule.trainer = SimpleNamespace(**flags)
    return datamodule


def handed_over(datamodule: BaseDataModule, samples: list[dict[str, Any]], stage: str = "train") -> dict[str, Any]:
    """A batch of these samples as it reaches a task's step."""
    batch = datamodule.collate_fn(samples)
    return at_stage(datamodule, stage).on_after_batch_transfer(batch, 0)


def opened(datamodule: BaseDataModule, stage: str = "fit") -> BaseDataModule:
    datamodule.setup(stage)
    return datamodule


class Constant(Dataset):
    """Images of one value a band."""

    bands = ("B02", "B03", "B04")
    all_band_names = (*bands, "B8A")

    def __init__(self, values: tuple[float, ...] = (1000.0, 2000.0, 3000.0)) -> None:
        self.values = torch.tensor(values)

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.values[:, None, None].expand(-1, 8, 8).clone(), "label": torch.tensor(index % 2)}


class ConstantDataModule(NonGeoDataModule):
    """Known pixel values, normalized by TorchGeo to (value - 500) / 50."""

    mean, std = torch.tensor([500.0] * 3), torch.tensor([50.0] * 3)

    def __init__(self, **settings: Any) -> None:
        super().__init__(Constant, batch_size=2)
        self.settings = settings

    def setup(self, stage: str) -> None:
        self.dataset = Constant(**self.settings)


@pytest.fixture(scope="module")
def eurosat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_eurosat(tmp_path_factory.mktemp("eurosat"))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bands", [FMOW_SENTINEL_BANDS, ("B8A", "B2"), ("B4", "B3", "B2"), SENTINEL2.band_names])
def test_bands_are_matched_by_name_and_normalized_as_in_the_file(
    eurosat: Path, bands: tuple[str, ...], method: str
) -> None:
    datamodule = opened(EuroSATDataModule(batch_size=2, root=eurosat))
    normalization = sentinel(bands, method)
    adapter = BatchAdapter(datamodule, SENTINEL2, normalization, image_size=None)
    batch = handed_over(datamodule, [datamodule.train_dataset[index] for index in range(2)])
    adapted = adapter(batch)
    for index in range(2):
        with rasterio.open(datamodule.train_dataset.samples[index][0]) as file:
            raw = file.read([EUROSAT_ON_DISK.index(band) + 1 for band in bands]).astype(np.int32)
        assert torch.equal(adapted["image"][index], normalization(torch.from_numpy(raw)))
    assert adapted["size"].tolist() == [[20, 20]] * 2
    assert torch.equal(adapted["label"], batch["label"])


@pytest.mark.parametrize("loaded", [("B02", "B8A", "B11"), ("B11", "B02", "B12", "B8A")])
def test_bands_that_the_datamodule_loads_in_another_order(eurosat: Path, loaded: tuple[str, ...]) -> None:
    datamodule = opened(EuroSATDataModule(batch_size=1, root=eurosat, bands=loaded))
    adapter = BatchAdapter(datamodule, SENTINEL2, sentinel(("B8A", "B11", "B2"), "standardize"), image_size=None)
    image = adapter.normalization.inverse(adapter(handed_over(datamodule, [datamodule.train_dataset[0]]))["image"])
    assert (image[0].mean((1, 2)) // 1000).tolist() == [13, 11, 2], "EuroSAT's band n holds 1000 n, B8A is the 13th"


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("own", [{}, {"train_aug": 0, "val_aug": 0, "test_aug": 0, "predict_aug": 0}])
def test_normalized_once_and_only_once(stage: str, own: dict[str, Any]) -> None:
    datamodule = opened(ConstantDataModule())
    for name in own:
        normalize = K.Normalize(mean=datamodule.mean, std=datamodule.std)
        setattr(datamodule, name, K.AugmentationSequential(normalize, data_keys=None, keepdim=True))
    theirs = handed_over(datamodule, [datamodule.dataset[0]], stage)["image"]
    assert theirs.amax((0, 2, 3)).tolist() == [10.0, 30.0, 50.0]
    adapter = BatchAdapter(datamodule, SENTINEL2, sentinel(("B4", "B3", "B2"), "standardize"), image_size=None)
    raw = handed_over(datamodule, [datamodule.dataset[0]], stage)
    assert raw["image"].amax((0, 2, 3)).tolist() == [1000.0, 2000.0, 3000.0]
    once = sentinel(("B4", "B3", "B2"), "standardize")(torch.tensor([3000.0, 2000.0, 1000.0])[:, None, None])
    assert torch.equal(adapter(raw)["image"][0], once.expand(-1, 8, 8))
    adapter.restore()
    assert torch.equal(handed_over(datamodule, [datamodule.dataset[0]], stage)["image"], theirs), "it is given back"


def test_nested_and_torchvision_normalizations_are_taken_out() -> None:
    from torch import nn
    from torchvision.transforms import v2

    image = torch.full((1, 3, 4, 4), 200.0)
    nested = K.AugmentationSequential(
        K.ImageSequential(K.Normalize(0.0, 255.0)), K.RandomHorizontalFlip(p=1.0), data_keys=None, keepdim=True
    )
    assert torch.equal(RawAugmentation(nested, 255.0)({"image": image})["image"], image)
    assert nested({"image": image})["image"].max() < 1, "the datamodule's own is not changed"
    sequence = nn.Sequential(v2.Normalize([1.0] * 3, [2.0] * 3))
    assert torch.equal(RawAugmentation(sequence, 255.0).augmentation(image), image)


def test_photometric_augmentations_see_the_range_they_are_made_for() -> None:
    jitter = K.AugmentationSequential(
        K.Normalize(0.0, 255.0), K.ColorJitter(brightness=(1.1, 1.1), p=1.0), data_keys=None, keepdim=True
    )
    image = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 255
    got = RawAugmentation(jitter, 255.0)({"image": image})["image"]
    torch.testing.assert_close(got, (image / 255 * 1.1).clamp(max=1) * 255)


def test_resisc45_stays_within_its_range(tmp_path: Path) -> None:
    datamodule = opened(RESISC45DataModule(batch_size=2, root=write_resisc45(tmp_path)))
    adapter = BatchAdapter(datamodule, RGB, IMAGENET, image_size=32)
    torch.manual_seed(0)
    for _ in range(8):
        adapted = adapter(handed_over(datamodule, [datamodule.train_dataset[index] for index in range(4)]))
        values = IMAGENET.inverse(adapted["image"])
        assert adapted["image"].shape == (4, 3, 32, 32)
        assert adapted["size"].tolist() == [[24, 32]] * 4
        assert 20 < values.mean() < 200, "pixels of 30 to 210, rotated on black, not clipped to 0..1"
    untouched = handed_over(datamodule, [datamodule.train_dataset[0]], "val")["image"]
    assert torch.equal(untouched[0], datamodule.train_dataset[0]["image"])


def test_of_our_datamodule_a_batch_is_returned_as_it_is(eurosat: Path) -> None:
    datamodule = TorchGeoDataModule(eurosat, name="EuroSAT", image_size=16, batch_size=2)
    adapter = BatchAdapter(datamodule, SENTINEL2, datamodule.normalization, image_size=32)
    batch = {"image": torch.rand(2, 13, 16, 16)}
    assert adapter(batch) is batch
    assert DataImages.of(datamodule).normalization() == datamodule.normalization


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"bands": SENTINEL2.band_names[::-1]}, "the datamodule gives sentinel-2 B1,"),
        ({"method": "clip-float"}, "normalizes by clip-uint8"),
        ({"mean": (1.0,) * 13}, "the task takes clip-uint8 with mean \\(1.0,"),
    ],
)
def test_our_datamodule_must_give_what_the_task_takes(eurosat: Path, change: dict[str, Any], text: str) -> None:
    datamodule = TorchGeoDataModule(eurosat, name="EuroSAT")
    wanted = Normalization(**(vars(datamodule.normalization) | change))
    with pytest.raises(ConfigError, match=text):
        BatchAdapter(datamodule, SENTINEL2, wanted, image_size=32)


def test_missing_band_is_named(eurosat: Path) -> None:
    datamodule = opened(EuroSATDataModule(batch_size=1, root=eurosat, bands=("B04", "B03", "B02")))
    with pytest.raises(ConfigError, match=r"EuroSAT has no band B8A, B11\n.*It has: B2, B3, B4"):
        BatchAdapter(datamodule, SENTINEL2, sentinel(("B2", "B8A", "B11")), image_size=32)
    with pytest.raises(ConfigError, match="has no band B5, B6, B7, B8, B8A, B11, B12"):
        DataImages.of(datamodule, FMOW_SENTINEL_GROUPS)


def test_what_the_datamodule_says_of_itself_goes_by_name(eurosat: Path) -> None:
    found = DataImages.of(opened(EuroSATDataModule(batch_size=1, root=eurosat)))
    assert (found.sensor, found.bands) == (SENTINEL2, SENTINEL2.band_names), "in the sensor's order, not the disk's"
    at = found.bands.index("B8A")
    assert (found.normalization().mean[at], found.normalization().std[at]) == pytest.approx((MEAN["B8A"], STD["B8A"]))
    grouped = DataImages.of(opened(EuroSATDataModule(batch_size=1, root=eurosat)), FMOW_SENTINEL_GROUPS)
    assert grouped.bands == FMOW_SENTINEL_BANDS
    assert grouped.normalization().mean[-1] == pytest.approx(MEAN["B12"])


def test_so2sat_comes_in_the_sensors_units(tmp_path: Path) -> None:
    root = write_so2sat(tmp_path)
    everything = opened(So2SatDataModule(batch_size=2, root=root, checksum=False))
    with pytest.raises(ConfigError, match="has no statistics of its own"):
        DataImages.of(everything).normalization()
    datamodule = opened(So2SatDataModule(batch_size=2, root=root, checksum=False, band_set="s2"))
    found = DataImages.of(datamodule)
    assert found.bands == tuple(band for band in SENTINEL2.band_names if band not in {"B1", "B9", "B10"})
    assert 500 < found.normalization().mean[0] < 2500, "reflectance x 10000, as blue is"
    for one in (everything, datamodule):
        adapter = BatchAdapter(one, SENTINEL2, sentinel(("B2", "B12"), "standardize"), image_size=None)
        image = adapter(handed_over(one, [one.train_dataset[0]]))["image"]
        raw = adapter.normalization.inverse(image)[0].mean((1, 2))
        assert (raw // 100).tolist() == [9, 18], "channel n of the file holds 100 n to 100 n + 50"


def test_bigearthnet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BigEarthNet, "image_size", (12, 12))
    datamodule = opened(BigEarthNetDataModule(batch_size=1, root=write_bigearthnet(tmp_path), bands="s2"))
    found = DataImages.of(datamodule)
    assert "B10" not in found.bands
    assert len(found.bands) == 12
    assert found.normalization().std[0] == 9858.0, "TorchGeo's minimum and range"
    adapter = BatchAdapter(datamodule, SENTINEL2, sentinel(("B8A", "B2"), "standardize"), image_size=24)
    image = adapter(handed_over(datamodule, [datamodule.train_dataset[0]]))["image"]
    assert image.shape == (1, 2, 24, 24)
    assert (adapter.normalization.inverse(image)[0].mean((1, 2)) // 1000).tolist() == [9, 2]


def test_radar_of_bigearthnet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BigEarthNet, "image_size", (12, 12))
    root = write_bigearthnet(tmp_path)
    radar = opened(BigEarthNetDataModule(batch_size=1, root=root, bands="s1"))
    found = DataImages.of(radar)
    assert (found.sensor, found.bands) == (SENTINEL1, ("VV", "VH"))
    assert found.normalization().mean == (-42.0, -48.0), "TorchGeo's by position: the weaker VH is the first"
    both = opened(BigEarthNetDataModule(batch_size=1, root=root))
    assert DataImages.of(both).bands == tuple(band for band in SENTINEL2.band_names if band != "B10")
    raw = Normalization("standardize", ("VV", "VH"), (0.0, 0.0), (1.0, 1.0))
    for datamodule in (radar, both):
        adapter = BatchAdapter(datamodule, SENTINEL1, raw, image_size=None)
        image = adapter(handed_over(datamodule, [datamodule.train_dataset[0]]))["image"]
        assert image[0, :, 5, 5].tolist() == [-10, -20]


def test_ssl4eo_l_of_another_sensor_than_the_usual(tmp_path: Path) -> None:
    root = write_ssl4eo_l(tmp_path, "tm_toa")
    datamodule = opened(SSL4EOLDataModule(batch_size=1, root=root, split="tm_toa"))
    found = DataImages.of(datamodule)
    assert (found.sensor, found.bands) == (LANDSAT_TM, LANDSAT_TM.band_names)
    assert found.normalization().mean == pytest.approx((0, 0, 0, 0, 0, 248.15, 0)), "0 and 255 of 8 bits"
    assert found.normalization().std == pytest.approx((0.4, 0.4, 0.4, 0.4, 0.4, 70, 0.4))
    contract = torchgeo_hints(ViTSmall16_Weights.LANDSAT_TM_TOA_MOCO).normalization
    adapter = BatchAdapter(datamodule, LANDSAT_TM, Normalization.from_dict(contract), image_size=None)
    image = adapter(handed_over(datamodule, [datamodule.dataset[0]]))["image"][0, :, 0, 0] * 255
    # The weights' own transforms divide 8 bits by 255; truncation may cost one level.
    torch.testing.assert_close(image, 20 * torch.arange(1.0, 8.0), atol=1.01, rtol=0)


def test_statistics_are_needed_only_without_weights_that_tell_theirs(tmp_path: Path) -> None:
    contract = sentinel()
    spec = EncoderSpec.of(
        "vit_pico", image_size=8, patch_size=4, sensor="sentinel-2", bands=FMOW_SENTINEL_BANDS,
        normalization=contract.to_dict(),
    )  # fmt: skip
    save_encoder(tmp_path / "own.safetensors", build_encoder(spec).state_dict(), spec)
    settings = {"model": "vit_pico", "image_size": 8, "patch_size": 4, "rank": 2}
    settings |= {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}
    datamodule = So2SatDataModule(batch_size=2, root=write_so2sat(tmp_path), checksum=False)
    task = ExPLoRAPretrain(init=str(tmp_path / "own.safetensors"), **settings)
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, fast_dev_run=True, enable_model_summary=False)
    trainer.fit(task, datamodule)
    assert Normalization.from_dict(task.hparams["normalization"]) == contract
    with pytest.raises(ConfigError, match="has no statistics of its own"):
        ExPLoRAPretrain(**settings).resolve_input(datamodule)


def test_ssl4eo_s12(tmp_path: Path) -> None:
    root = write_ssl4eo_s12(tmp_path)
    datamodule = opened(SSL4EOS12DataModule(batch_size=1, root=root, split="s2c", seasons=1))
    found = DataImages.of(datamodule)
    assert found.bands == SENTINEL2.band_names
    assert set(found.normalization().std) == {10_000.0}
    adapter = BatchAdapter(datamodule, SENTINEL2, sentinel(("B12", "B8A"), "standardize"), image_size=None)
    image = adapter(handed_over(datamodule, [datamodule.dataset[0]]))["image"]
    assert (adapter.normalization.inverse(image)[0].mean((1, 2)) / 1000).round().tolist() == [13, 9]
    two = opened(SSL4EOS12DataModule(batch_size=1, root=root, split="s2c", seasons=2))
    with pytest.raises(DataError, match="its images have 26"):
        DataImages.of(two)


def test_rgb_by_its_three_channels(tmp_path: Path) -> None:
    datamodule = opened(UCMercedDataModule(batch_size=1, root=write_ucmerced(tmp_path)))
    assert DataImages.of(datamodule).normalization() == Normalization(
        "standardize", ("R", "G", "B"), (0,) * 3, (255,) * 3
    )
    with pytest.raises(ConfigError, match="does not name the 3 bands"):
        BatchAdapter(datamodule, SENTINEL2, sentinel(), image_size=32)


def test_masks_go_with_their_images(tmp_path: Path) -> None:
    datamodule = opened(LoveDADataModule(batch_size=2, root=write_loveda(tmp_path)))
    adapter = BatchAdapter(datamodule, RGB, IMAGENET, image_size=48)
    sample = datamodule.train_dataset[0]
    adapted = adapter(handed_over(datamodule, [sample]))
    assert adapted["image"].shape == (1, 3, 48, 48)
    assert adapted["mask"].dtype == sample["mask"].dtype
    wanted = sample["mask"].repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert torch.equal(adapted["mask"][0], wanted), "nearest, and no new values"
    same = BatchAdapter(datamodule, RGB, IMAGENET, image_size=None)
    batch = handed_over(datamodule, [sample])
    assert same(batch)["mask"] is batch["mask"]
    one = {"image": torch.rand(1, 3, 24, 24), "mask": torch.randint(8, (1, 1, 24, 24))}
    assert adapter(one)["mask"].shape == (1, 1, 48, 48)


def test_pixels_that_are_not_finite_hold_the_mean() -> None:
    datamodule = opened(ConstantDataModule())
    adapter = BatchAdapter(datamodule, SENTINEL2, sentinel(("B2", "B3", "B4"), "standardize"), image_size=None)
    image = torch.full((1, 3, 4, 4), 1000.0)
    image[0, 1, 2, 2], image[0, 0, 0, 0] = torch.nan, torch.inf
    got = adapter({"image": image})["image"]
    assert got[0, 1, 2, 2] == got[0, 0, 0, 0] == 0
    assert torch.isfinite(got).all()


class Copies(TorchDispatchMode):
    """Counts tensors that are brought from the host to the device meta."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.is_meta:
            given = tree_leaves((args, kwargs))
            self.count += any(isinstance(value, Tensor) and not value.is_meta for value in given)
        return result


def test_a_batch_waits_for_no_copy_of_constants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy from the host's memory waits until the GPU has done all before; the device meta stands for one here."""
    datamodule = opened(SSL4EOLDataModule(batch_size=1, root=write_ssl4eo_l(tmp_path, "tm_toa"), split="tm_toa"))
    bands = ("B4", "B6", "B1")
    adapter = BatchAdapter(
        datamodule, LANDSAT_TM, DataImages.of(datamodule).normalization().select(bands), image_size=8
    )
    images = torch.rand(2, 7, 4, 4)
    adapter({"image": images})
    adapter._looked = True  # at values, which meta has not; nor has it autocast
    monkeypatch.setattr(torch, "autocast", lambda *given, **more: nullcontext())
    counts = []
    for _ in range(2):
        with Copies() as copies:
            adapter({"image": images.to("meta")})
        counts.append(copies.count - 1)  # the batch's own
    assert counts == [6, 0], "once: positions, scale, offset, mean, and the normalization's two"


@pytest.mark.parametrize(
    ("batch", "error", "text"),
    [
        ({"image": torch.rand(1, 5, 4, 4)}, DataError, "has 5 channels, its first image 3"),
        ({"image": torch.rand(1, 2, 3, 4, 4)}, ConfigError, r"hold an image of shape \(1, 2, 3, 4, 4\)"),
        ({"image1": torch.rand(1, 3, 4, 4)}, ConfigError, "hold no image"),
    ],
)
def test_other_batches_are_refused(batch: dict[str, Tensor], error: type[Exception], text: str) -> None:
    adapter = BatchAdapter(opened(ConstantDataModule()), SENTINEL2, sentinel(("B2",)), image_size=None)
    with pytest.raises(error, match=text):
        adapter(batch)


@pytest.mark.parametrize(
    ("values", "warned"), [((0.1, 0.2, 0.3), True), ((-2.0, 0.0, 3.0), True), ((900.0,) * 3, False)]
)
def test_values_that_look_normalized_are_warned_about_once(
    caplog: pytest.LogCaptureFixture, values: tuple[float, ...], warned: bool
) -> None:
    datamodule = opened(ConstantDataModule(values=values))
    adapter = BatchAdapter(datamodule, SENTINEL2, sentinel(("B2", "B3", "B4")), image_size=None)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            adapter(handed_over(datamodule, [datamodule.dataset[0]]))
    assert caplog.text.count("can hardly be reflectance x 10000") == int(warned)


def test_no_datamodule_known_here(caplog: pytest.LogCaptureFixture) -> None:
    batch = {"image": torch.rand(1, 3, 4, 4)}
    for datamodule in (None, LightningDataModule()):
        assert BatchAdapter(datamodule, RGB, IMAGENET, image_size=8)(batch) is batch
    assert caplog.text.count("taken as normalized already") == 2
    with pytest.raises(ConfigError, match="LightningDataModule does not tell its bands"):
        DataImages.of(LightningDataModule())


def test_functions_that_may_normalize_are_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    datamodule = opened(ConstantDataModule())
    datamodule.train_aug = dict
    BatchAdapter(datamodule, SENTINEL2, sentinel(("B2",)), image_size=None)
    assert "ConstantDataModule.train_aug is a function of its own" in caplog.text


def test_normalization_out_of_reach_is_refused() -> None:
    class Ours(TreeSatAIDataModule):
        pass

    with pytest.raises(ConfigError, match="normalizes by itself"):
        BatchAdapter(Ours(), RGB, IMAGENET, image_size=8)


def test_statistics_of_another_number_of_bands() -> None:
    datamodule = opened(ConstantDataModule())
    datamodule.mean = torch.zeros(2)
    with pytest.raises(ConfigError, match="has a mean of 2 bands for images of 3"):
        DataImages.of(datamodule).normalization()


def test_bands_of_several_sensors_are_not_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Constant, "all_band_names")
    with pytest.raises(ConfigError, match="fit sentinel-2, landsat-tm"):
        DataImages.of(opened(ConstantDataModule()))


def test_not_set_up() -> None:
    with pytest.raises(ConfigError, match="has no dataset after setup"):
        DataImages.of(ConstantDataModule())


def test_trees_hold_what_is_assumed_of_them(eurosat: Path) -> None:
    with rasterio.open(files(eurosat)[0]) as file:
        assert (file.read().mean((1, 2)) // 1000).tolist() == list(range(1, 14))
