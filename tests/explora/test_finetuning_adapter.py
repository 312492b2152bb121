"""Fine-tuning on disk: complete, minimal, open to stock peft."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import peft
import pytest
import timm
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from geoexplora.errors import ConfigError, WeightsError
from geoexplora.explora import (
    ExploraConfig,
    FinetuneConfig,
    SplitAttention,
    apply_finetuning,
    load_adapted_encoder,
    load_adapter,
    merge_lora,
    merged_state_dict,
    read_adapter,
    save_adapter,
)
from geoexplora.explora.adapter import CONFIG_FILE, LORA_FILE, TRAINED_FILE
from geoexplora.weights.files import read_weights
from geoexplora.weights.load import build_encoder, load_into
from geoexplora.weights.spec import EncoderSpec

from .conftest import PLAIN, SIZES, fill_lora, images_for, plain_encoder, trainable
from .finetuning_helpers import ADAPTERS, CONFIGS, KINDS, STEPS, optimizer_for, train
from .test_adapter import SPEC, split_state, trained, weights

with_adapters = pytest.mark.parametrize("config", ADAPTERS, ids=lambda config: config.method)


def tuned(encoder: Any, config: FinetuneConfig) -> Any:
    """The encoder after the whole run: of AdaLoRA, ranks are taken away."""
    tuning = apply_finetuning(encoder, config)
    train(encoder, tuning, optimizer_for(encoder), range(1, STEPS + 1))
    return encoder.eval()


@pytest.mark.parametrize("kind", KINDS)
@with_adapters
def test_round_trip(tmp_path: Path, config: FinetuneConfig, kind: str) -> None:
    encoder = tuned(KINDS[kind](), config)
    save_adapter(tmp_path, encoder, config, SPEC)
    other = KINDS[kind]().eval()
    assert load_adapter(tmp_path, other, weights()) == config
    assert trainable(other) == trainable(encoder)
    state = other.state_dict()
    assert state.keys() == encoder.state_dict().keys()
    assert all(state[name].equal(value) for name, value in encoder.state_dict().items())
    merged = merged_state_dict(encoder)
    assert all(value.equal(merged[name]) for name, value in merge_lora(other).state_dict().items())


@with_adapters
def test_only_what_was_trained_is_stored_and_told(tmp_path: Path, config: FinetuneConfig) -> None:
    encoder = tuned(plain_encoder(), config)
    save_adapter(tmp_path, encoder, config, SPEC)
    lora = load_file(tmp_path / LORA_FILE)
    assert sum(tensor.numel() for tensor in lora.values()) == sum(
        p.numel() for p in encoder.parameters() if p.requires_grad
    )
    assert all(name.startswith("base_model.model.blocks.") and ".lora_" in name for name in lora)
    assert load_file(tmp_path / TRAINED_FILE) == {}
    with safe_open(tmp_path / TRAINED_FILE, "pt") as file:
        header = file.metadata()
    assert json.loads(header["finetune"])["method"] == config.method
    assert "explora" not in header
    spec, told, tensors = read_adapter(tmp_path)
    assert (spec, told) == (SPEC, config)
    assert tensors.keys() == trainable(encoder)


@pytest.mark.parametrize("depth", [4, 12])  # peft shortens target lists of 20 names and more
@pytest.mark.parametrize("trainable", [False, True])
@with_adapters
def test_stock_peft_opens_it(tmp_path: Path, config: FinetuneConfig, depth: int, trainable: bool) -> None:
    source = plain_encoder(depth=depth)
    encoder = tuned(plain_encoder(depth=depth), config)
    save_adapter(tmp_path, encoder, config, SPEC)
    base = timm.create_model(PLAIN, **(SIZES | {"depth": depth}), init_values=1.0, attn_layer=SplitAttention)
    base.load_state_dict(split_state(source), strict=True)
    opened: Any = peft.PeftModel.from_pretrained(base, str(tmp_path), is_trainable=trainable).eval()
    layers = [name for name, module in opened.named_modules() if isinstance(module, BaseTunerLayer)]
    assert len(layers) == depth * 2
    for name, value in encoder.named_parameters():
        if ".lora_" in name:
            assert opened.get_parameter(f"base_model.model.{name}").equal(value)
    images = images_for(encoder)
    torch.testing.assert_close(opened(images), encoder(images), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(opened(images), source.eval()(images), rtol=1e-2, atol=1e-2)


@with_adapters
def test_peft_writes_the_same_names(tmp_path: Path, config: FinetuneConfig) -> None:
    base = timm.create_model(PLAIN, **SIZES, attn_layer=SplitAttention)
    encoder = plain_encoder(init_values=None)
    apply_finetuning(encoder, config)
    save_adapter(tmp_path / "ours", encoder, config, SPEC)
    opened: Any = peft.PeftModel.from_pretrained(base, str(tmp_path / "ours"))
    opened.save_pretrained(tmp_path / "peft")
    ours, theirs = (load_file(tmp_path / folder / LORA_FILE) for folder in ("ours", "peft"))
    assert ours.keys() == theirs.keys()
    assert all(tensor.equal(theirs[name]) for name, tensor in ours.items())


@with_adapters
def test_the_config_is_peft_s_own(tmp_path: Path, config: FinetuneConfig) -> None:
    save_adapter(tmp_path, tuned(plain_encoder(), config), config, SPEC)
    stored = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert stored["peft_type"] == ("ADALORA" if config.method == "adalora" else "LORA")
    assert stored["use_dora"] == (config.method == "dora")
    assert len(stored["target_modules"]) == 8
    if config.method == "adalora":
        assert (stored["target_r"], stored["init_r"], stored["rank_pattern"]) == (4, 6, None)
    else:
        assert stored["r"] == config.rank


@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[4]], ids=lambda config: config.method)
def test_methods_without_adapters_have_none_to_store(tmp_path: Path, config: FinetuneConfig) -> None:
    encoder = plain_encoder()
    apply_finetuning(encoder, config)
    with pytest.raises(ConfigError, match=f"method {config.method} has no adapter to store\nStore the encoder"):
        save_adapter(tmp_path / "adapter", encoder, config, SPEC)
    assert not (tmp_path / "adapter").exists()


def damaged(folder: Path, **settings: Any) -> None:
    header = SPEC.to_metadata() | {"finetune": json.dumps(asdict(ADAPTERS[0]) | settings)}
    save_file({"x": torch.zeros(1)}, folder / TRAINED_FILE, header)


@pytest.mark.parametrize("settings", [{"power": 9}, {"targets": 3}])
def test_a_damaged_header_is_told(tmp_path: Path, settings: dict[str, Any]) -> None:
    damaged(tmp_path, **settings)
    with pytest.raises(WeightsError, match="damaged header"):
        read_adapter(tmp_path)


@with_adapters
def test_an_adapter_of_another_shape_is_refused(tmp_path: Path, config: FinetuneConfig) -> None:
    encoder = plain_encoder()
    apply_finetuning(encoder, config)
    save_adapter(tmp_path, encoder, config, SPEC)
    with pytest.raises(WeightsError, match="does not fit the encoder"):
        load_adapter(tmp_path, plain_encoder(depth=5), weights())
    stored = load_file(tmp_path / LORA_FILE)
    stored.pop(next(name for name in stored if "lora_B" in name))
    save_file(stored, tmp_path / LORA_FILE)
    with pytest.raises(WeightsError, match="1 tensors differ, such as blocks"):
        load_adapter(tmp_path, plain_encoder(), weights())


@with_adapters
def test_source_and_adapter_together_give_the_tuned_encoder(tmp_path: Path, config: FinetuneConfig) -> None:
    from ..weights.reference import random_state

    torch.save(random_state(width=128, depth=3, patch=14, grid=4), tmp_path / "dinov2.pth")
    source = read_weights(tmp_path / "dinov2.pth")
    spec = EncoderSpec.of(
        "custom", sizes=(128, 3, 2), image_size=48, patch_size=8, sensor="rgb", bands=("R", "G", "B"),
        normalization=source.described().normalization, style=source.described().style,
    )  # fmt: skip
    encoder: Any = build_encoder(spec)
    report = load_into(encoder, source, spec=spec, patch_resize="bilinear")
    spec = replace(spec, source=source.record(), patch_resize=report.patch_resize)
    apply_finetuning(encoder, config)
    save_adapter(tmp_path / "adapter", fill_lora(encoder), config, spec)
    restored, told = load_adapted_encoder(tmp_path / "adapter", tmp_path / "dinov2.pth")
    assert told == spec
    expected: dict[str, Tensor] = merged_state_dict(encoder)
    assert all(value.equal(expected[name]) for name, value in restored.state_dict().items())


def test_frozen_patch_embeddings_that_started_at_random_cannot_be_rebuilt(tmp_path: Path) -> None:
    encoder = plain_encoder()
    apply_finetuning(encoder, ADAPTERS[0])
    save_adapter(tmp_path, encoder, ADAPTERS[0], replace(SPEC, band_init="random"))
    with pytest.raises(WeightsError, match="patch embeddings that started at random"):
        load_adapted_encoder(tmp_path, tmp_path / "base.pth")


def test_adapters_of_pre_training_are_still_told_apart(tmp_path: Path) -> None:
    config = ExploraConfig((4,), 3)
    save_adapter(tmp_path, trained(plain_encoder(), config), config, SPEC)
    assert read_adapter(tmp_path)[1] == config
