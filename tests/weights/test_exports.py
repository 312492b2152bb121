"""Exports give the same outputs in the libraries that they are for; all weights are random, so none can be swapped."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from geoexplora.bands import (
    FMOW_SENTINEL_BANDS,
    FMOW_SENTINEL_GROUPS,
    FMOW_SENTINEL_STATISTICS,
    IMAGENET_STATISTICS,
)
from geoexplora.errors import ConfigError, RunError, WeightsError
from geoexplora.models.decoder import MAEDecoder
from geoexplora.registry import CUSTOM, Style
from geoexplora.weights.exports import base as export_base
from geoexplora.weights.exports import export as exports
from geoexplora.weights.exports.base import Content, vit_outputs
from geoexplora.weights.exports.export import export
from geoexplora.weights.exports.satmae import SatMAEExporter
from geoexplora.weights.exports.torchgeo import name_of
from geoexplora.weights.files import read_weights
from geoexplora.weights.load import build_encoder, load_encoder
from geoexplora.weights.spec import EncoderSpec

from .conftest import normalization

PARITY = Path(__file__).parents[1] / "data" / "parity"
SIZES = (64, 4, 4)
RGB: dict[str, Any] = {
    "sensor": "rgb",
    "bands": ("R", "G", "B"),
    "normalization": normalization(IMAGENET_STATISTICS, "standardize"),
}
SENTINEL: dict[str, Any] = {
    "sensor": "sentinel-2",
    "bands": FMOW_SENTINEL_BANDS,
    "normalization": normalization(FMOW_SENTINEL_STATISTICS.select(FMOW_SENTINEL_BANDS), "clip-uint8"),
}
GROUPS: dict[str, Any] = SENTINEL | {"groups": FMOW_SENTINEL_GROUPS}
ENCODERS: dict[str, dict[str, Any]] = {
    "plain": RGB,
    "stock size": RGB | {"model": "vit_pico", "image_size": 224, "patch_size": 16},
    "layer scale": RGB | {"style": Style(layer_scale=True)},
    "registers": RGB | {"style": Style(layer_scale=True, registers=3)},
    "swiglu": RGB | {"style": Style(layer_scale=True, swiglu=True)},
    "odd mlp": RGB | {"style": Style(mlp_width=100)},
    "pooled norm": RGB | {"style": Style(pooled_norm=True)},
    "ten bands": SENTINEL,
    "groups": GROUPS | {"model": "vit_pico"},
    "groups, layer scale": GROUPS | {"style": Style(layer_scale=True, channel_width=24)},
    "groups, registers": GROUPS | {"style": Style(registers=2, swiglu=True)},
    "groups, fine-tuned": GROUPS | {"style": Style(pooled_norm=True, class_token_encoding=True)},
}
PLAIN = [name for name in ENCODERS if not name.startswith("groups")]
HUB = [name for name in PLAIN if name not in {"odd mlp", "pooled norm", "stock size"}]
SATMAE = [name for name in ENCODERS if not {"registers", "swiglu"} & set(name.replace(",", "").split())]


def content(name: str, seed: int = 0, **changes: Any) -> Content:
    """An encoder of that kind with every weight random; scales are around 1, as DINOv2's trained ones are not."""
    settings = {"model": CUSTOM, "image_size": 32, "patch_size": 8, "sizes": SIZES} | ENCODERS[name] | changes
    spec = EncoderSpec.of(settings.pop("model"), **settings)
    generator = torch.Generator().manual_seed(seed)
    model: Any = build_encoder(spec)
    with torch.no_grad():
        for key, value in model.named_parameters():
            around = 1.0 if key.endswith(("gamma", "norm.weight", "norm1.weight", "norm2.weight")) else 0.0
            value.copy_(around + torch.randn(value.shape, generator=generator) * 0.1)
    return Content(spec, model.state_dict(), step=7, trained=[{"part": "blocks", "trained": 3}])


def images(spec: EncoderSpec, batch: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, len(spec.bands), spec.image_size, spec.image_size, generator=generator)


