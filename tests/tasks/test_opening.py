"""open_encoder: an encoder and the data as it takes them."""

from __future__ import annotations

import shutil
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch

from geoexplora.bands import FMOW_SENTINEL_STATISTICS, IMAGENET_STATISTICS, SENTINEL2
from geoexplora.datasets.statistics import band_statistics
from geoexplora.errors import ConfigError, WeightsError
from geoexplora.registry import DATASETS
from geoexplora.tasks.encoders import fit_encoder
from geoexplora.tasks.opening import open_encoder
from geoexplora.transforms.normalization import Normalization
from geoexplora.weights.files import read_weights
from geoexplora.weights.load import build_encoder
from geoexplora.weights.spec import EncoderSpec
from geoexplora.weights.write import save_encoder

from ..datasets.torchgeo_trees import write_resisc45

BANDS = ("B2", "B3", "B4", "B8")
NORMALIZATION = {"method": "standardize", "bands": list(BANDS), "mean": [1.0, 2.0, 3.0, 4.0], "std": [5.0] * 4}


@pytest.fixture
def source(tmp_path: Any) -> Any:
    torch.manual_seed(0)
    spec = EncoderSpec.of(
        "vit_pico", image_size=16, patch_size=8, sensor="sentinel-2", bands=BANDS, normalization=NORMALIZATION,
        antialias=True,
    )  # fmt: skip
    encoder = build_encoder(spec)
    save_encoder(tmp_path / "encoder.safetensors", encoder.state_dict(), spec)
    return tmp_path / "encoder.safetensors", encoder


def options(**more: Any) -> Any:
    given = {
        "dataset": "sample", "root": None, "tile_size": 32, "fold": 0, "init": None, "model": None, "bands": None,
        "groups": None, "image_size": None, "patch_size": None, "normalization": None, "statistics": "reference",
        "band_init": "rgb-by-name", "patch_resize": "pseudo-inverse", "allow_normalization_mismatch": False,
        "allow_band_mismatch": False, "batch_size": 4, "num_workers": 0, "years": (2000, 2020), "missing": "error",
        "max_unreadable": 0.1, "seed": 0, "antialias": None,
    }  # fmt: skip
    return SimpleNamespace(**given | {name: str(value) if name == "init" else value for name, value in more.items()})


def test_the_data_as_the_encoder_takes_them(source: Any) -> None:
    path, encoder = source
    opened = open_encoder(options(init=path), "class")
    assert opened.datamodule.bands == BANDS
    assert opened.datamodule.normalization.to_dict() == opened.spec.normalization
    assert opened.datamodule.normalization.mean == (1.0, 2.0, 3.0, 4.0)
    assert opened.datamodule.antialias
    assert opened.datamodule.image_size == 16
    assert opened.datamodule.target == "class"
    assert all(value.equal(encoder.state_dict()[name]) for name, value in opened.encoder.state_dict().items())
    assert opened.record is not None
    assert opened.sha256 == open_encoder(options(init=path), "class").sha256


def test_another_size(source: Any) -> None:
    opened = open_encoder(options(init=source[0], image_size=32), "mask")
    assert (opened.spec.image_size, opened.datamodule.image_size, opened.datamodule.target) == (32, 32, "mask")
    assert opened.encoder.forward_features(torch.zeros(1, 4, 32, 32)).shape[1] == 17
    with pytest.raises(ConfigError, match="--image-size 20 is not a multiple"):
        open_encoder(options(init=source[0], image_size=20), "class")


def test_random_weights_depend_on_the_seed() -> None:
    given = {"model": "vit_pico", "bands": BANDS, "image_size": 16, "patch_size": 8}
    one, same, other = (open_encoder(options(**given, seed=seed), "class") for seed in (0, 0, 1))
    assert one.record is None
    assert one.sha256 == same.sha256 != other.sha256
    weights = [opened.encoder.patch_embed.proj.weight for opened in (one, same, other)]
    assert weights[0].equal(weights[1])
    assert not weights[0].equal(weights[2])


def test_a_target_that_the_dataset_lacks() -> None:
    given = {"model": "vit_pico", "bands": BANDS, "image_size": 16, "patch_size": 8}
    with pytest.raises(ConfigError, match="sample has no targets of the kind value"):
        open_encoder(options(**given), "value")


