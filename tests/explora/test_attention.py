"""Split attention is stock attention."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from timm.layers import Attention
from torch import Tensor, nn

from geoexplora.explora import SplitAttention

from .conftest import SIZES, images_for, plain_encoder, randomize

EXACT = {"rtol": 1e-12, "atol": 1e-12}
VARIANTS: dict[str, dict[str, Any]] = {
    "biases": {"qkv_bias": True},
    "no biases": {"qkv_bias": False, "proj_bias": False},
    "norms of queries and keys": {"qk_norm": True, "qkv_bias": True, "norm_layer": nn.LayerNorm},
    "scale norm": {"scale_norm": True, "norm_layer": nn.LayerNorm},
    "narrow heads": {"attn_head_dim": 3, "qkv_bias": True},
    "another output width": {"dim_out": 6},
}


@pytest.fixture(params=VARIANTS)
def stock(request: pytest.FixtureRequest) -> Attention:
    torch.manual_seed(0)
    return randomize(Attention(12, num_heads=2, **VARIANTS[request.param]).double())


def tokens() -> Tensor:
    return torch.randn(2, 5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_split_equals_stock(stock: Attention, training: bool, frozen: bool) -> None:
    """Frozen in training mode takes the fused product, else the three layers."""
    stock.train(training).requires_grad_(not frozen)
    split = SplitAttention.from_fused(stock)
    assert split.training == training
    x, other = tokens().requires_grad_(), tokens().requires_grad_()
    expected, out = stock(x), split(other)
    torch.testing.assert_close(out, expected, **EXACT)
    expected.square().sum().backward()
    out.square().sum().backward()
    torch.testing.assert_close(other.grad, x.grad, **EXACT)


def test_split_then_fused_is_stock_to_the_bit(stock: Attention) -> None:
    expected = {name: value.clone() for name, value in stock.state_dict().items()}
    out = stock(tokens())
    fused = SplitAttention.from_fused(stock).to_fused()
    assert type(fused) is Attention
    assert fused.state_dict().keys() == expected.keys()
    assert all(value.equal(expected[name]) for name, value in fused.state_dict().items())
    assert fused(tokens()).equal(out)
    assert fused.extra_repr() == stock.extra_repr()
    assert (fused.qkv.in_features, fused.qkv.out_features) == (stock.qkv.in_features, stock.qkv.out_features)


def test_queries_keys_and_values_are_not_swapped() -> None:
    stock = randomize(Attention(4, num_heads=2, qkv_bias=True))
    split = SplitAttention.from_fused(stock)
    for number, name in enumerate(("q_proj", "k_proj", "v_proj")):
        layer = split.get_submodule(name)
        assert layer.weight.equal(stock.qkv.weight[4 * number : 4 * number + 4])
        assert layer.bias.equal(stock.qkv.bias[4 * number : 4 * number + 4])
    split.q_proj, split.v_proj = split.v_proj, split.q_proj
    x = torch.randn(1, 3, 4)
    assert not torch.allclose(split(x), stock(x))


def test_masks(stock: Attention) -> None:
    split = SplitAttention.from_fused(stock)
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    torch.testing.assert_close(split(tokens(), attn_mask=mask), stock(tokens(), attn_mask=mask), **EXACT)
    torch.testing.assert_close(split(tokens(), is_causal=True), stock(tokens(), is_causal=True), **EXACT)
    assert not torch.allclose(split(tokens(), is_causal=True), split(tokens()))


def test_the_split_is_a_copy_and_keeps_what_is_trained() -> None:
    stock = Attention(4, num_heads=2, qkv_bias=True)
    stock.qkv.requires_grad_(False)
    split = SplitAttention.from_fused(stock)
    assert not any(split.get_submodule(name).weight.requires_grad for name in ("q_proj", "k_proj", "v_proj"))
    assert split.proj is stock.proj
    with torch.no_grad():
        split.q_proj.weight.zero_()
    assert stock.qkv.weight.abs().min() > 0


def test_gates_are_refused() -> None:
    with pytest.raises(ValueError, match="gated attention cannot be split"):
        SplitAttention.from_fused(Attention(4, num_heads=2, gated=True))
    with pytest.raises(ValueError, match="gated attention cannot be split"):
        SplitAttention(4, num_heads=2, gated=True)


def test_dropout_in_training_only() -> None:
    split = SplitAttention(8, num_heads=2, attn_drop=0.9)
    x = torch.randn(1, 6, 8)
    assert not split.train()(x).equal(split(x))
    assert split.eval()(x).equal(split(x))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "group_channel_vit_base"])
def test_as_timm_s_attn_layer(name: str) -> None:
    sizes = SIZES | ({"groups": ((0, 1), (2,)), "channel_width": 8} if name.startswith("group") else {})
    model = timm.create_model(name, **sizes, attn_layer=SplitAttention)
    assert all(type(block.attn) is SplitAttention for block in model.blocks)
    assert "blocks.0.attn.k_proj.bias" in model.state_dict()
    assert not [key for key in model.state_dict() if "qkv" in key]
    stock = timm.create_model(name, **sizes)
    for block, split in zip(stock.blocks, model.blocks, strict=True):
        block.attn = split.attn.to_fused()
    state = stock.state_dict()
    stock.load_state_dict({k: model.state_dict().get(k, v) for k, v in state.items()})
    images = images_for(model)
    torch.testing.assert_close(model.eval()(images), stock.eval()(images))


def test_a_layerscale_of_one_shows_a_swap() -> None:
    """With DINOv2's initial gammas of 1e-5 an equality test would pass whatever attention computes."""
    encoder = plain_encoder().eval()
    images = images_for(encoder)
    expected = encoder(images)
    encoder.blocks[0].attn = SplitAttention.from_fused(encoder.blocks[0].attn)
    torch.testing.assert_close(encoder(images), expected)
    attention = encoder.blocks[0].attn
    attention.q_proj, attention.v_proj = attention.v_proj, attention.q_proj
    assert not torch.allclose(encoder(images), expected, rtol=1e-2, atol=1e-2)


def test_on_the_meta_device() -> None:
    with torch.device("meta"):
        stock = Attention(8, num_heads=2, qkv_bias=True).requires_grad_(False)
        split = SplitAttention.from_fused(stock)
        assert split.train()(torch.empty(2, 3, 8)).shape == (2, 3, 8)
        assert split.eval()(torch.empty(2, 3, 8)).shape == (2, 3, 8)
