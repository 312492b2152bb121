"""open_encoder: an encoder and the data as it takes them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from geoexplora.errors import ConfigError
from geoexplora.tasks.opening import open_encoder
from geoexplora.weights.load import build_encoder
from geoexplora.weights.spec import EncoderSpec
from geoexplora.weights.write import save_encoder

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