# Another input than the encoder's own: what is not asked for stays.


@pytest.fixture
def grouped(tmp_path: Any) -> Any:
    spec = EncoderSpec.of(
        "vit_pico", image_size=16, patch_size=8, sensor="sentinel-2", bands=BANDS, groups=(BANDS[:2], BANDS[2:]),
        normalization=NORMALIZATION, source={"name": "mae.pth", "sha256": "1", "format": "meta-mae"},
        band_init="rgb-by-name", patch_resize="pseudo-inverse",
    )  # fmt: skip
    save_encoder(tmp_path / "grouped.safetensors", build_encoder(spec).state_dict(), spec)
    return tmp_path / "grouped.safetensors"


def test_another_patch_size(grouped: Any) -> None:
    opened = open_encoder(options(init=grouped, patch_size=4), "class")
    assert (opened.spec.bands, opened.spec.groups) == (BANDS, (BANDS[:2], BANDS[2:]))
    assert opened.datamodule.bands == BANDS
    assert opened.datamodule.normalization.to_dict() == opened.spec.normalization == NORMALIZATION
    assert (opened.spec.patch_size, opened.spec.patch_resize, opened.spec.band_init) == (4, "pseudo-inverse", None)


def test_another_normalization(grouped: Any) -> None:
    with pytest.raises(WeightsError, match=r"method standardize, now clip-uint8.*\n.*--allow-normalization-mismatch"):
        open_encoder(options(init=grouped, normalization="clip-uint8"), "class")
    allowed = options(init=grouped, normalization="clip-uint8", allow_normalization_mismatch=True)
    opened = open_encoder(allowed, "class")
    assert (opened.spec.bands, opened.spec.groups) == (BANDS, (BANDS[:2], BANDS[2:]))
    published = FMOW_SENTINEL_STATISTICS.select(BANDS).normalization("clip-uint8")
    assert opened.datamodule.normalization.to_dict() == opened.spec.normalization == published


def test_the_method_by_its_name_is_the_encoders_own(grouped: Any) -> None:
    opened = open_encoder(options(init=grouped, normalization="standardize"), "class")
    assert opened.datamodule.normalization.to_dict() == NORMALIZATION


def test_statistics_of_the_training_tiles(source: Any) -> None:
    with pytest.raises(WeightsError, match=r"mean of B2 1, now .*\n.*--allow-normalization-mismatch"):
        open_encoder(options(init=source[0], statistics="dataset"), "class")
    allowed = options(init=source[0], statistics="dataset", allow_normalization_mismatch=True)
    opened = open_encoder(allowed, "class")
    found = band_statistics(opened.datamodule.source("train"), BANDS)
    assert opened.datamodule.normalization == Normalization.from_statistics("standardize", found)
    assert opened.spec.normalization == opened.datamodule.normalization.to_dict()
    assert opened.encoder.patch_embed.proj.weight.equal(source[1].patch_embed.proj.weight)


def test_statistics_of_the_training_images_for_published_weights(tmp_path: Any) -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=4, num_classes=0)
    torch.save({"model": model.state_dict()}, tmp_path / "mae.pth")
    given = {"init": tmp_path / "mae.pth", "dataset": "resisc45", "root": write_resisc45(tmp_path / "data")}
    own, other = (open_encoder(options(**given, statistics=name), "class") for name in ("reference", "dataset"))
    assert own.datamodule.normalization.to_dict() == IMAGENET_STATISTICS.normalization("standardize")
    found = band_statistics(other.datamodule.source("train"), ("R", "G", "B"))
    assert other.datamodule.normalization == Normalization.from_statistics("standardize", found)
    assert other.spec.normalization == other.datamodule.normalization.to_dict()
    weights = other.encoder.state_dict()
    assert all(value.equal(weights[name]) for name, value in own.encoder.state_dict().items())
    assert own.sha256 != other.sha256


