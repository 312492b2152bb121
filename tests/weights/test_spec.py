from __future__ import annotations

import json
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from geoexplora.bands import FMOW_SENTINEL_BANDS, FMOW_SENTINEL_GROUPS, SENTINEL2
from geoexplora.errors import ConfigError, WeightsError
from geoexplora.registry import MODELS
from geoexplora.weights.load import build_encoder, load_encoder
from geoexplora.weights.spec import EncoderSpec


def test_round_trip(rgb_spec: EncoderSpec, group_spec: EncoderSpec) -> None:
    full = replace(
        group_spec, source={"name": "a.pth", "sha256": "0" * 64}, band_init="mean", antialias=True, pool="cls"
    )
    for spec in (rgb_spec, group_spec, full):
        metadata = spec.to_metadata()
        assert all(isinstance(value, str) for value in metadata.values())
        assert metadata["format"] == "pt"
        assert EncoderSpec.from_metadata(metadata) == spec


@given(
    st.lists(st.sampled_from(SENTINEL2.band_names), min_size=1, unique=True),
    st.sampled_from(sorted(MODELS)),
    st.integers(1, 32),
    st.integers(1, 20),
    st.booleans(),
    st.data(),
)
def test_round_trip_of_any(
    bands: list[str], model: str, patch: int, grid: int, antialias: bool, data: st.DataObject
) -> None:
    cut = data.draw(st.integers(1, len(bands)))
    groups = data.draw(st.sampled_from([None, [part for part in (bands[:cut], bands[cut:]) if part]]))
    spec = EncoderSpec.of(
        model,
        image_size=patch * grid,
        patch_size=patch,
        sensor="sentinel-2",
        bands=bands,
        groups=groups,
        normalization={"method": "standardize", "bands": bands, "mean": [0.1] * len(bands), "std": [1.0] * len(bands)},
        antialias=antialias,
    )
    assert EncoderSpec.from_metadata(spec.to_metadata()) == spec
    json.dumps(spec.timm_args)


@pytest.mark.parametrize("model", sorted(MODELS))
@pytest.mark.parametrize("groups", [None, FMOW_SENTINEL_GROUPS])
def test_builds_the_architecture(model: str, groups: tuple[tuple[str, ...], ...] | None) -> None:
    spec = EncoderSpec.of(
        model,
        image_size=96,
        patch_size=8,
        sensor="sentinel-2",
        bands=FMOW_SENTINEL_BANDS,
        groups=groups,
        normalization={},
    )
    with torch.device("meta"):
        encoder = build_encoder(spec) if groups is None else None
    architecture = MODELS[model]
    assert (spec.width, spec.depth, spec.heads) == (architecture.width, architecture.depth, architecture.heads)
    assert spec.units == SENTINEL2.units
    if encoder is not None:
        assert (encoder.embed_dim, len(encoder.blocks)) == (spec.width, spec.depth)
        assert encoder.blocks[0].attn.num_heads == spec.heads
        assert encoder.patch_embed.proj.weight.shape == (spec.width, 10, 8, 8)
    else:
        assert spec.timm_name == f"group_channel_{model}"
        assert spec.timm_args["groups"] == [[0, 1, 2, 6], [3, 4, 5, 7], [8, 9]]


def test_builds_group_channels(group_spec: EncoderSpec) -> None:
    encoder = build_encoder(group_spec)
    assert encoder(torch.rand(2, 10, 48, 48)).shape == (2, 128)