def loaded(done: exports.Export) -> Any:
    """What the line gives that the user is told."""
    *imports, expression = done.usage.split("; ")
    names: dict[str, Any] = {}
    exec("; ".join(imports), names)
    return eval(expression, names)


@torch.inference_mode()
def expected(made: Content, batch: int = 3) -> dict[str, Tensor]:
    return vit_outputs(made.build(), images(made.spec, batch), made.spec.pool)


@torch.inference_mode()
def assert_same(model: Any, made: Content, tolerance: float = 1e-5) -> None:
    """A timm-style model gives what the exported encoder gives."""
    got = vit_outputs(model.eval(), images(made.spec), made.spec.pool)
    for name, value in expected(made).items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=tolerance * float(value.abs().max()))


# Our own files and timm's -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ENCODERS)
def test_own_files(tmp_path: Path, name: str) -> None:
    made = content(name)
    done = export(made, "safetensors", tmp_path / "folder")
    assert [file.name for file in done.files] == ["encoder.safetensors"]
    encoder, spec = loaded(done)
    assert spec == made.spec
    assert (read_weights(tmp_path / "folder").step, read_weights(tmp_path / "folder").trained) == (7, made.trained)
    assert_same(encoder, made, 0)
    export(made, "safetensors", tmp_path / "one.safetensors")
    assert_same(load_encoder(tmp_path / "one.safetensors")[0], made, 0)


@pytest.mark.parametrize("name", ENCODERS)
def test_timm_folder(tmp_path: Path, name: str) -> None:
    made = content(name)
    done = export(made, "timm", tmp_path / "v1.0")
    assert_same(loaded(done), made)
    stock: Any = timm.create_model(made.spec.timm_name, **made.spec.timm_args)
    assert stock.load_state_dict(load_file(tmp_path / "v1.0" / "model.safetensors"), strict=True)
    assert_same(stock, made)
    head: Any = timm.create_model(f"local-dir:{tmp_path / 'v1.0'}", pretrained=True, num_classes=5)
    assert head(images(made.spec)).shape == (3, 5)
    assert head.patch_embed.state_dict().keys() == stock.patch_embed.state_dict().keys()
    assert all(head.state_dict()[key].equal(value) for key, value in made.tensors.items())
    again, spec = load_encoder(tmp_path / "v1.0")
    assert spec == made.spec
    assert_same(again, made)


def test_timm_folder_tells_the_normalization(tmp_path: Path) -> None:
    export(content("plain"), "timm", tmp_path / "a")
    config = timm.data.resolve_data_config(model=timm.create_model(f"local-dir:{tmp_path / 'a'}"))
    assert config["mean"] == pytest.approx((0.485, 0.456, 0.406), abs=1e-6)
    assert config["std"] == pytest.approx((0.229, 0.224, 0.225), abs=1e-6)
    assert tuple(config["input_size"]) == (3, 32, 32)
    clipped = RGB | {"normalization": normalization(IMAGENET_STATISTICS, "clip-float")}
    mean, std = export_base.scaling(content("plain", **clipped).spec) or ([], [])
    low, high = 123.675 - 2 * 58.395, 123.675 + 2 * 58.395
    assert [(low / 255 - mean[0]) / std[0], (high / 255 - mean[0]) / std[0]] == pytest.approx([0, 1], abs=1e-6)
    assert export_base.scaling(content("ten bands").spec) is None