@pytest.fixture(params=["known", "told by the opened data"])
def known_sensor(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the sensor of the sample is known before it is opened."""
    if request.param != "known":
        monkeypatch.setitem(DATASETS, "sample", replace(DATASETS["sample"], sensor=None))


@pytest.mark.usefixtures("known_sensor")
def test_fewer_bands_keep_the_statistics_of_the_weights(source: Any) -> None:
    opened = open_encoder(options(init=source[0], bands=("B4", "B2"), allow_band_mismatch=True), "class")
    assert opened.spec.bands == ("B4", "B2")
    assert opened.datamodule.normalization == Normalization("standardize", ("B4", "B2"), (3.0, 1.0), (5.0, 5.0))
    assert opened.spec.band_init is None


@pytest.mark.usefixtures("known_sensor")
def test_other_names_of_the_same_bands_keep_the_statistics_of_the_weights(source: Any) -> None:
    opened = open_encoder(options(init=source[0], bands=("B02", "green", "B04", "b8")), "class")
    assert opened.spec.bands == opened.datamodule.bands == BANDS
    assert opened.datamodule.normalization.to_dict() == opened.spec.normalization == NORMALIZATION


def landsat(tmp_path: Any, bands: tuple[str, ...] = ("B4", "B3", "B2"), sensor: str = "landsat-oli") -> Any:
    spec = EncoderSpec.of(
        "vit_pico", image_size=16, patch_size=8, sensor=sensor, bands=bands,
        normalization={
            "method": "standardize", "bands": list(bands), "mean": [0.1] * len(bands), "std": [0.1] * len(bands)
        },
    )  # fmt: skip
    save_encoder(tmp_path / "landsat.safetensors", build_encoder(spec).state_dict(), spec)
    return tmp_path / "landsat.safetensors"


@pytest.mark.usefixtures("known_sensor")
@pytest.mark.parametrize(
    "asked",
    [{}, {"patch_size": 4}, {"normalization": "clip-uint8"}, {"statistics": "dataset"}, {"image_size": 32}],
    ids=lambda asked: "-".join(asked) or "nothing",
)
def test_another_sensor_is_refused(tmp_path: Any, asked: Any) -> None:
    """Whatever else is asked for; the bands' names would fit."""
    with pytest.raises(ConfigError, match="the encoder was trained on landsat-oli, sample is sentinel-2"):
        open_encoder(options(init=landsat(tmp_path), **asked), "class")


@pytest.mark.usefixtures("known_sensor")
def test_bands_of_another_sensor_by_name(tmp_path: Any) -> None:
    """Bands of the same names are others, with statistics of their own."""
    bands = ("B4", "B3", "B2")
    opened = open_encoder(options(init=landsat(tmp_path), bands=bands), "class")
    assert (opened.spec.sensor, opened.spec.bands, opened.spec.band_init) == ("sentinel-2", bands, "rgb-by-name")
    published = FMOW_SENTINEL_STATISTICS.select(bands).normalization("standardize")
    assert opened.datamodule.normalization.to_dict() == opened.spec.normalization == published


@pytest.mark.usefixtures("known_sensor")
@pytest.mark.parametrize(
    ("sensor", "trained", "asked"),
    [
        ("landsat-oli", ("B4", "B3", "B2"), ("red", "green", "blue")),
        ("landsat-oli", ("B5", "B3", "B2"), ("nir08", "green", "blue")),  # B8A of Sentinel-2, whose B5 is another
        ("rgb", ("R", "G", "B"), ("red", "green", "blue")),
    ],
)
def test_common_names_are_those_of_the_data(tmp_path: Any, sensor: str, trained: Any, asked: Any) -> None:
    opened = open_encoder(options(init=landsat(tmp_path, trained, sensor), bands=asked), "class")
    assert opened.spec.sensor == "sentinel-2"
    assert opened.spec.bands == opened.datamodule.bands == SENTINEL2.select(asked)


def test_weights_that_do_not_tell_their_normalization(tmp_path: Any) -> None:
    spec = EncoderSpec.of(
        "vit_pico", image_size=16, patch_size=8, sensor="sentinel-2", bands=BANDS, normalization={}
    )  # fmt: skip
    save_encoder(tmp_path / "a.safetensors", build_encoder(spec).state_dict(), spec)
    for more in ({}, {"bands": ("B2", "B3")}):
        with pytest.raises(ConfigError, match=r"does not tell with what normalization .*\n.*--normalization"):
            open_encoder(options(init=tmp_path / "a.safetensors", **more), "class")
    opened = open_encoder(options(init=tmp_path / "a.safetensors", normalization="clip-float"), "class")
    assert opened.spec.normalization == opened.datamodule.normalization.to_dict()
    assert opened.spec.bands == BANDS


# An encoder whose norm comes after pooling


@pytest.fixture
def pooled(tmp_path: Any) -> Any:
    """One of timm's for photographs, and what it makes of images."""
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, depth=2, num_classes=0, global_pool="avg"
    ).eval()
    torch.nn.init.uniform_(model.fc_norm.weight, 0.5, 2)
    torch.save({"model": model.state_dict()}, tmp_path / "pooled.pth")
    return {"init": tmp_path / "pooled.pth", "dataset": "resisc45", "root": write_resisc45(tmp_path / "data")}, model


