"""Fine-tuning by each method: what trains, what stays, what comes out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import timm
import torch
from timm.layers import Attention
from torch import Tensor, nn
from torch.nn import functional as F

from geoexplora.errors import ConfigError, RunError
from geoexplora.explora import (
    ExploraConfig,
    FinetuneConfig,
    apply_explora,
    apply_finetuning,
    attention,
    merge_lora,
    merged_state_dict,
)
from geoexplora.explora.lora import lora_projections
from geoexplora.models.linear import use_fast_linears

from .conftest import SIZES, WIDTH, fill_lora, images_for, plain_encoder, trainable
from .finetuning_helpers import ADAPTERS, CONFIGS, KINDS, STEPS, optimizer_for, train

by_method = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.method)
with_adapters = pytest.mark.parametrize("config", ADAPTERS, ids=lambda config: config.method)
by_kind = pytest.mark.parametrize("kind", KINDS)


@by_kind
@by_method
def test_initial_output_equals_the_base(config: FinetuneConfig, kind: str) -> None:
    encoder = KINDS[kind]().double()
    images = images_for(encoder)
    expected = encoder(images)
    apply_finetuning(encoder, config)
    torch.testing.assert_close(encoder(images), expected, rtol=1e-10, atol=1e-10)


FACTORS = {
    "lora": ("lora_A.default.weight", "lora_B.default.weight"),
    "dora": ("lora_A.default.weight", "lora_B.default.weight", "lora_magnitude_vector.default.weight"),
    "adalora": ("lora_A.default", "lora_B.default", "lora_E.default"),
}


@by_kind
@by_method
def test_the_exact_trainable_set(config: FinetuneConfig, kind: str) -> None:
    encoder = KINDS[kind]()
    names = {name for name, _ in encoder.named_parameters()}
    encoder.blocks[2].requires_grad_(False)  # what trained before does not matter
    apply_finetuning(encoder, config)
    expected = {
        f"blocks.{number}.attn.{target}.{factor}"
        for number in range(4)
        for target in ("q_proj", "v_proj")
        for factor in FACTORS.get(config.method, ())
    }
    assert trainable(encoder) == (names if config.method == "full" else expected)


@pytest.mark.parametrize("fast", [False, True])
@by_kind
@by_method
def test_steps_change_all_that_trains_and_nothing_else(config: FinetuneConfig, kind: str, fast: bool) -> None:
    encoder = KINDS[kind]()
    tuning = apply_finetuning(encoder, config)
    if fast:
        use_fast_linears(encoder)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    if config.method == "linear":
        assert not encoder(images_for(encoder)).requires_grad
        return
    train(encoder, tuning, optimizer_for(encoder), (1, 2))  # adapters start at zero: some gradients come one step later
    after = encoder.state_dict()
    assert {name for name in after if not after[name].equal(before[name])} == trainable(encoder)
    assert all(p.grad is None for p in encoder.parameters() if not p.requires_grad)


# Merging.


@pytest.mark.parametrize("fast", [False, True])
@by_kind
@with_adapters
def test_merged_equals_unmerged(config: FinetuneConfig, kind: str, fast: bool) -> None:
    encoder = KINDS[kind]()
    images = images_for(encoder)
    base = encoder(images)
    apply_finetuning(encoder, config)
    fill_lora(use_fast_linears(encoder) if fast else encoder).eval()
    expected = encoder(images)
    assert not torch.allclose(expected, base, rtol=0.1, atol=0.1)
    merged = KINDS[kind]().eval()
    merged.load_state_dict(merged_state_dict(encoder), strict=True)
    assert all(type(block.attn) is Attention for block in merged.blocks)
    close = {"rtol": 1e-5, "atol": 1e-5 * expected.abs().max().item()}
    torch.testing.assert_close(merged(images), expected, **close)
    torch.testing.assert_close(merge_lora(encoder)(images), expected, **close)
    assert not hasattr(encoder, "peft_config")


def test_merging_after_adalora_has_taken_ranks_away() -> None:
    encoder = plain_encoder()
    tuning = apply_finetuning(encoder, FinetuneConfig("adalora", 4, total_steps=STEPS))
    train(encoder, tuning, optimizer_for(encoder), range(1, STEPS + 1))
    layer = encoder.blocks[1].attn.v_proj
    assert sum(tuning.ranks().values()) == 4 * 8
    images = images_for(encoder)
    expected = encoder.eval()(images)
    base = {name: value.clone() for name, value in layer.base_layer.state_dict().items()}
    kept = [row for row, value in enumerate(layer.lora_E["default"]) if value != 0]
    update = sum(
        layer.lora_E["default"][row] * layer.lora_B["default"][:, row, None] * layer.lora_A["default"][row]
        for row in kept
    )
    merge_lora(encoder)
    torch.testing.assert_close(encoder(images), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    merged = encoder.blocks[1].attn.qkv.weight[2 * WIDTH :]
    torch.testing.assert_close(merged - base["weight"], torch.as_tensor(update), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[4]], ids=lambda config: config.method)
def test_without_adapters_the_encoder_stays_plain(config: FinetuneConfig) -> None:
    encoder = plain_encoder()
    names = list(encoder.state_dict())
    apply_finetuning(encoder, config)
    assert list(encoder.state_dict()) == list(merged_state_dict(encoder)) == names
    assert all(type(block.attn) is Attention for block in encoder.blocks)


def value_update(encoder: Any, block: int) -> Tensor:
    layer = encoder.blocks[block].attn.v_proj
    return (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).detach()


@by_kind
def test_the_weights_of_the_task_are_the_sum_of_three(kind: str) -> None:
    """W_task = W_S + Delta_T + Delta_task."""
    encoder = KINDS[kind]().double()
    source = merged_state_dict(encoder)
    apply_explora(encoder, ExploraConfig((4,), 2))
    fill_lora(encoder, seed=1)
    explora = value_update(encoder, 1)
    with torch.no_grad():
        encoder.blocks[3].attn.qkv.weight += 0.5
    merge_lora(encoder)
    images = images_for(encoder)
    expected = encoder(images)
    apply_finetuning(encoder, FinetuneConfig("lora", 3))
    torch.testing.assert_close(encoder(images), expected, rtol=1e-10, atol=1e-10)
    fill_lora(encoder, seed=2)
    task = {number: value_update(encoder, number) for number in (1, 3)}
    expected = encoder(images)
    merged = merged_state_dict(encoder)
    rows = slice(2 * WIDTH, 3 * WIDTH)
    for number, delta in {1: explora + task[1], 3: 0.5 + task[3]}.items():
        name = f"blocks.{number}.attn.qkv.weight"
        torch.testing.assert_close(merged[name][rows], source[name][rows] + delta, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(merge_lora(encoder)(images), expected, rtol=1e-10, atol=1e-10)


# Against slow references.


def update_by_hand(layer: Any, method: str, alpha: float, rank: int) -> Tensor:
    """The adapted weight of a projection, entry by entry."""
    weight = layer.base_layer.weight.detach()
    factors = [layer.lora_A["default"], layer.lora_B["default"]]
    down, up = (factor.weight if isinstance(factor, nn.Module) else factor for factor in factors)
    adapted = weight.clone()
    for row in range(weight.shape[0]):
        for column in range(weight.shape[1]):
            terms = [up[row, i].item() * down[i, column].item() for i in range(down.shape[0])]
            if method == "adalora":
                terms = [term * layer.lora_E["default"][i, 0].item() for i, term in enumerate(terms)]
            adapted[row, column] += alpha / rank * sum(terms)
    if method == "dora":
        for row in range(weight.shape[0]):
            adapted[row] *= layer.lora_magnitude_vector["default"].weight[row].item() / adapted[row].norm()
    return adapted


@with_adapters
def test_the_forward_pass_by_hand(config: FinetuneConfig) -> None:
    encoder = plain_encoder().double()
    apply_finetuning(encoder, config)
    fill_lora(encoder)
    block = encoder.blocks[1].attn
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    assert config.alpha is not None
    q, v = (
        F.linear(x, update_by_hand(layer, config.method, config.alpha, config.rank), layer.base_layer.bias)
        for layer in (block.q_proj, block.v_proj)
    )
    k = block.k_proj(x)
    heads = []
    for head in range(4):
        cut = slice(8 * head, 8 * head + 8)
        weights = (q[..., cut] @ k[..., cut].mT / 8**0.5).softmax(dim=-1)
        heads.append(weights @ v[..., cut])
    # peft divides AdaLoRA's update by the rank plus 1e-5
    torch.testing.assert_close(block(x), block.proj(torch.cat(heads, dim=-1)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("config", "calls"), [(ADAPTERS[0], 4), (ADAPTERS[1], 0), (ADAPTERS[2], 0)])
def test_only_plain_lora_takes_the_merged_product(config: FinetuneConfig, calls: int) -> None:
    encoder = plain_encoder()
    apply_finetuning(encoder, config)
    with mock.patch.object(attention, "lora_projections", side_effect=lora_projections) as counter:
        encoder(images_for(encoder)).sum().backward()
    assert counter.call_count == calls
    assert all(p.grad is not None for p in encoder.parameters() if p.requires_grad)


@pytest.mark.parametrize("method", ["lora", "dora", "adalora"])
def test_without_alpha_the_update_is_not_scaled(method: Any) -> None:
    encoder = plain_encoder().double()
    apply_finetuning(encoder, FinetuneConfig(method, 3, total_steps=8))
    layer = fill_lora(encoder).blocks[0].attn.q_proj
    expected = update_by_hand(layer, method, 1.0, 1)
    merge_lora(encoder)
    torch.testing.assert_close(encoder.blocks[0].attn.qkv.weight[:WIDTH], expected, rtol=1e-5, atol=1e-6)


# Refusals.


def unchanged(encoder: Any, before: Any) -> bool:
    state, flags = encoder.state_dict(), trainable(encoder)
    return flags == trainable(before) and all(state[name].equal(value) for name, value in before.state_dict().items())


@pytest.mark.parametrize("first", [*ADAPTERS, ExploraConfig((4,), 2)], ids=lambda config: config.name)
@by_method
def test_a_model_with_adapters_is_refused_and_keeps_them(config: FinetuneConfig, first: Any) -> None:
    encoder = plain_encoder()
    (apply_explora if isinstance(first, ExploraConfig) else apply_finetuning)(encoder, first)
    before = copy.deepcopy(fill_lora(encoder))
    with pytest.raises(ConfigError, match=r"already carries LoRA\n.*merge_lora"):
        apply_finetuning(encoder, config)
    assert unchanged(encoder, before)
    apply_finetuning(merge_lora(encoder), config)


def refused(encoder: Any, config: FinetuneConfig, message: str) -> None:
    before = copy.deepcopy(encoder)
    with pytest.raises(ConfigError, match=message):
        apply_finetuning(encoder, config)
    assert unchanged(encoder, before)
    assert not hasattr(encoder, "peft_config")


@by_kind
@pytest.mark.parametrize(("method", "rank", "start"), [("lora", 33, 33), ("dora", 33, 33), ("adalora", 22, 33)])
def test_a_rank_over_the_width_is_refused(method: Any, rank: int, start: int, kind: str) -> None:
    encoder = KINDS[kind]()
    refused(encoder, FinetuneConfig(method, rank, total_steps=8), f"LoRA rank {start} exceeds the width 32")
    assert type(encoder.blocks[0].attn) is Attention
    apply_finetuning(encoder, FinetuneConfig(method, rank - 1, total_steps=8))


def gate(attention: Attention) -> None:
    attention.gate = nn.Linear(WIDTH, WIDTH)


class OtherAttention(Attention):
    pass


def to_other(attention: Attention) -> None:
    attention.__class__ = OtherAttention


@with_adapters
@pytest.mark.parametrize(
    ("change", "message"),
    [(gate, "cannot split the gated attention in block 3"), (to_other, "cannot split OtherAttention in block 3")],
)
def test_attention_that_cannot_be_split_is_refused(
    config: FinetuneConfig, change: Callable[[Attention], None], message: str
) -> None:
    encoder = timm.create_model("vit_tiny_patch16_224", **SIZES)
    change(encoder.blocks[2].attn)
    refused(encoder, config, message)
    assert type(encoder.blocks[0].attn) is Attention


def test_without_adapters_attention_may_be_any() -> None:
    encoder = timm.create_model("vit_tiny_patch16_224", **SIZES, attn_layer=OtherAttention)
    apply_finetuning(encoder, FinetuneConfig("full"))
    assert all(parameter.requires_grad for parameter in encoder.parameters())


# What the training loop is owed.


@pytest.mark.parametrize("config", [c for c in CONFIGS if c.method != "adalora"], ids=lambda config: config.method)
def test_other_methods_ask_for_nothing(config: FinetuneConfig) -> None:
    tuning = apply_finetuning(plain_encoder(), config)
    assert tuning.regularization() is None
    assert tuning.ranks() == {}
    tuning.after_step(7)
    assert tuning.state_dict() == {"method": config.method}
    tuning.load_state_dict(tuning.state_dict())
    assert tuning.whole_blocks == ((1, 2, 3, 4) if config.method == "full" else ())


def test_the_state_of_another_method_is_refused() -> None:
    tuning = apply_finetuning(plain_encoder(), CONFIGS[2])
    with pytest.raises(RunError, match="the checkpoint is of method lora, not adalora"):
        tuning.load_state_dict({"method": "lora"})
