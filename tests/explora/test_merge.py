"""Merged equals unmerged, and what comes out is stock timm."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from timm.layers import Attention

from geoexplora.explora import (
    ExploraConfig,
    SplitAttention,
    apply_explora,
    apply_explora_to_decoder,
    merge_lora,
    merged_state_dict,
)
from geoexplora.models.linear import use_fast_linears

from .conftest import (
    ENCODERS,
    PLAIN,
    SIZES,
    decoder_for,
    fill_lora,
    images_for,
    loss_of,
    plain_encoder,
    trainable,
)

CONFIG = ExploraConfig((4,), 3, alpha=5.0)
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-12}


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_merged_equals_unmerged(encoder: Any, dtype: torch.dtype, training: bool, fast: bool) -> None:
    encoder.to(dtype)
    images = images_for(encoder)
    base = encoder(images)
    apply_explora(encoder, CONFIG)
    if fast:
        use_fast_linears(encoder)
    fill_lora(encoder).train(training)
    expected = encoder(images)
    assert not torch.allclose(expected, base, rtol=0.1, atol=0.1)  # LoRA does something
    tolerance = TOLERANCES[dtype] * expected.abs().max().item()
    merged = merge_lora(copy.deepcopy(encoder))
    torch.testing.assert_close(merged(images), expected, rtol=TOLERANCES[dtype], atol=tolerance)
    assert merged.training == training


def test_merging_leaves_no_trace(encoder: Any) -> None:
    names = list(encoder.state_dict())
    apply_explora(encoder, CONFIG)
    assert merge_lora(encoder) is encoder
    assert list(encoder.state_dict()) == names
    assert not hasattr(encoder, "peft_config")
    assert all(type(block.attn) is Attention for block in encoder.blocks)
    assert not any(isinstance(module, BaseTunerLayer | SplitAttention) for module in encoder.modules())


def test_merging_twice_and_without_lora_changes_nothing(encoder: Any) -> None:
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    merge_lora(encoder)
    assert all(value.equal(before[name]) for name, value in encoder.state_dict().items())
    apply_explora(encoder, CONFIG)
    merged = merged_state_dict(merge_lora(fill_lora(encoder)))
    again = merged_state_dict(merge_lora(encoder))
    assert all(value.equal(merged[name]) for name, value in again.items())


def test_merging_at_the_start_gives_the_base_back_to_the_bit(encoder: Any) -> None:
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    apply_explora(encoder, CONFIG)
    state = merged_state_dict(encoder)
    assert state.keys() == before.keys()
    assert all(value.equal(before[name]) for name, value in state.items())


def test_the_update_is_scaled_and_reaches_queries_and_values_only() -> None:
    encoder = plain_encoder().double()
    base = merged_state_dict(encoder)
    apply_explora(encoder, CONFIG)
    fill_lora(encoder)
    merged = merged_state_dict(encoder)
    changed = {name for name in merged if not merged[name].equal(base[name])}
    assert changed == {f"blocks.{number}.attn.qkv.weight" for number in range(3)}
    layer = encoder.blocks[1].attn.v_proj
    update = 5 / 3 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    difference = merged["blocks.1.attn.qkv.weight"] - base["blocks.1.attn.qkv.weight"]
    torch.testing.assert_close(difference[64:], update.detach(), rtol=1e-9, atol=1e-12)
    assert (difference[32:64] == 0).all()


def test_state_dict_of_a_model_that_goes_on_training(encoder: Any) -> None:
    apply_explora(encoder, CONFIG)
    fill_lora(use_fast_linears(encoder)).train()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    flags = trainable(encoder)
    state = merged_state_dict(encoder)
    assert all(value.device.type == "cpu" and not value.requires_grad for value in state.values())
    assert {name: value for name, value in encoder.state_dict().items()}.keys() == before.keys()
    assert all(value.equal(before[name]) for name, value in encoder.state_dict().items())
    assert trainable(encoder) == flags
    assert hasattr(encoder, "peft_config")


def test_rgb_loads_into_stock_timm() -> None:
    encoder = plain_encoder()
    images = images_for(encoder)
    apply_explora(encoder, CONFIG)
    fill_lora(encoder).eval()
    stock = timm.create_model(PLAIN, **SIZES, init_values=1.0).eval()
    stock.load_state_dict(merged_state_dict(encoder), strict=True)
    torch.testing.assert_close(stock(images), encoder(images), rtol=1e-5, atol=1e-4)


def test_groups_load_into_the_registered_model() -> None:
    encoder = ENCODERS["groups"]()
    apply_explora(encoder, CONFIG)
    other = ENCODERS["groups"]()
    other.load_state_dict(merged_state_dict(fill_lora(encoder)), strict=True)
    images = images_for(encoder)
    torch.testing.assert_close(other.eval()(images), encoder.eval()(images), rtol=1e-5, atol=1e-4)


def test_decoder(encoder: Any) -> None:
    decoder = decoder_for(encoder)
    names = list(decoder.state_dict())
    apply_explora_to_decoder(decoder, CONFIG, pretrained=True, new_bands=True)
    fill_lora(decoder)
    expected = loss_of(encoder, decoder)
    merge_lora(decoder)
    assert list(decoder.state_dict()) == names
    torch.testing.assert_close(loss_of(encoder, decoder), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(value: float) -> None:
    encoder = plain_encoder()
    apply_explora(encoder, CONFIG)
    with torch.no_grad():
        encoder.blocks[1].attn.v_proj.lora_B["default"].weight[0, 0] = value
    with pytest.raises(FloatingPointError, match=r"blocks\.1\.attn\.v_proj is not finite"):
        merge_lora(encoder)


def test_fusing_with_lora_is_refused() -> None:
    encoder = plain_encoder()
    apply_explora(encoder, CONFIG)
    with pytest.raises(ValueError, match="merge LoRA before"):
        encoder.blocks[0].attn.to_fused()
