"""Every format of weights gives the same outputs as the model that it was saved from."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from geoexplora.bands import FMOW_RGB_STATISTICS, FMOW_SENTINEL_BANDS, IMAGENET_STATISTICS
from geoexplora.errors import WeightsError
from geoexplora.registry import Style
from geoexplora.weights.describe import describe, shapes_of
from geoexplora.weights.files import read_weights
from geoexplora.weights.load import load_encoder
from geoexplora.weights.sources.shortcuts import Hints

from . import reference
from .reference import State, random_state, split_projections, to_huggingface

PARITY = Path(__file__).parents[1] / "data" / "parity"


def tokens_of(source: Any, images: Tensor, **options: Any) -> Tensor:
    encoder, _ = load_encoder(read_weights(source, **options))
    with torch.inference_mode():
        tokens: Tensor = encoder.forward_features(images)
    return tokens


def images_for(state: State, seed: int = 1) -> Tensor:
    kernel = state["patch_embed.proj.weight"]
    side = round((state["pos_embed"].shape[1] - 1) ** 0.5) * kernel.shape[-1]
    return torch.randn(2, kernel.shape[1], side, side, generator=torch.Generator().manual_seed(seed))


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "registers": {"registers": 4},
    "giant": {"swiglu": True},
    "giant with registers": {"swiglu": True, "registers": 2},
}
HUGGINGFACE: Callable[[State], Any] = to_huggingface
LAYOUTS: dict[str, Callable[[State], Any]] = {
    "flat": lambda state: state,
    "teacher.backbone": lambda state: {"teacher": {f"backbone.{name}": value for name, value in state.items()}},
    "model with module": lambda state: {
        "model": {f"module.{name}": value for name, value in state.items()},
        "epoch": 3,
    },
    "separate q, k, v": split_projections,
    "separate with short names": lambda state: split_projections(state, ("q", "k", "v")),
    "full ExPLoRA file": lambda state: {"teacher": state | split_projections(state)},
    "chunked blocks": lambda state: {
        name.replace("blocks.0.", "blocks.0.0.").replace("blocks.1.", "blocks.1.1."): value
        for name, value in state.items()
    },
    "huggingface": HUGGINGFACE,
    "huggingface classifier": lambda state: (
        {f"dinov2.{name}": value for name, value in to_huggingface(state).items()}
        | {"classifier.weight": torch.zeros(5, 256)}
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_dinov2_in_every_layout(tmp_path: Path, variant: str, layout: str) -> None:
    state = random_state(**VARIANTS[variant])
    torch.save(LAYOUTS[layout](state), tmp_path / "file.pth")
    images = images_for(state)
    torch.testing.assert_close(
        tokens_of(tmp_path / "file.pth", images), reference.forward(state, images, heads=2), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        ("flat", "meta-dinov2"),
        ("teacher.backbone", "explora"),
        ("full ExPLoRA file", "explora"),
        ("huggingface", "huggingface-dinov2"),
    ],
)
def test_names_of_formats(tmp_path: Path, layout: str, name: str) -> None:
    torch.save(LAYOUTS[layout](random_state()), tmp_path / "any.bin")
    assert read_weights(tmp_path / "any.bin").format == name


def test_dinov2_is_described(tmp_path: Path) -> None:
    torch.save(random_state(384, 12, registers=4, grid=4), tmp_path / "dinov2_vits14_reg4_pretrain.pth")
    source = read_weights(tmp_path / "dinov2_vits14_reg4_pretrain.pth")
    spec = source.described()
    assert (spec.model, spec.width, spec.depth, spec.heads) == ("vit_small", 384, 12, 6)
    assert (spec.image_size, spec.patch_size, spec.style) == (56, 14, Style(layer_scale=True, registers=4))
    assert (spec.timm_name, spec.timm_args) == ("vit_small_patch14_reg4_dinov2", {"img_size": 56, "num_classes": 0})
    assert spec.normalization["mean"] == list(IMAGENET_STATISTICS.mean)
    assert spec.antialias
    assert source.assumed == ("bands red, green, blue", "statistics of ImageNet", "6 attention heads")
    assert set(source.left_out) == {"mask_token"}
    assert "--objective dinov2 takes up" in source.left_out["mask_token"]
    assert source.mask_token is not None
    stock = timm.create_model(spec.timm_name, **spec.timm_args)
    stock.load_state_dict(source.encoder_tensors, strict=True)


def test_sizes_of_the_giant() -> None:
    """Meta's ViT-g rounds the width of its gated MLP as timm's stock model has it."""
    from geoexplora.weights.load import build_encoder
    from geoexplora.weights.spec import EncoderSpec

    spec = EncoderSpec.of(
        "vit_giant", image_size=518, patch_size=14, sensor="rgb", bands=("R", "G", "B"), normalization={},
        style=Style(layer_scale=True, swiglu=True),
    )  # fmt: skip
    assert (spec.timm_name, spec.timm_args) == ("vit_giant_patch14_dinov2", {"num_classes": 0})
    with torch.device("meta"):
        encoder = build_encoder(spec)
    assert encoder.blocks[0].mlp.fc1.weight.shape == (8192, 1536)
    assert encoder.blocks[39].mlp.fc2.weight.shape == (1536, 4096)


def test_separate_projections_count_before_a_fused_one_that_differs(tmp_path: Path) -> None:
    state = random_state()
    stale = {name: torch.zeros_like(value) if ".qkv." in name else value for name, value in state.items()}
    torch.save({"model": stale | split_projections(state)}, tmp_path / "full.pth")
    images = images_for(state)
    torch.testing.assert_close(
        tokens_of(tmp_path / "full.pth", images), reference.forward(state, images, 2), rtol=1e-5, atol=1e-5
    )
    assert "they differ" in read_weights(tmp_path / "full.pth").left_out["blocks.0.attn.qkv.weight beside its parts"]


def test_a_missing_part_of_a_projection_is_told(tmp_path: Path) -> None:
    state = split_projections(random_state())
    del state["blocks.1.attn.k_proj.bias"]
    torch.save(state, tmp_path / "odd.pth")
    with pytest.raises(WeightsError, match=r"lacks blocks.1.attn.k_proj.bias"):
        read_weights(tmp_path / "odd.pth")


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("swiglu", [False, True])
def test_folder_of_transformers(tmp_path: Path, registers: int, swiglu: bool) -> None:
    kind = "Dinov2WithRegisters" if registers else "Dinov2"
    sizes: dict[str, Any] = {"num_register_tokens": registers} if registers else {}
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=96, num_hidden_layers=2, num_attention_heads=3, image_size=28, patch_size=14,
        use_swiglu_ffn=swiglu, layerscale_value=1.0, **sizes,
    )  # fmt: skip
    model = getattr(transformers, f"{kind}Model")(config).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(value.numel())) * 0.1)
    model.save_pretrained(tmp_path / "folder", max_shard_size="200KB")
    assert len(list((tmp_path / "folder").glob("*.safetensors"))) > 1
    (tmp_path / "folder" / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]})
    )
    source = read_weights(tmp_path / "folder")
    assert source.format == "huggingface-dinov2"
    assert source.described().heads == 3
    assert source.described().normalization["std"] == [63.75, 63.75, 63.75]
    images = torch.randn(2, 3, 28, 28)
    with torch.inference_mode():
        expected = model(images).last_hidden_state
    torch.testing.assert_close(tokens_of(tmp_path / "folder", images), expected, rtol=1e-5, atol=1e-5)
    torch.save(model.state_dict(), tmp_path / "in memory.pth")  # transformers' own names have changed with version 5
    torch.testing.assert_close(tokens_of(tmp_path / "in memory.pth", images, heads=3), expected, rtol=1e-5, atol=1e-5)


def test_timm_model_with_its_head(tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=48, depth=2, num_classes=7).eval()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    source = read_weights(tmp_path / "model.safetensors")
    assert source.format == "timm"
    assert source.left_out == dict.fromkeys(["head.weight", "head.bias"], "a head of the source's task")
    assert (source.described().model, source.described().heads) == ("custom", 3)
    assert "3 attention heads" in source.assumed
    images = torch.randn(2, 3, 48, 48)
    torch.testing.assert_close(tokens_of(tmp_path / "model.safetensors", images), model.forward_features(images))


def test_folder_of_timm(tmp_path: Path) -> None:
    from timm.models import save_for_hf

    model = timm.create_model("vit_small_patch14_dinov2", img_size=28, depth=1, num_classes=0).eval()
    save_for_hf(model, tmp_path, safe_serialization=True)
    source = read_weights(tmp_path)
    assert source.described().style.layer_scale
    images = torch.randn(1, 3, 28, 28)
    torch.testing.assert_close(tokens_of(tmp_path, images), model.forward_features(images))


@pytest.mark.parametrize("key", ["model", "backbone"])
def test_checkpoint_of_torchgeo(tmp_path: Path, key: str) -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=4).eval()
    prefix = "model." if key == "model" else "model.backbone.model.model."
    content = {
        "hyper_parameters": {key: "vit_tiny_patch16_224"},
        "state_dict": {prefix + name: value for name, value in model.state_dict().items()},
    }
    torch.save(content, tmp_path / "last.ckpt")
    source = read_weights(tmp_path / "last.ckpt")
    assert (source.format, source.place) == ("torchgeo", f"state_dict.{prefix}")
    images = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(tokens_of(tmp_path / "last.ckpt", images), model.forward_features(images))


def test_masked_encoder_of_lightly(tmp_path: Path) -> None:
    from lightly.models.modules import MaskedVisionTransformerTIMM

    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=0).eval()
    torch.save({"state_dict": MaskedVisionTransformerTIMM(vit=model).state_dict()}, tmp_path / "lightly.pth")
    source = read_weights(tmp_path / "lightly.pth")
    assert (source.place, source.left_out) == (
        "state_dict.vit.",
        {"state_dict.mask_token": "stands outside state_dict.vit"},
    )
    images = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(tokens_of(tmp_path / "lightly.pth", images), model.forward_features(images))


def test_pooled_norm_of_timm(tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=3, global_pool="avg").eval()
    with torch.no_grad():
        model.fc_norm.weight.uniform_(0.5, 2)
    torch.save(model.state_dict(), tmp_path / "fine-tuned.pth")
    encoder, spec = load_encoder(tmp_path / "fine-tuned.pth")
    assert spec.style.pooled_norm
    images = torch.randn(2, 3, 32, 32)
    expected = model.forward_head(model.forward_features(images), pre_logits=True)
    torch.testing.assert_close(encoder(images), expected)


def parity(name: str) -> tuple[dict[str, np.ndarray], State]:
    values = dict(np.load(PARITY / f"{name}.npz"))
    state = {
        key.removeprefix("state."): torch.from_numpy(value) for key, value in values.items() if key.startswith("state.")
    }
    return values, state


def test_satmae_group_channels(tmp_path: Path) -> None:
    values, state = parity("satmae_group_channel")
    torch.save({"model": state, "epoch": 1, "args": argparse.Namespace(dataset_type="sentinel")}, tmp_path / "e199.pth")
    source = read_weights(tmp_path / "e199.pth", heads=4)
    spec = source.described()
    assert source.format == "satmae"
    assert (spec.sensor, spec.bands, len(spec.groups or ())) == ("sentinel-2", FMOW_SENTINEL_BANDS, 3)
    assert not spec.antialias
    assert spec.normalization["method"] == "clip-uint8"
    assert spec.style.channel_width == 8
    assert source.decoder == {"width": 16, "depth": 1}
    assert set(source.tensors) == set(state)
    keep = torch.from_numpy(values["input.noise"]).argsort(1)[:, :6].sort(1).values
    encoder: Any = load_encoder(source)[0].double()
    tokens = encoder._pos_embed(encoder.patch_embed(torch.from_numpy(values["input.image"])))
    order = torch.from_numpy(values["input.noise"]).argsort(1)[:, :6]
    assert keep.shape == order.shape
    visible = tokens[:, 1:].gather(1, order.unsqueeze(-1).expand(-1, -1, 32))
    latent = encoder.norm(encoder.blocks(torch.cat([tokens[:, :1], visible], dim=1)))
    torch.testing.assert_close(latent, torch.from_numpy(values["expected.latent"]), rtol=1e-5, atol=1e-5)


def test_satmae_fine_tuned(tmp_path: Path) -> None:
    values, state = parity("satmae_encoder_cls")
    torch.save({"model": state}, tmp_path / "finetune.pth")
    source = read_weights(tmp_path / "finetune.pth", heads=4)
    assert source.described().style.class_token_encoding
    assert set(source.left_out) == {"head.weight", "head.bias"}
    encoder = load_encoder(source)[0].double()
    features = encoder(torch.from_numpy(values["input.image"]))
    torch.testing.assert_close(features, torch.from_numpy(values["expected.features"]), rtol=1e-5, atol=1e-5)


def test_satmae_temporal_is_the_model_of_one_image(tmp_path: Path) -> None:
    """At the origin of time every token carries sines 0 and cosines 1 of year, month and hour; the class token none."""
    width, depth = 640, 2
    state = random_state(width, depth, patch=8, layer_scale=False, mask_token=False)
    temporal = state | {"pos_embed": state["pos_embed"][:, :, : width - 384].contiguous()}
    torch.save({"model": temporal}, tmp_path / "pretrain_fmow_temporal.pth")
    source = read_weights(tmp_path / "pretrain_fmow_temporal.pth")
    assert source.format == "satmae-temporal"
    assert source.described().normalization["mean"] == list(FMOW_RGB_STATISTICS.mean)
    time = torch.cat([torch.zeros(64), torch.ones(64)]).repeat(3).expand(10, -1).clone()
    time[0] = 0
    whole = state | {"pos_embed": torch.cat([temporal["pos_embed"], time.unsqueeze(0)], dim=-1)}
    images = images_for(state)
    torch.testing.assert_close(
        tokens_of(tmp_path / "pretrain_fmow_temporal.pth", images),
        reference.forward(whole, images, heads=10), rtol=1e-5, atol=1e-5,
    )  # fmt: skip


def test_satmae_rgb_has_its_own_statistics(tmp_path: Path) -> None:
    state = random_state(patch=16, layer_scale=False, mask_token=False)
    torch.save({"model": state, "args": argparse.Namespace(dataset_type="rgb")}, tmp_path / "fmow_pretrain.pth")
    source = read_weights(tmp_path / "fmow_pretrain.pth")
    assert source.format == "satmae-rgb"
    assert source.described().normalization["std"] == list(FMOW_RGB_STATISTICS.std)


def test_heads_that_a_folder_of_timm_states(tmp_path: Path) -> None:
    from timm.models import save_for_hf

    model = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=128, depth=8, num_heads=2, num_classes=0)
    save_for_hf(model.eval(), tmp_path, safe_serialization=True, model_args={"num_heads": 2})
    assert read_weights(tmp_path).described().heads == 2
    images = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(tokens_of(tmp_path, images), model.forward_features(images))
    small = timm.create_model("test_vit", num_classes=0).eval()  # two heads 32 wide, said by its name only
    save_for_hf(small, tmp_path / "named", safe_serialization=True)
    images = torch.randn(1, 3, 160, 160)
    torch.testing.assert_close(tokens_of(tmp_path / "named", images), small.forward_features(images))


@pytest.mark.parametrize(("width", "depth", "heads"), [(1408, 40, 16), (1152, 27, 16), (1024, 24, 16), (128, 8, 4)])
def test_heads_that_nothing_states_are_assumed(width: int, depth: int, heads: int) -> None:
    with torch.device("meta"):
        model = timm.create_model(
            "vit_tiny_patch16_224", img_size=32, embed_dim=width, depth=depth, num_heads=heads, num_classes=0
        )
    shapes = shapes_of("a file", dict(model.state_dict()))
    described, assumed = describe("a file", shapes, Hints(), {}, IMAGENET_STATISTICS)
    assert described.heads == heads
    assert f"{heads} attention heads" in assumed


@pytest.mark.parametrize("setting", [{"layer_norm_eps": 1e-3}, {"hidden_act": "relu"}, {"qkv_bias": False}])
def test_blocks_that_cannot_be_built_are_refused(tmp_path: Path, setting: dict[str, Any]) -> None:
    save_file(to_huggingface(random_state()), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "dinov2"} | setting))
    with pytest.raises(WeightsError, match=f"config.json has {next(iter(setting))}"):
        read_weights(tmp_path)


@pytest.mark.parametrize("first", ["model", "model_ema"])
def test_averaged_weights_count_before_the_raw_ones(tmp_path: Path, first: str) -> None:
    state, raw = random_state(seed=1), random_state(seed=2)
    both = {"model": raw, "model_ema": state}
    torch.save({first: both[first], **both}, tmp_path / "both.pth")
    images = images_for(state)
    torch.testing.assert_close(
        tokens_of(tmp_path / "both.pth", images), reference.forward(state, images, 2), rtol=1e-5, atol=1e-5
    )
    left_out = read_weights(tmp_path / "both.pth").left_out
    assert left_out["model.cls_token"] == "stands outside model_ema"


def test_half_precision_registers_lose_nothing_more(tmp_path: Path) -> None:
    state = {name: value.bfloat16() for name, value in random_state(registers=4).items()}
    torch.save(state, tmp_path / "half.pth")
    expected = {name: value.float() for name, value in state.items()}
    images = images_for(expected)
    torch.testing.assert_close(
        tokens_of(tmp_path / "half.pth", images), reference.forward(expected, images, 2), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        ({"reg_tokens": 4}, 64),  # a position for class token and registers too
        ({"reg_tokens": 4, "no_embed_class": True}, 64),
        ({"no_embed_class": True}, 64),  # as in timm's deit3
    ],
)
def test_rows_of_positions_of_timm(tmp_path: Path, settings: dict[str, Any], size: int) -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=size, depth=2, num_classes=0, **settings).eval()
    with torch.no_grad():
        for value in (model.cls_token, model.pos_embed, model.reg_token):
            if value is not None:
                value.normal_()
    torch.save(model.state_dict(), tmp_path / "file.pth")
    assert read_weights(tmp_path / "file.pth").described().image_size == size
    images = torch.randn(1, 3, size, size)
    torch.testing.assert_close(
        tokens_of(tmp_path / "file.pth", images), model.forward_features(images), rtol=1e-5, atol=1e-5
    )


def test_rows_of_positions_that_fit_two_grids_are_refused(tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=0, reg_tokens=4)
    torch.save(model.state_dict(), tmp_path / "small.pth")
    with pytest.raises(WeightsError, match="9 rows of positions beside 4 register tokens"):
        read_weights(tmp_path / "small.pth")


PREFIXES = st.lists(st.sampled_from(["module", "backbone", "encoder", "model", "net"]), max_size=3)
WRAPPERS = st.sampled_from([(), ("model",), ("teacher",), ("state_dict",), ("state_dict", "model")])


@settings(max_examples=40, deadline=None)
@given(
    heads=st.integers(1, 3),
    depth=st.integers(1, 3),
    patch=st.sampled_from([4, 7, 14, 16]),
    grid=st.integers(2, 4),
    registers=st.integers(0, 4),
    layer_scale=st.booleans(),
    swiglu=st.booleans(),
    layout=st.sampled_from(["meta", "separate", "both"]),
    prefixes=PREFIXES,
    wrappers=WRAPPERS,
    student=st.booleans(),
)
def test_any_size_prefix_and_wrapper(
    tmp_path_factory: pytest.TempPathFactory,
    heads: int,
    depth: int,
    patch: int,
    grid: int,
    registers: int,
    layer_scale: bool,
    swiglu: bool,
    layout: str,
    prefixes: list[str],
    wrappers: tuple[str, ...],
    student: bool,
) -> None:
    state = random_state(
        64 * heads, depth, patch, grid, registers=registers, layer_scale=layer_scale, swiglu=swiglu, mask_token=False
    )
    split = split_projections(state)
    prefix = "".join(f"{part}." for part in prefixes)
    stored = {
        prefix + name: value
        for name, value in {"meta": state, "separate": split, "both": state | split}[layout].items()
    }
    content: Any = stored
    for wrapper in reversed(wrappers):
        content = {wrapper: content, "epoch": 1}
    if student and wrappers and wrappers[0] == "teacher":
        content["student"] = {name: torch.zeros_like(value) for name, value in stored.items()}
    file = tmp_path_factory.mktemp("any") / "file.pth"
    torch.save(content, file)
    spec = read_weights(file).described()
    assert (spec.width, spec.depth, spec.heads, spec.patch_size) == (64 * heads, depth, heads, patch)
    assert spec.image_size == grid * patch
    assert spec.style == Style(layer_scale=layer_scale, registers=registers, swiglu=swiglu)
    images = images_for(state)
    torch.testing.assert_close(tokens_of(file, images), reference.forward(state, images, heads), rtol=2e-5, atol=2e-5)