def test_other_statistics_leave_the_encoder_as_it_is(pooled: Any) -> None:
    given, model = pooled
    opened = open_encoder(options(**given, statistics="dataset"), "class")
    assert opened.spec.style.pooled_norm
    assert opened.spec.normalization == opened.datamodule.normalization.to_dict()
    assert opened.spec.normalization["mean"] != IMAGENET_STATISTICS.normalization("standardize")["mean"]
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(opened.encoder(images), model(images))


def test_another_patch_size_leaves_the_norm_where_it_is(pooled: Any) -> None:
    given, model = pooled
    opened = open_encoder(options(**given, patch_size=4), "class")
    assert opened.spec.style.pooled_norm
    assert opened.spec == EncoderSpec.from_metadata(opened.spec.to_metadata())
    assert opened.encoder.fc_norm.weight.equal(model.fc_norm.weight)
    assert isinstance(opened.encoder.norm, torch.nn.Identity)


def test_rounded_statistics_are_the_same(grouped: Any) -> None:
    rounded = NORMALIZATION | {"mean": [value * (1 + 1e-8) for value in NORMALIZATION["mean"]]}  # type: ignore[attr-defined]
    fitted = fit_encoder(read_weights(grouped), sensor="sentinel-2", bands=BANDS, normalization=rounded)
    assert fitted.spec.normalization == rounded, "what the data are normalized by"
    other = NORMALIZATION | {"std": [5.0, 5.0, 5.0, 6.0]}
    with pytest.raises(WeightsError, match=r"std of B8 5, now 6\n.*allow_normalization_mismatch"):
        fit_encoder(read_weights(grouped), sensor="sentinel-2", bands=BANDS, normalization=other)


# Where the weights come from


@pytest.mark.parametrize("size", [16, 32])
def test_the_source_is_the_file_itself(grouped: Any, size: int) -> None:
    """Not what the file was once trained from: what is trained next comes on top of this file."""
    opened = open_encoder(options(init=grouped, image_size=size), "class")
    assert opened.spec.source == opened.record == read_weights(grouped).record()
    assert (opened.spec.band_init, opened.spec.patch_resize) == (None, None)


def test_the_digest_tells_weights_and_input(source: Any, grouped: Any, tmp_path: Any) -> None:
    """And neither the file's name nor a seed that draws nothing."""
    path, encoder = source
    (tmp_path / "again").mkdir()
    shutil.copy(path, tmp_path / "again" / "other.safetensors")
    spec = read_weights(path).described()
    save_encoder(tmp_path / "changed.safetensors", {k: v + 1 for k, v in encoder.state_dict().items()}, spec)

    def digest(**given: Any) -> str:
        return open_encoder(options(**{"init": path} | given), "class").sha256

    same = {digest(), digest(seed=1), digest(init=tmp_path / "again" / "other.safetensors")}
    bands = {
        "bands": ("B2", "B3", "B4", "B8", "B11"),
        "allow_band_mismatch": True,
        "allow_normalization_mismatch": True,
    }
    others = [
        digest(init=tmp_path / "changed.safetensors"), digest(init=grouped), digest(patch_size=4),
        digest(patch_size=4, patch_resize="bilinear"), digest(**bands), digest(**bands, band_init="random"),
        digest(**bands, band_init="random", seed=1),
    ]  # fmt: skip
    assert len(same) == 1
    assert len({*same, *others}) == 1 + len(others)
