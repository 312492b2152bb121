from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from torch import nn

from geoexplora.bands import SENSORS
from geoexplora.errors import WeightsError
from geoexplora.transforms.normalization import Normalization
from geoexplora.weights.sources.addresses import parse_address
from geoexplora.weights.sources.libraries import (
    LibraryWeights,
    from_timm,
    from_torchgeo,
    torchgeo_hints,
    torchgeo_weights,
)
from geoexplora.weights.sources.shortcuts import Hints

# timm


def test_timm():
    found = from_timm("vit_small_patch14_dinov2.lvd142m")
    folder = "hf://timm/vit_small_patch14_dinov2.lvd142m"
    assert [one.text for one in found.addresses] == [f"{folder}/model.safetensors", f"{folder}/pytorch_model.bin"]
    assert (found.name, found.licence) == ("vit_small_patch14_dinov2.lvd142m", "apache-2.0")
    assert (found.hints.sensor, found.hints.bands, found.hints.format) == ("rgb", ("R", "G", "B"), "timm")
    assert found.hints.normalization == {
        "method": "standardize",
        "bands": ["R", "G", "B"],
        "mean": [123.675, 116.28, 103.53],
        "std": [58.395, 57.12, 57.375],
    }


def test_timm_without_a_tag_is_recorded_with_it():
    found = from_timm("vit_base_patch16_224")
    assert found.name == "vit_base_patch16_224.augreg2_in21k_ft_in1k"
    assert found.hints.normalization is not None
    assert found.hints.normalization["mean"] == [127.5] * 3


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "vit_tiny_patch16_224.nonsense",
            "has no weights vit_tiny_patch16_224.nonsense\n.*vit_tiny_patch16_224.augreg",
        ),
        ("vit_base_patch32_plus_256", "no pretrained weights of vit_base_patch32_plus_256"),
        ("resnet18", "no plain vision transformer: it is a ResNet"),
        ("eva02_tiny_patch14_224", "it is a Eva"),
        ("deit_tiny_distilled_patch16_224", "it is a VisionTransformerDistilled"),
        ("vit_tiny_r_s16_p8_224", "no plain vision transformer"),
    ],
)
def test_timm_models_that_cannot_be_used(name: str, said: str):
    with pytest.raises(WeightsError, match=said):
        from_timm(name)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("vit_base_patch16_clip_224.openai", "normalizes before its blocks"),
        ("vit_base_patch16_siglip_224.webli", "has no class token and pools by attention"),
        ("vit_base_patch16_224_miil.in21k", "has no fused queries, keys and values with bias"),
        ("swin_tiny_patch4_window7_224.ms_in1k", "is a SwinTransformer"),
    ],
)
def test_what_cannot_be_read_is_not_fetched(name: str, reason: str):
    with pytest.raises(WeightsError, match=f"{name} is no plain vision transformer: it {reason}"):
        from_timm(name)


def stated(monkeypatch: pytest.MonkeyPatch, **settings: Any) -> LibraryWeights:
    """What is made of settings of timm's."""
    usual = {"hf_hub_id": None, "hf_hub_filename": None, "url": "", "input_size": (2, 8, 8), "tag": "", "license": None}
    monkeypatch.setattr(timm, "get_pretrained_cfg", lambda name: SimpleNamespace(**usual | settings))
    return from_timm("vit_tiny_patch16_224")


def test_timm_weights_outside_the_hub(monkeypatch: pytest.MonkeyPatch):
    found = stated(monkeypatch, url="https://example.org/a-0123abcd.pth")
    assert found.hints == Hints(format="timm", heads=3)
    assert found.addresses == (parse_address("https://example.org/a-0123abcd.pth", "0123abcd"),)


def test_timm_weights_in_a_file_of_another_name(monkeypatch: pytest.MonkeyPatch):
    assert stated(monkeypatch, hf_hub_id="o/n", hf_hub_filename="a.bin").addresses == (parse_address("hf://o/n/a.bin"),)


# TorchGeo

WEIGHTS = {str(weight): weight for weight in torchgeo_weights()}


@pytest.mark.parametrize("name", WEIGHTS)
def test_every_vit_of_torchgeo(name: str):
    found, meta = from_torchgeo(name), WEIGHTS[name].meta
    hints = found.hints
    assert found.name == name
    assert [address.text for address in found.addresses] == [WEIGHTS[name].url]
    assert found.addresses[0].repo
    assert hints.format == "torchgeo"
    assert hints.sensor is not None
    assert hints.bands is not None
    assert SENSORS[hints.sensor].select(hints.bands) == hints.bands
    assert len(hints.bands) == meta["in_chans"]
    named = meta.get("bands", ["R", "G", "B"])
    assert [band.upper().removeprefix("SR_") for band in named] == list(hints.bands)
    if "SENTINEL1_GRD_CLOSP" in name:  # TorchGeo's transforms only resize
        assert hints.normalization is None
    else:
        assert Normalization.from_dict(hints.normalization or {}).bands == hints.bands
    sensors = {"LANDSAT_TM": "landsat-tm", "LANDSAT_ETM": "landsat-etm", "LANDSAT_OLI": "landsat-oli"}
    sensors |= {"SENTINEL1": "sentinel-1", "SENTINEL2": "sentinel-2", "FMOW_RGB": "rgb"}
    assert hints.sensor == next(known for start, known in sensors.items() if f".{start}" in name)