@pytest.mark.parametrize("name", ["registers", "groups"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_timm_weights_alone(tmp_path: Path, name: str, suffix: str) -> None:
    made = content(name)
    done = export(made, "timm", tmp_path / f"a{suffix}")
    assert list(done.files) == [tmp_path / f"a{suffix}"]
    assert_same(loaded(done), made)


# TorchGeo -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ENCODERS)
def test_names_build_the_encoder(name: str) -> None:
    made = content(name)
    model = timm.create_model(name_of(made.spec), in_chans=len(made.spec.bands))
    assert model.load_state_dict(made.tensors, strict=True)
    assert_same(model, made, 0)


@pytest.mark.parametrize("name", ENCODERS)
def test_torchgeo_classification(tmp_path: Path, name: str) -> None:
    from torchgeo.tasks import Classification

    made = content(name)
    path = tmp_path / "a.ckpt"
    done = export(made, "torchgeo", path)
    model = torch.load(path, weights_only=True)["hyper_parameters"]["model"]
    task = loaded(replace(done, usage=done.usage.replace("...", "3")))
    assert isinstance(task, Classification)
    state = task.model.state_dict()
    assert state.keys() - made.tensors.keys() == {"head.weight", "head.bias"}
    assert all(state[key].equal(value) for key, value in made.tensors.items())
    assert_same(task.model, made)
    assert task.hparams["model"] == model
    again, spec = load_encoder(path)
    assert spec == made.spec
    assert_same(again, made)


def test_torchgeo_takes_timms_folders_without_ours(tmp_path: Path) -> None:
    """Of any size, as timm passes on the arguments that the folder names."""
    from torchgeo.tasks import Classification

    for name in ("registers", "ten bands"):
        made = content(name)
        export(made, "timm", tmp_path / name)
        task = Classification(f"local-dir:{tmp_path / name}", True, in_channels=len(made.spec.bands), num_classes=2)
        assert type(task.model) is timm.models.VisionTransformer
        assert_same(task.model, made)


def test_torchgeo_needs_nothing_of_ours_for_stock_sizes(tmp_path: Path) -> None:
    sizes = {"model": "vit_small", "image_size": 224, "patch_size": 16}
    done = export(content("plain", **sizes), "torchgeo", tmp_path / "a.pth")
    assert "geoexplora" not in done.usage
    stored = torch.load(tmp_path / "a.pth", weights_only=True)
    assert stored["hyper_parameters"] == {"model": "vit_small_patch16_224"}


@pytest.mark.parametrize("name", ["plain", "groups"])
def test_torchgeo_trains_on_it(tmp_path: Path, name: str) -> None:
    from lightning.pytorch import Trainer
    from torch.utils.data import DataLoader
    from torchgeo.tasks import Classification

    made = content(name)
    export(made, "torchgeo", tmp_path / "a.ckpt")
    channels = len(made.spec.bands)
    task = Classification(name_of(made.spec), str(tmp_path / "a.ckpt"), channels, num_classes=2, freeze_backbone=True)
    batch = [{"image": image, "label": torch.tensor(i % 2)} for i, image in enumerate(images(made.spec, 4))]
    trainer = Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    before = task.model.head.weight.clone()
    loader = DataLoader(batch, batch_size=4)  # type: ignore[arg-type]
    trainer.fit(task, loader, loader)
    assert not task.model.head.weight.equal(before)
    assert all(task.model.state_dict()[key].equal(value) for key, value in made.tensors.items())


@pytest.mark.parametrize("name", ["registers", "pooled norm", "groups", "groups, fine-tuned"])
def test_torchgeo_segmentation(tmp_path: Path, name: str) -> None:
    from torchgeo.tasks import SemanticSegmentation

    made = content(name)
    path = tmp_path / "a.ckpt"
    done = export(made, "torchgeo", path, task="segmentation")
    backbone = torch.load(path, weights_only=True)["hyper_parameters"]["backbone"]
    assert backbone == f"tu-{name_of(made.spec)}"
    task = loaded(replace(done, usage=done.usage.replace("...", "4")))
    assert isinstance(task, SemanticSegmentation)
    encoder = task.model.encoder.model
    assert encoder.state_dict().keys() == made.tensors.keys()
    assert_same(encoder, made)
    scores = task(images(made.spec))
    assert scores.shape == (3, 4, made.spec.image_size, made.spec.image_size)
    scores.square().mean().backward()
    assert all(block.attn.qkv.weight.grad.abs().sum() > 0 for block in encoder.blocks)
    assert_same(load_encoder(path)[0], made)


# transformers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HUB)
def test_transformers(tmp_path: Path, name: str) -> None:
    made = content(name)
    done = export(made, "hf-dinov2", tmp_path / "a")
    model = loaded(done)
    assert type(model).__name__ == ("Dinov2WithRegistersModel" if made.spec.style.registers else "Dinov2Model")
    assert model.dtype == torch.float32
    with torch.inference_mode():
        tokens = model.eval()(pixel_values=images(made.spec)).last_hidden_state
    wanted = expected(made)["tokens"]
    torch.testing.assert_close(tokens, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
    stored = load_file(tmp_path / "a" / "model.safetensors")
    assert "encoder.layer.0.attention.attention.query.weight" in stored
    assert "encoder.layer.3.layer_scale2.lambda1" in stored
    if len(made.spec.bands) == 3:
        assert_same(load_encoder(tmp_path / "a")[0], made)


def test_transformers_preprocessor(tmp_path: Path) -> None:
    from PIL import Image
    from transformers import AutoImageProcessor

    export(content("plain"), "hf-dinov2", tmp_path / "a")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "a")
    values = np.asarray(processor(Image.new("RGB", (50, 40), (255, 0, 51)), return_tensors="np")["pixel_values"])
    assert values.shape == (1, 3, 32, 32)
    assert values[0, :, 5, 5] == pytest.approx([(1 - 0.485) / 0.229, -0.456 / 0.224, (0.2 - 0.406) / 0.225], abs=1e-4)
    export(content("ten bands"), "hf-dinov2", tmp_path / "b")
    assert not (tmp_path / "b" / "preprocessor_config.json").exists()


# SatMAE -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SATMAE)
def test_satmae(tmp_path: Path, name: str) -> None:
    made = content(name)
    export(made, "satmae", tmp_path / "a.pth")
    weights = read_weights(tmp_path / "a.pth")
    assert weights.described().style == replace(made.spec.style, layer_scale=False)
    assert not any(".ls1." in key for key in weights.tensors)
    assert_same(load_encoder(weights)[0], made)


def test_satmae_with_decoder(tmp_path: Path) -> None:
    made = content("groups")
    torch.manual_seed(0)
    decoder = MAEDecoder(128, (4, 4), 8, made.spec.timm_args["groups"], 10, width=32, depth=1, heads=4, channel_width=8)
    parts = {name if name == "mask_token" else f"decoder_{name}": v for name, v in decoder.state_dict().items()}
    export(replace(made, decoder=parts, settings={"width": 32, "depth": 1}), "satmae", tmp_path / "a.pth")
    weights = read_weights(tmp_path / "a.pth")
    assert weights.decoder_tensors.keys() == parts.keys()
    assert all(weights.decoder_tensors[key].equal(value) for key, value in parts.items())


@pytest.mark.parametrize("name", ["satmae_group_channel", "satmae_encoder_cls"])
def test_satmae_names_are_the_reference_codes(tmp_path: Path, name: str) -> None:
    """A state dict of SatMAE's own code goes through our reader and comes out the same, byte by byte."""
    arrays = np.load(PARITY / f"{name}.npz")
    state = {
        key.removeprefix("state."): torch.from_numpy(arrays[key]).float() for key in arrays.files if key[:6] == "state."
    }
    parts = {key: value for key, value in state.items() if not key.startswith("head.")}
    decoder = {key: value for key, value in parts.items() if key.startswith("decoder_") or key == "mask_token"}
    encoder = {key: value for key, value in parts.items() if key not in decoder}
    style = Style(channel_width=8, class_token_encoding="channel_cls_embed" in state)
    spec = content("groups", model=CUSTOM, image_size=24, sizes=(32, 2, 4), style=style).spec
    export(Content(spec, encoder, decoder), "satmae", tmp_path / "a.pth")
    written = torch.load(tmp_path / "a.pth", weights_only=True)["model"]
    read = read_weights(tmp_path / "a.pth").tensors
    assert written.keys() == read.keys() == parts.keys()
    for key, value in parts.items():
        assert written[key].numpy().tobytes() == read[key].numpy().tobytes() == value.numpy().tobytes()


# ONNX ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["registers", "groups, fine-tuned"])
def test_onnx(tmp_path: Path, name: str) -> None:
    made = content(name)
    done = export(made, "onnx", tmp_path / "a.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "a.onnx"), providers=["CPUExecutionProvider"])
    assert [part.name for part in session.get_inputs()] == ["image"]
    assert session.get_inputs()[0].shape[1:] == [len(made.spec.bands), 32, 32]
    for batch in (1, 3, 4):
        got = session.run(["tokens", "features"], {"image": images(made.spec, batch).numpy()})
        for value, wanted in zip(got, expected(made, batch).values(), strict=True):
            assert np.abs(value - wanted.numpy()).max() < 1e-5 * float(wanted.abs().max())
    told = session.get_modelmeta().custom_metadata_map
    assert EncoderSpec.from_metadata(told) == made.spec
    assert sum(done.files.values()) < 1.5 * 4 * sum(value.numel() for value in made.tensors.values())
    content_bytes = (tmp_path / "a.onnx").read_bytes()
    for here in (str(Path(torch.__file__).parent), str(Path(exports.__file__).parent), ".py"):
        assert here.encode() not in content_bytes


def test_onnx_keeps_large_weights_in_a_second_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD", 1000)
    made = content("plain", model=CUSTOM, sizes=(64, 1, 4))
    done = export(made, "onnx", tmp_path / "a.onnx")
    assert [file.name for file in done.files] == ["a.onnx", "a.onnx.data"]
    moved = tmp_path.rename(tmp_path.with_name(f"{tmp_path.name}-moved"))
    session = onnxruntime.InferenceSession(str(moved / "a.onnx"), providers=["CPUExecutionProvider"])
    (features,) = session.run(["features"], {"image": images(made.spec).numpy()})
    np.testing.assert_allclose(features, expected(made)["features"].numpy(), atol=1e-5)


def test_onnx_without_its_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("onnx", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(WeightsError, match=r'are not installed\nInstall them: pip install "geoexplora\[onnx\]"'):
        export(content("plain"), "onnx", tmp_path / "a.onnx")
    assert list(tmp_path.iterdir()) == []


# Features, types, refusals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "registers", "groups", "groups, fine-tuned"])
@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_features_are_those_of_probe(name: str, pool: Any) -> None:
    from geoexplora.tasks.features import extract_features

    made = content(name, pool=pool)
    probed = extract_features(made.build(), [{"image": images(made.spec)}], pool).features
    np.testing.assert_allclose(expected(made)["features"].numpy(), probed, rtol=1e-6, atol=1e-6)


PLACES = {
    "timm": "a", "torchgeo": "a.ckpt", "hf-dinov2": "a", "satmae": "a.pth", "safetensors": "a.safetensors"
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("form", PLACES)
def test_half_the_size(tmp_path: Path, form: Any, dtype: Any) -> None:
    made = content("layer scale")
    full = export(made, form, tmp_path / "full" / PLACES[form])
    half = export(made, form, tmp_path / "half" / PLACES[form], dtype=dtype)
    assert sum(half.files.values()) < 0.6 * sum(full.files.values())
    assert {value.dtype for value in half.content.tensors.values()} == {getattr(torch, dtype)}
    assert half.difference < 1e-5
    again = load_encoder(half.path)[0]
    assert_same(again, made, 0.05)


def test_beyond_half_precision(tmp_path: Path) -> None:
    made = content("plain")
    made.tensors["norm.weight"][0] = 1e6
    with pytest.raises(
        WeightsError, match=r"1 tensors hold values beyond .* float16, such as norm.weight\nUse --dtype b"
    ):
        export(made, "timm", tmp_path / "a", dtype="float16")
    assert list(tmp_path.iterdir()) == []
    export(made, "timm", tmp_path / "a", dtype="bfloat16")


@pytest.mark.parametrize(
    ("name", "form", "text"),
    [
        ("groups", "hf-dinov2", "knows no channel groups"),
        ("pooled norm", "hf-dinov2", "has its norm before pooling"),
        ("odd mlp", "hf-dinov2", "cannot have an MLP 100 wide on tokens 64 wide"),
        ("registers", "satmae", "know no registers, which the encoder has"),
        ("groups, registers", "satmae", "know no registers and no swiglu"),
    ],
)
def test_what_a_format_cannot_hold(tmp_path: Path, name: str, form: Any, text: str) -> None:
    with pytest.raises(WeightsError) as caught:
        export(content(name), form, tmp_path / PLACES[form])
    assert text in str(caught.value)
    assert "Export to timm" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_dpt_needs_four_blocks(tmp_path: Path) -> None:
    made = content("plain", model=CUSTOM, sizes=(64, 3, 4))
    with pytest.raises(WeightsError, match="taps 4 blocks, the encoder has 3"):
        export(made, "torchgeo", tmp_path / "a.ckpt", task="segmentation")
    assert export(made, "torchgeo", tmp_path / "a.ckpt").difference < 1e-5


@pytest.mark.parametrize(
    ("form", "output", "settings", "text"),
    [
        ("timn", "a", {}, "unknown format 'timn'\nDid you mean timm?"),
        ("onnx", "a.pth", {}, "Name a file that ends in .onnx, or a folder."),
        ("torchgeo", "a.safetensors", {}, "Name a file that ends in .ckpt or .pth, or a folder."),
        ("torchgeo", "full", {}, "encoder.ckpt exists already"),
        ("hf-dinov2", "a.safetensors", {}, "Name a folder."),
        ("timm", "a.onnx", {}, "Name a file that ends in .safetensors or .pth, or a folder."),
        ("onnx", "a.onnx", {"dtype": "float16"}, "stay float32"),
        ("timm", "a", {"task": "segmentation"}, "Leave out --task"),
        ("safetensors", "there.safetensors", {}, "exists already"),
        ("timm", "full", {}, "exists already"),
        ("hf-dinov2", "there", {}, "exists already"),
        ("onnx", "half.onnx", {}, "half.onnx.data exists already"),
        ("satmae", "folder.pth", {}, "exists already"),
    ],
)
def test_requests_that_contradict_themselves(
    tmp_path: Path, form: Any, output: str, settings: dict[str, Any], text: str
) -> None:
    for name in ("there.safetensors", "there", "half.onnx.data", "full/encoder.ckpt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    (tmp_path / "folder.pth").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError) as caught:
        export(content("plain"), form, tmp_path / output, **settings)
    assert text in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("form", "file"), [("torchgeo", "encoder.ckpt"), ("satmae", "encoder.pth"), ("safetensors", "encoder.safetensors")]
)
def test_formats_of_one_file_take_a_folder(tmp_path: Path, form: Any, file: str) -> None:
    (tmp_path / "exports").mkdir()
    (tmp_path / "exports" / "mine").write_text("mine")
    assert export(content("plain"), form, tmp_path / "exports").path == tmp_path / "exports" / file
    assert {path.name for path in (tmp_path / "exports").iterdir()} == {"mine", file}


def test_a_file_in_the_way_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("mine")
    with pytest.raises(RunError, match=r"cannot write .*there.encoder.ckpt"):
        export(content("plain"), "torchgeo", tmp_path / "there")


@pytest.mark.parametrize("form", ["torchgeo", "satmae", "hf-dinov2", "safetensors", "timm"])
def test_what_was_assumed_stays_assumed(tmp_path: Path, form: Any) -> None:
    made = replace(content("plain"), assumed=("statistics of ImageNet",))
    source = read_weights(export(made, form, tmp_path / "out").path)
    assert (source.assumed, source.told) == (("statistics of ImageNet",), False)
    assert read_weights(export(content("plain"), form, tmp_path / "own").path).told


@pytest.mark.parametrize("form", ["torchgeo", "satmae", "hf-dinov2"])
def test_an_export_is_read_back_with_its_description(tmp_path: Path, form: Any) -> None:
    made = replace(content("ten bands"), step=7, trained=[{"part": "LoRA", "trainable": 1, "frozen": 0}])
    source = read_weights(export(made, form, tmp_path / "out").path)
    assert source.described().bands == made.spec.bands
    assert source.described().normalization == made.spec.normalization
    assert (source.step, source.trained, source.assumed) == (7, made.trained, ())


def test_an_empty_folder_will_do(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    assert len(export(content("plain"), "timm", tmp_path / "a").files) == 2


@pytest.mark.parametrize("form", PLACES)
def test_a_difference_is_found_and_nothing_written(tmp_path: Path, form: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = content("layer scale")
    exporter = type(exports._exporter(form, None))
    write = exporter.write

    def swapped(self: Any, wrong: Content, path: Path) -> None:
        query, key, value = wrong.tensors["blocks.2.attn.qkv.weight"].chunk(3)
        changed = {**wrong.tensors, "blocks.2.attn.qkv.weight": torch.cat([value, key, query])}
        write(self, replace(wrong, tensors=changed), path)

    monkeypatch.setattr(exporter, "write", swapped)
    with pytest.raises(WeightsError, match=r"is not written: read back by .* differ by .* more than 1e-05"):
        export(made, form, tmp_path / PLACES[form])
    assert list(tmp_path.iterdir()) == []


def test_rounding_that_an_encoder_amplifies_is_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = content("plain")
    image = images(made.spec)
    assert 0 < exports._rounding_error(made, image, expected(made)) < 1e-6
    write = SatMAEExporter.write

    def rounded(self: Any, exact: Content, path: Path) -> None:
        write(self, replace(exact, tensors={key: value * (1 + 1e-4) for key, value in exact.tensors.items()}), path)

    monkeypatch.setattr(SatMAEExporter, "write", rounded)
    with pytest.raises(WeightsError, match="more than 1e-05"):
        export(made, "satmae", tmp_path / "a.pth")
    monkeypatch.setattr(exports, "_rounding_error", lambda *_: 1e-3)
    assert 1e-5 < export(made, "satmae", tmp_path / "a.pth").difference < 1e-2


def test_differences() -> None:
    one, two = {"tokens": torch.tensor([1.0, 4.0]), "features": torch.ones(1)}, {"tokens": torch.tensor([1.0, 3.0])}
    assert exports.largest_difference(one, two) == 0.25
    assert exports.largest_difference(one, {"tokens": torch.ones(3)}) == float("inf")
    assert exports.largest_difference(one, {"other": torch.ones(1)}) == float("inf")
    assert not exports.largest_difference(one, {"tokens": torch.tensor([1.0, float("nan")])}) < 1


@pytest.mark.parametrize("form", PLACES)
def test_no_room(tmp_path: Path, form: Any, file_size_limit: Callable[[int], AbstractContextManager[None]]) -> None:
    made = content("plain")
    with file_size_limit(100_000), pytest.raises(RunError, match=r"cannot write .*: File too large\nFree some space"):
        export(made, form, tmp_path / PLACES[form])
    assert list(tmp_path.iterdir()) == []


def test_a_file_where_a_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RunError, match=r"cannot write .*file/a.pth: .*\n.*--output"):
        export(content("plain"), "satmae", tmp_path / "file" / "a.pth")


@pytest.mark.parametrize("form", PLACES)
def test_nothing_tells_where_it_was_made(tmp_path: Path, form: Any) -> None:
    made = content("layer scale")
    done = export(made, form, tmp_path / PLACES[form])
    for file in done.files:
        stored = file.read_bytes()
        for here in (str(tmp_path), str(Path.home()), str(Path(exports.__file__).parents[2])):
            assert here == "/" or here.encode() not in stored
    if form != "hf-dinov2":
        return
    told = json.loads((tmp_path / "a" / "config.json").read_text())["geoexplora"]
    assert EncoderSpec.from_metadata(told) == made.spec
    with safe_open(tmp_path / "a" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
