"""The product with W + BA and its low-rank backward against peft's own layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import peft
import pytest
import torch
from torch import Tensor, nn

from geoexplora.explora import SplitAttention, attention
from geoexplora.explora.lora import base_layer, is_fusible, lora_factors, lora_projections

from .conftest import randomize

WIDTH = 8
EXACT = {"rtol": 1e-12, "atol": 1e-12}


class Holder(nn.Module):
    """Something that peft can adapt."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.attn = SplitAttention(WIDTH, num_heads=2, qkv_bias=bias)

    @property
    def layers(self) -> tuple[nn.Module, ...]:
        return self.attn.q_proj, self.attn.k_proj, self.attn.v_proj

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x)


def build(
    targets: tuple[str, ...] = ("q_proj", "v_proj"), *, bias: bool = True, dtype: torch.dtype = torch.float64,
    config: Callable[..., Any] = peft.LoraConfig, **settings: Any,
) -> Holder:  # fmt: skip
    torch.manual_seed(0)
    holder = Holder(bias).to(dtype).requires_grad_(False)
    settings = {"r": 3, "lora_alpha": 5} | settings
    peft.inject_adapter_in_model(config(target_modules=list(targets), **settings), holder)
    return randomize(holder.train())


def tokens(dtype: torch.dtype = torch.float64, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 5, WIDTH, dtype=torch.float64, generator=generator).to(dtype)


def by_peft(x: Tensor, layers: tuple[nn.Module, ...]) -> Tensor:
    return torch.cat([layer(x) for layer in layers], dim=-1)


def gradients(holder: Holder, out: Tensor, x: Tensor) -> dict[str, Tensor]:
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    trained = {name: p for name, p in holder.named_parameters() if p.requires_grad}
    inputs = [*trained.values(), *([x] if x.requires_grad else [])]
    names = [*trained, *(["input"] if x.requires_grad else [])]
    return dict(zip(names, torch.autograd.grad((out * weights).sum(), inputs), strict=True))


@contextmanager
def counted() -> Iterator[mock.Mock]:
    """Counts how often attention takes the product with W + BA."""
    with mock.patch.object(attention, "lora_projections", side_effect=lora_projections) as counter:
        yield counter


TARGETS = [("q_proj", "v_proj"), ("q_proj", "k_proj", "v_proj"), ("k_proj",)]


@pytest.mark.parametrize("batch", [0, 1, 2])
@pytest.mark.parametrize("needs_input", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("targets", TARGETS)
def test_values_and_gradients_are_peft_s(targets: tuple[str, ...], bias: bool, needs_input: bool, batch: int) -> None:
    holder = build(targets, bias=bias)
    x = tokens(batch=batch).requires_grad_(needs_input)
    out, expected = lora_projections(x, holder.layers), by_peft(x, holder.layers)
    torch.testing.assert_close(out, expected, **EXACT)
    ours, theirs = gradients(holder, out, x), gradients(holder, expected, x)
    assert len(ours) == 2 * len(targets) + needs_input
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, **EXACT)


def test_gradients_are_numerically_right() -> None:
    holder = build()
    (q_down, q_up, _), (v_down, v_up, _) = (lora_factors(layer) for layer in (holder.layers[0], holder.layers[2]))
    inputs = (tokens().requires_grad_(), q_down, q_up, v_down, v_up)
    assert torch.autograd.gradcheck(lambda *_: lora_projections(inputs[0], holder.layers), inputs)


def test_single_precision_takes_the_same_values() -> None:
    holder = build(dtype=torch.float32)
    x = tokens(torch.float32).requires_grad_()
    out, expected = lora_projections(x, holder.layers), by_peft(x, holder.layers)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    theirs = gradients(holder, expected, x)
    for name, gradient in gradients(holder, out, x).items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-4, atol=1e-5)


def test_frozen_weights_get_no_gradient() -> None:
    holder = build()
    holder(tokens()).sum().backward()
    with_gradient = {name for name, p in holder.named_parameters() if p.grad is not None}
    assert with_gradient == {
        f"attn.{layer}.lora_{factor}.default.weight" for layer in ("q_proj", "v_proj") for factor in "AB"
    }


def test_no_projection_without_lora_needs_a_gradient() -> None:
    """A frozen block between trained ones passes the input's gradient on."""
    holder = Holder().double().requires_grad_(False).train()
    x = tokens().requires_grad_()
    with counted() as counter:
        out = holder(x)
    assert counter.call_count == 1
    grad = torch.autograd.grad(out.square().sum(), x)[0]
    expected = torch.autograd.grad(holder.eval()(x).square().sum(), x)[0]
    torch.testing.assert_close(grad, expected, **EXACT)


def test_attention_takes_it_in_both_modes() -> None:
    holder = build()
    x = tokens()
    with counted() as counter:
        fused = holder.train()(x)
        assert counter.call_count == 1
        torch.testing.assert_close(holder.eval()(x), fused, **EXACT)
        assert counter.call_count == 2


