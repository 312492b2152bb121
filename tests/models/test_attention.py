"""Attention by the fastest kernel is timm's attention."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from timm.layers import Attention
from torch import nn
from torch.nn import functional as F

from geoexplora.models.attention import FastAttention, attend, use_fast_attention

VARIANTS: list[dict[str, Any]] = [
    {"qkv_bias": True},
    {"qkv_bias": False, "proj_bias": False},
    {"qk_norm": True, "scale_norm": True, "norm_layer": nn.LayerNorm},
    {"attn_head_dim": 3, "dim_out": 6},
]


def heads(dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, 5, 4, generator=generator).to(dtype).requires_grad_() for _ in range(3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_types_go_to_torch(dtype: torch.dtype) -> None:
    q, k, v = heads(dtype)
    assert attend(q, k, v, is_causal=True).equal(F.scaled_dot_product_attention(q, k, v, is_causal=True))


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_values_and_gradients(autocast: bool) -> None:
    q, k, v = heads(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = attend(q, k, v)
    expected = F.scaled_dot_product_attention(q.float(), k.float(), v.float())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=0.01, atol=0.01)
    grads, others = (torch.autograd.grad(y.float().square().sum(), (q, k, v)) for y in (out, expected))
    for grad, other in zip(grads, others, strict=True):
        assert grad.dtype == torch.bfloat16
        torch.testing.assert_close(grad, other, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("settings", VARIANTS)
def test_the_module_equals_timm_s(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    stock = nn.Sequential(Attention(12, num_heads=2, **settings).double())
    fast = use_fast_attention(copy.deepcopy(stock))
    assert type(fast[0]) is FastAttention
    assert fast.state_dict().keys() == stock.state_dict().keys()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    for options in ({}, {"is_causal": True}, {"attn_mask": mask}):
        torch.testing.assert_close(fast[0](x, **options), stock[0](x, **options), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(fast[0](x, is_causal=True), fast[0](x, attn_mask=mask), rtol=1e-12, atol=1e-12)


def test_parameters_stay_the_same_objects() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=32, depth=2, num_heads=2, num_classes=0)
    before = dict(model.named_parameters())
    assert use_fast_attention(use_fast_attention(model)) is model
    assert [type(block.attn) for block in model.blocks] == [FastAttention] * 2
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)


def test_gated_attention_is_left_alone() -> None:
    model = nn.Sequential(Attention(8, num_heads=2, gated=True))
    assert type(use_fast_attention(model)[0]) is Attention
