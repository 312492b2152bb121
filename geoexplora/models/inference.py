"""Copies of encoders for frozen use, which compute the same features faster.

Weights are cast once instead of under autocast at every pass, LayerScale is folded into them, GELU is computed while
the product's output is at hand, and attention takes plain matrix products where a CPU's fused kernel is slower. The
residual stream and the norms stay in float32 (``benchmarks/feature_extraction.py`` measures speed and error).

Shapes: B batch, C bands, H W image, P patch, N tokens, D width, h heads, d = D / h, I input width, O output width.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from timm.layers import Attention, GluMlp, LayerScale, Mlp, SwiGLU
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from geoexplora.models.attention import FastAttention
from geoexplora.models.linear import FastLinear

_HAS_ONEDNN = torch.backends.mkldnn.is_available()

_SCORES = 1 << 20
"""How many scores are held at a time: twice, in bf16, they fit beside the rest in a CPU's cache."""


def inference_copy(encoder: Any, dtype: torch.dtype | None = None) -> Any:
    """A frozen copy of an encoder that computes its features faster.

    It has the encoder's methods and attributes, and takes and gives float32: call it without autocast. Features carry
    no graph. What is not a part of timm's usual blocks stays in float32, LoRA as well: merge it first. On a CPU,
    batches of 1,500 to 4,000 tokens are the fastest, as their activations stay in the cache.

    Args:
        encoder: a timm-style ViT, plain or group-channel; not changed.
        dtype: the type that products are computed in, such as ``torch.bfloat16``; float32 by default.

    Returns:
        The copy, in evaluation mode, on the encoder's device.
    """
    dtype = dtype or torch.float32
    copied = copy.deepcopy(encoder).eval().requires_grad_(False)
    _convert_children(copied.patch_embed, (nn.Conv2d,), _Convolution, dtype)
    for number, block in enumerate(copied.blocks):
        if type(block) is Block:
            _convert_attention(block, dtype)
            _convert_mlp(block, dtype)
            copied.blocks[number] = _become(block, _Block)
    return copied


def _convert_attention(block: Any, dtype: torch.dtype) -> None:
    attention = block.attn
    if (
        type(attention) in (Attention, FastAttention)
        and getattr(attention, "gate", None) is None  # older timm knows no gate
        and _are(nn.Identity, attention.q_norm, attention.k_norm, attention.norm)
        and _are(nn.Linear, attention.qkv, attention.proj)
    ):
        _fold(block, "ls1", attention.proj)
        _convert_children(attention, (nn.Linear, FastLinear), _Linear, dtype)
        block.attn = _become(attention, _Attention)


def _convert_mlp(block: Any, dtype: torch.dtype) -> None:
    mlp = block.mlp
    products = [child for name, child in mlp.named_children() if name.startswith("fc")]
    if type(mlp) in (Mlp, GluMlp, SwiGLU) and _are(nn.Linear, *products) and _are(nn.Identity, mlp.norm):
        _fold(block, "ls2", mlp.fc2)
        _convert_children(mlp, (nn.Linear, FastLinear), _Linear, dtype)
        if type(mlp) is Mlp and isinstance(mlp.act, nn.GELU) and mlp.act.approximate == "none":
            mlp.fc1.gelu, mlp.act = True, nn.Identity()


def _are(kind: type[nn.Module], *modules: nn.Module) -> bool:
    return all(isinstance(module, kind) for module in modules)


def _fold(block: Any, name: str, last: nn.Linear) -> None:
    """Let the last product of a branch scale it: that saves passes over the tokens."""
    scale = getattr(block, name)
    if type(scale) is LayerScale:
        last.weight.mul_(scale.gamma[:, None])
        if last.bias is not None:
            last.bias.mul_(scale.gamma)
        setattr(block, name, nn.Identity())


def _convert_children(model: nn.Module, old: tuple[type, ...], new: type[nn.Module], dtype: torch.dtype) -> None:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) in old:
                setattr(module, name, _become(child, new).to(dtype))


def _become(module: nn.Module, kind: type[nn.Module]) -> Any:
    """The module as one of a derived class, over the same parameters and children."""
    other = kind.__new__(kind)
    other.__dict__.update(module.__dict__)
    return other


class _Convolution(nn.Conv2d):
    """A convolution in the type of its weight."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, D, H/P, W/P)."""
        return super().forward(x.to(self.weight.dtype))


class _Linear(nn.Linear):
    """A linear layer in the type of its weight, followed by GELU where ``gelu`` says so."""

    gelu = False

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, N, I) to (B, N, O)."""
        x = x.to(self.weight.dtype)
        if _takes_onednn(x):
            activation = "gelu" if self.gelu else "none"
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, activation, [], "none")
        y = F.linear(x, self.weight, self.bias)
        return F.gelu(y) if self.gelu else y


class _Attention(Attention):
    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Attend: (B, N, D) to (B, N, D)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
        if q.dtype == torch.bfloat16 and attn_mask is None and not is_causal and _takes_onednn(q):
            y = _attend_by_products(q, k, v)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, is_causal=is_causal)
        return self.proj(y.transpose(1, 2).flatten(2))


def _attend_by_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k' / sqrt(d)) v by a few heads at a time; (B, h, N, d) each.

    torch's fused kernel for CPUs multiplies bf16 matrices at a third of the rate of a product.
    """
    b, h, n, d = q.shape
    q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    y, nothing = torch.empty_like(q), q.new_zeros(1, 1, 1)
    at_a_time = max(1, _SCORES // n**2)
    for first in range(0, b * h, at_a_time):
        heads = slice(first, first + at_a_time)
        scores = torch.baddbmm(nothing, q[heads], k[heads].transpose(1, 2), beta=0, alpha=d**-0.5)
        torch.bmm(scores.softmax(-1), v[heads], out=y[heads])
    return y.view(b, h, n, d)


class _Block(Block):
    """timm's ``Block`` in evaluation, its residual stream in float32."""

    @torch.no_grad()
    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Map (B, N, D) to (B, N, D)."""
        x = x + self.ls1(self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal))
        return x.add_(self.ls2(self.mlp(self.norm2(x))))


def _takes_onednn(x: Tensor) -> bool:
    """Whether oneDNN multiplies matrices like this one; it refuses empty ones."""
    if x.device.type != "cpu" or x.numel() == 0 or not _HAS_ONEDNN or not torch._C._get_mkldnn_enabled():
        return False
    native = x.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return (native or x.dtype == torch.float32) and not torch.compiler.is_compiling()