def test_autocast_in_bf16() -> None:
    holder = build(dtype=torch.float32)
    x = tokens(torch.float32).requires_grad_()
    exact = gradients(holder, by_peft(x, holder.layers), x)
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = lora_projections(x, holder.layers), by_peft(x, holder.layers)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected.float(), rtol=0.03, atol=0.03)
    for name, gradient in gradients(holder, out.float(), x).items():
        assert gradient.dtype == torch.float32  # as the parameter is
        torch.testing.assert_close(gradient, exact[name], rtol=0.05, atol=0.05)


def test_autocast_of_bf16_activations() -> None:
    holder = build(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = lora_projections(tokens(torch.bfloat16).requires_grad_(), holder.layers)
    out.float().sum().backward()
    assert holder.attn.q_proj.lora_B["default"].weight.grad.dtype == torch.float32


def test_bf16_weights_with_factors_in_fp32() -> None:
    """peft keeps the factors in fp32 beside weights in bf16."""
    torch.manual_seed(0)
    model: Any = peft.get_peft_model(Holder().bfloat16(), peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj"]))
    randomize(model)
    assert model.base_model.model.attn.q_proj.lora_A["default"].weight.dtype == torch.float32
    x = tokens(torch.bfloat16)
    out = model.train()(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), model.eval()(x).float(), rtol=0.05, atol=0.05)
    model.train()(x).float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for name, p in model.named_parameters() if p.requires_grad)


def test_on_the_meta_device() -> None:
    with torch.device("meta"):
        holder = Holder().requires_grad_(False).train()
        peft.inject_adapter_in_model(peft.LoraConfig(r=3, target_modules=["q_proj"]), holder)
        assert holder(torch.empty(2, 3, WIDTH)).shape == (2, 3, WIDTH)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_second_derivatives_are_refused_not_wrong() -> None:
    holder = build()
    x = tokens().requires_grad_()
    (grad,) = torch.autograd.grad(lora_projections(x, holder.layers).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# What is not plain LoRA is left to peft: it would be dropped or wrong otherwise.


def adalora() -> Holder:
    return build(config=peft.AdaLoraConfig, r=8, init_r=3, target_r=2, total_step=10)


def two_adapters() -> Holder:
    holder = build()
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["q_proj"]), holder, "second")
    for layer in holder.layers:
        if hasattr(layer, "set_adapter"):
            layer.set_adapter([name for name in ("default", "second") if name in layer.lora_A])
    return randomize(holder)


def merged() -> Holder:
    holder = build()
    holder.attn.q_proj.merge()
    return holder


def disabled() -> Holder:
    holder = build()
    holder.attn.q_proj.enable_adapters(False)
    return holder


def trainable_bias() -> Holder:
    holder = build()
    holder.attn.q_proj.base_layer.bias.requires_grad_(True)
    return holder


def trainable_key() -> Holder:
    holder = build()
    holder.attn.k_proj.requires_grad_(True)
    return holder


OTHERS = {
    "AdaLoRA": adalora,
    "DoRA": lambda: build(use_dora=True),
    "LoRA bias": lambda: build(lora_bias=True),
    "several adapters": two_adapters,
    "merged": merged,
    "disabled": disabled,
    "trainable bias": trainable_bias,
    "trainable key projection": trainable_key,
}


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
@pytest.mark.parametrize("name", OTHERS)
def test_other_layers_compute_as_in_evaluation(name: str) -> None:
    holder = OTHERS[name]()
    assert not all(is_fusible(layer) for layer in holder.layers)
    x = tokens().requires_grad_()
    with counted() as counter:
        trained = holder.train()(x)
    assert counter.call_count == 0
    expected = holder.eval()(x)
    torch.testing.assert_close(trained, expected, **EXACT)
    used = [x, *(p for p in holder.parameters() if p.requires_grad)]
    ours, theirs = (torch.autograd.grad(out.square().sum(), used, allow_unused=True) for out in (trained, expected))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, **EXACT)
    assert any(gradient is not None for gradient in ours[1:]) or name == "merged"


def test_dropout_is_peft_s_to_draw() -> None:
    holder = build(lora_dropout=0.5)
    assert not is_fusible(holder.layers[0])
    x = tokens()
    torch.manual_seed(0)
    first = holder(x)
    assert not first.equal(holder(x))
    torch.manual_seed(0)
    assert first.equal(holder(x))


@pytest.mark.parametrize("settings", [{"use_rslora": True}, {"init_lora_weights": "gaussian"}, {"lora_alpha": 1}])
def test_other_scales_and_starts_are_still_plain_lora(settings: dict[str, Any]) -> None:
    holder = build(**settings)
    assert all(is_fusible(layer) for layer in holder.layers)
    x = tokens()
    torch.testing.assert_close(lora_projections(x, holder.layers), by_peft(x, holder.layers), **EXACT)


def test_factors_and_base() -> None:
    holder = build(lora_alpha=6)
    factors = lora_factors(holder.layers[0])
    assert factors is not None
    assert (factors[0].shape, factors[1].shape, factors[2]) == ((3, WIDTH), (WIDTH, 3), 2.0)
    assert lora_factors(holder.layers[1]) is None
    assert base_layer(holder.layers[1]) is holder.layers[1]
    assert base_layer(holder.layers[0]) is holder.attn.q_proj.base_layer