def test_plain_arguments_are_only_what_differs() -> None:
    arguments = {"image_size": 224, "patch_size": 16, "sensor": "rgb", "bands": ("R", "G", "B"), "normalization": {}}
    assert EncoderSpec.of("vit_base", **arguments).timm_args == {"num_classes": 0}
    assert EncoderSpec.of("vit_base", **(arguments | {"image_size": 96, "patch_size": 8})).timm_args == {
        "img_size": 96,
        "patch_size": 8,
        "num_classes": 0,
    }


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": "vit_bse"}, "Did you mean vit_base"),
        ({"sensor": "sentinel2"}, "Did you mean sentinel-2"),
        ({"bands": ("B2", "B03", "B99")}, "unknown band 'B99'"),
        ({"image_size": 100}, "image size 100 is not a multiple of patch size 8"),
        ({"groups": (("B2",), ("B2", "B3"))}, "group 1 and in group 2"),
    ],
)
def test_refuses(changed: dict[str, object], message: str) -> None:
    arguments = {
        "model": "vit_base",
        "image_size": 96,
        "patch_size": 8,
        "sensor": "sentinel-2",
        "bands": ("B2", "B3"),
        "normalization": {},
    }
    with pytest.raises(ConfigError, match=message):
        EncoderSpec.of(**(arguments | changed))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("geoexplora", None, "no description of an encoder"),
        ("version", "99", "pip install --upgrade geoexplora"),
        ("version", "x", "version 'x'"),
        ("width", None, r"width \(missing\)"),
        ("width", "-3", "not a positive whole number"),
        ("bands", "[", "bands"),
        ("normalization", "[1]", "normalization"),
    ],
)
def test_damaged_header(group_spec: EncoderSpec, name: str, value: str | None, message: str) -> None:
    metadata = group_spec.to_metadata()
    if value is None:
        del metadata[name]
    else:
        metadata[name] = value
    with pytest.raises(WeightsError, match=message):
        EncoderSpec.from_metadata(metadata)


def test_all_damage_is_told_at_once(rgb_spec: EncoderSpec) -> None:
    metadata = rgb_spec.to_metadata() | {"depth": "x", "heads": "0"}
    with pytest.raises(WeightsError, match=r"depth .*heads"):
        EncoderSpec.from_metadata(metadata)


def test_what_timm_cannot_build(rgb_spec: EncoderSpec) -> None:
    with pytest.raises(WeightsError, match="cannot build vit_nonsense"):
        build_encoder(replace(rgb_spec, timm_name="vit_nonsense"))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("timm_args", '{"img_size": 64, "pretrained": true}', "contradicts itself: timm_args"),
        ("timm_args", '{"img_size": 64, "checkpoint_path": "evil.pth"}', "contradicts itself: timm_args"),
        ("timm_args", '{"pretrained_cfg_overlay": {"url": "http://example.com/x"}}', "contradicts itself: timm_args"),
        ("timm_name", "hf-hub:someone/something", "timm_name is hf-hub:someone/something, not vit_tiny_patch16_224"),
        ("timm_name", "vit_tiny_patch16_224.augreg_in21k", "contradicts itself: timm_name"),
        ("model", "vit_nonsense", "unknown model"),
        ("normalization", '{"method": "standardize"}', "instead of method, bands, mean and std"),
        ("normalization", '{"method": "x", "bands": ["R"], "mean": [], "std": [1]}', "not of one length"),
        ("normalization", '{"method": "x", "bands": ["R"], "mean": ["a"], "std": [1]}', "not numbers"),
        ("pool", "max", "neither mean nor cls"),
        ("model", "vit_tiny", "timm_args is .*; width is 128, not 192"),
        ("sensor", "landsat", "unknown sensor 'landsat'"),
        ("bands", '["R", "G", "X"]', "unknown band 'X'"),
        ("bands", '["red", "green", "blue"]', "contradicts itself: bands"),
        ("groups", '[["R", "G"]]', "band B stands in no channel group"),
        ("groups", '[["R", "G", "B"]]', "contradicts itself: timm_name"),
        ("heads", "8", "heads is 8, not 4"),
        ("image_size", "65", "image size 65 is not a multiple"),
        ("image_size", "32", "contradicts itself: timm_args"),
        ("units", "metres", "contradicts itself: units is metres"),
    ],
)
def test_a_header_that_of_would_not_make(
    tmp_path: Path, rgb_spec: EncoderSpec, monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: pytest.fail("built from a forged header"))
    path = tmp_path / "encoder.safetensors"
    save_file({"cls_token": torch.zeros(1, 1, 128)}, path, rgb_spec.to_metadata() | {name: value})
    with pytest.raises(WeightsError, match=message):
        load_encoder(path)


@pytest.mark.parametrize("name", ["encoder", "decoder"])
def test_the_shipped_headers_are_accepted(name: str) -> None:
    path = Path(str(files("geoexplora"))) / "sample" / "source" / f"{name}.safetensors"
    with safe_open(path, framework="pt") as file:
        assert EncoderSpec.from_metadata(file.metadata()).model in MODELS
