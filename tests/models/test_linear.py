"""The oneDNN path equals ``torch.nn.functional.linear``, values and gradients."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import peft
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from geoexplora.models import linear as fast
from geoexplora.models.linear import FastLinear, linear, matmul, takes_onednn, use_fast_linears

SHAPES = [(6,), (1, 6), (5, 6), (1, 1, 6), (2, 3, 6), (2, 3, 4, 6), (0, 6), (2, 0, 6), (0, 3, 6)]
onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")


def parameters(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(7, 6, dtype=dtype), torch.randn(7, dtype=dtype)


@contextmanager
def counted() -> Iterator[mock.Mock]:
    """Counts the products that go through oneDNN."""
    with mock.patch.object(fast, "takes_onednn", side_effect=takes_onednn) as counter:
        counter.taken = lambda: sum(takes_onednn(*call.args) for call in counter.call_args_list)
        yield counter


@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=3)))
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape: tuple[int, ...], needs: tuple[bool, bool, bool]) -> None:
    weight, bias = parameters()
    inputs = [torch.randn(shape), weight, bias]
    ours = [tensor.clone().requires_grad_(need) for tensor, need in zip(inputs, needs, strict=True)]
    theirs = [tensor.clone().requires_grad_(need) for tensor, need in zip(inputs, needs, strict=True)]
    out, expected = linear(*ours), F.linear(*theirs)
    assert out.requires_grad == any(needs)
    torch.testing.assert_close(out, expected)
    if not any(needs):
        return
    grad = torch.randn_like(expected)
    out.backward(grad)
    expected.backward(grad)
    for mine, other, need in zip(ours, theirs, needs, strict=True):
        assert (mine.grad is not None) == need
        if need:
            torch.testing.assert_close(mine.grad, other.grad)


@pytest.mark.parametrize("shape", [(6,), (2, 3, 6)])
def test_without_a_bias(shape: tuple[int, ...]) -> None:
    weight = parameters()[0].requires_grad_()
    x = torch.randn(shape, requires_grad=True)
    out, expected = linear(x, weight, None), F.linear(x, weight)
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    for mine, other in zip(
        torch.autograd.grad(out, (x, weight), grad), torch.autograd.grad(expected, (x, weight), grad), strict=True
    ):
        torch.testing.assert_close(mine, other)


def test_strided_inputs_and_gradients() -> None:
    weight, bias = parameters()
    x = torch.randn(6, 4, 3).transpose(0, 2).requires_grad_()
    outs = [function(x, weight.T.contiguous().T, bias).transpose(0, 1)[:, ::2] for function in (linear, F.linear)]
    torch.testing.assert_close(*outs)
    grad = torch.randn_like(outs[0])
    torch.testing.assert_close(*(torch.autograd.grad(out, x, grad)[0] for out in outs))
    expanded = [torch.autograd.grad(function(x, weight, bias).sum(), x)[0] for function in (linear, F.linear)]
    torch.testing.assert_close(*expanded)


@onednn
def test_fp32_takes_onednn_forward_and_backward() -> None:
    weight, bias = parameters()
    x = torch.randn(2, 3, 6, requires_grad=True)
    assert takes_onednn(x, weight)
    with counted() as counter:
        linear(x, weight.requires_grad_(), bias).sum().backward()
    assert counter.taken() == 4  # the choice, the product, the input's and the weight's gradient


@onednn
def test_frozen_weights_keep_no_input() -> None:
    """What is saved for the backward pass of a frozen layer is its weight alone."""
    weight, bias = parameters()
    saved: list[Tensor] = []
    x = torch.randn(5, 6, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        linear(x, weight, bias)
    assert [tensor.shape for tensor in saved] == [weight.shape]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_go_to_torch(dtype: torch.dtype) -> None:
    weight, bias = parameters(dtype)
    x = torch.randn(2, 6, dtype=dtype)
    assert not takes_onednn(x, weight)
    assert linear(x, weight, bias).equal(F.linear(x, weight, bias))
    assert matmul(x, weight).equal(F.linear(x, weight))


@pytest.mark.filterwarnings("ignore:TF32")
def test_meta_tensors_and_a_disabled_onednn() -> None:
    weight, bias = parameters()
    x = torch.randn(2, 6)
    assert linear(x.to("meta"), weight.to("meta"), bias.to("meta")).shape == (2, 7)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not takes_onednn(x, weight)
        assert linear(x, weight, bias).equal(F.linear(x, weight, bias))
    assert not takes_onednn(x[:0], weight)


def test_autocast_computes_in_bf16() -> None:
    weight, bias = (tensor.requires_grad_() for tensor in parameters())
    x = torch.randn(2, 3, 6, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = linear(x, weight, bias), F.linear(x, weight, bias)
    assert out.dtype == torch.bfloat16
    assert out.equal(expected)
    out.sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


@pytest.mark.parametrize("frozen", [True, False])
def test_autocast_of_frozen_layers(frozen: bool) -> None:
    """Frozen weights are cast once in training; values and gradients are torch's."""
    torch.manual_seed(0)
    stock = nn.Linear(6, 7).requires_grad_(not frozen)
    (layer,) = use_fast_linears(nn.Sequential(copy.deepcopy(stock)))
    x = torch.randn(2, 3, 6, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        outs = [stock(x), layer(x), layer(x)]
    for out in outs[1:]:
        assert out.equal(outs[0])
    grads = [torch.autograd.grad(out.float().square().sum(), x)[0] for out in outs]
    torch.testing.assert_close(grads[1], grads[0])
    assert layer.weight.dtype == torch.float32
    assert set(layer.state_dict()) == {"weight", "bias"}


def test_a_changed_frozen_weight_is_cast_again() -> None:
    (layer,) = use_fast_linears(nn.Sequential(nn.Linear(6, 7).requires_grad_(False)))
    x = torch.randn(2, 6)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x)
        layer.load_state_dict(nn.Linear(6, 7).state_dict())
        assert layer(x).equal(F.linear(x, layer.weight, layer.bias))
        clone = copy.deepcopy(layer)
        with torch.no_grad():
            clone.weight.add_(1)
        assert clone(x).equal(F.linear(x, clone.weight, clone.bias))
        assert layer(x).equal(F.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("training", [True, False])
def test_merging_lora_under_autocast_is_seen(training: bool) -> None:
    """Regression: peft merges through ``weight.data``, which leaves no trace on the weight."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8)).requires_grad_(False)
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False), model)
    use_fast_linears(model)
    x = torch.randn(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        model.train(training)(x)
        before = model.eval()(x)
        model[0].merge()
        after = model(x)
    torch.testing.assert_close(after.float(), before.float(), rtol=0.05, atol=0.1)


@onednn
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_second_derivatives_are_refused_not_wrong() -> None:
    weight, bias = parameters()
    x = torch.randn(2, 6, requires_grad=True)
    (grad,) = torch.autograd.grad(linear(x, weight, bias).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_the_layer_equals_torch_s() -> None:
    torch.manual_seed(0)
    stock = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6, bias=False))
    model = use_fast_linears(copy.deepcopy(stock))
    assert [type(layer) for layer in model] == [FastLinear, nn.GELU, FastLinear]
    assert model.state_dict().keys() == stock.state_dict().keys()
    assert repr(model[0]).startswith("FastLinear(in_features=6")
    x = torch.randn(4, 6)
    torch.testing.assert_close(model(x), stock(x))


def test_replacement_keeps_the_parameters_themselves() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=32, depth=1, num_heads=2, num_classes=3)
    model.blocks[0].attn.qkv.requires_grad_(False)
    before = dict(model.named_parameters())
    seen: list[int] = []
    model.head.register_forward_hook(lambda *_: seen.append(1))
    assert use_fast_linears(use_fast_linears(model)) is model
    assert not [name for name, module in model.named_modules() if type(module) is nn.Linear]
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)
    assert not model.blocks[0].attn.qkv.weight.requires_grad
    model(torch.randn(1, 3, 32, 32))
    assert seen == [1]  # hooks stay
    clone = copy.deepcopy(model)
    assert type(clone.head) is FastLinear
    assert clone.head.weight is not model.head.weight


def test_subclasses_of_linear_are_left_alone() -> None:
    layer = nn.Sequential(nn.modules.linear.NonDynamicallyQuantizableLinear(4, 4))
    assert type(use_fast_linears(layer)[0]) is nn.modules.linear.NonDynamicallyQuantizableLinear