@pytest.mark.parametrize(
    "name", [name for name in WEIGHTS if "LANDSAT" not in name and "SENTINEL1_GRD_CLOSP" not in name]
)
def test_normalizations_are_those_of_torchgeo_in_the_sensors_units(name: str):
    hints = torchgeo_hints(WEIGHTS[name])
    size = 256  # resized to 256, cropped to 224
    image = torch.rand(1, len(hints.bands or ()), size, size) * 3000
    expected = WEIGHTS[name].transforms(image.clone())
    edge = (size - expected.shape[-1]) // 2
    found = Normalization.from_dict(hints.normalization or {})(image)
    if edge and "CLOSP" not in name:
        found = found[..., edge:-edge, edge:-edge]
    if found.shape == expected.shape:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    else:  # resized, not cropped
        assert "CLOSP" in name
        torch.testing.assert_close(found.mean(), expected.mean(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in WEIGHTS if "LANDSAT" in name])
def test_landsat_is_normalized_from_physical_units(name: str):
    """As SSL4EO-L was prepared: reflectance 0..0.4 (surface: 0..0.3) or -25..45 Celsius to 8 bits, then / 255."""
    hints = torchgeo_hints(WEIGHTS[name])
    thermal = [band.startswith("B6_VCID") or (band, hints.sensor) == ("B6", "landsat-tm") or band in {"B10", "B11"}
               for band in hints.bands or ()]  # fmt: skip
    low = torch.tensor([248.15 if hot else 0.0 for hot in thermal])[:, None, None]
    high = torch.tensor([318.15 if hot else 0.3 if "_SR_" in name else 0.4 for hot in thermal])[:, None, None]
    normalize = Normalization.from_dict(hints.normalization or {})
    for part in (-0.5, 0.0, 0.25, 0.7, 1.0, 1.5):
        stored = torch.full((len(thermal), 224, 224), min(max(part, 0.0), 1.0) * 255.0).trunc()
        expected = WEIGHTS[name].transforms(stored)
        found = normalize((low + part * (high - low)).expand(-1, 224, 224))
        torch.testing.assert_close(found, expected, rtol=0, atol=1.01 / 255)  # one step, where the last digit decides


def test_wavelengths_are_those_of_torchgeo():
    from torchgeo.datasets import Landsat5TM, Landsat7, Landsat8

    for name, source in {"landsat-tm": Landsat5TM, "landsat-etm": Landsat7, "landsat-oli": Landsat8}.items():
        for band in SENSORS[name].bands:
            assert band.wavelength == pytest.approx(1000 * source.wavelengths[band.name.partition("_")[0]])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("ResNet50_Weights.SENTINEL2_ALL_MOCO", "weights of resnet50, not of a vision transformer"),
        ("CROMABase_Weights.CROMA_VIT", "weights of vit, not"),
        ("ViTSmall16_Weights.SENTINEL2_ALL_MOCA", "no weights .*\nDid you mean ViTSmall16_Weights.SENTINEL2_ALL_MOCO"),
    ],
)
def test_torchgeo_weights_that_cannot_be_used(name: str, said: str):
    with pytest.raises(WeightsError, match=said) as error:
        from_torchgeo(name)
    assert "ViTSmall16_Weights, " in str(error.value)


class Normalize(nn.Module):
    """As kornia's transform of this name keeps its settings."""

    def __init__(self, mean: float, std: float) -> None:
        super().__init__()
        self.flags = {"mean": torch.tensor([mean]), "std": torch.tensor([std])}


class Unheard(nn.Module):
    pass


def weight(transforms: Any, name: str = "SENTINEL1_X", **meta: Any) -> Any:
    return SimpleNamespace(name=name, transforms=transforms, meta={"in_chans": 2, "bands": ["VH", "VV"]} | meta)


def test_kornias_transforms_are_read():
    hints = torchgeo_hints(weight(nn.Sequential(Normalize(1.0, 2.0), Normalize(3.0, 4.0))))
    assert hints.normalization == {"method": "standardize", "bands": ["VH", "VV"], "mean": [7.0] * 2, "std": [8.0] * 2}


@pytest.mark.parametrize("transforms", [nn.Identity(), nn.Sequential(Normalize(0, 1), Unheard())])
def test_transforms_that_do_not_tell(transforms: nn.Module):
    assert torchgeo_hints(weight(transforms)) == Hints("sentinel-1", ("VH", "VV"), None, "torchgeo")


@pytest.mark.parametrize("meta", [{"bands": ["HH", "HV"]}, {"bands": None}, {"in_chans": 3}])
def test_bands_that_do_not_fit_are_left_open(meta: dict[str, Any]):
    assert torchgeo_hints(weight(nn.Sequential(Normalize(0, 1)), **meta)) == Hints(format="torchgeo")
