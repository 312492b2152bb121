"""Scaled dot-product attention by the fastest kernel for the device and precision.

Shapes: B batch, h heads, N tokens, d head width, D = h d.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import Attention
from torch import Tensor, nn
from torch.nn import functional as F


def attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """``scaled_dot_product_attention``; in fp32 where a CPU computes in bf16.

    torch's fused bf16 kernel for CPUs has a backward that takes up to three times as long as the fp32 one
    (``benchmarks/training_step.py``).

    Args:
        q: (B, h, N, d).
        k: (B, h, N, d).
        v: (B, h, N, d).
        options: as for ``scaled_dot_product_attention``.

    Returns:
        (B, h, N, d), of the type of ``q``.
    """
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, **options)
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), **options).to(q.dtype)


class FastAttention(Attention):
    """timm's ``Attention`` over ``attend``."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Attend.

        Args:
            x: (B, N, D).
            attn_mask: as in ``scaled_dot_product_attention``.
            is_causal: as in ``scaled_dot_product_attention``.

        Returns:
            (B, N, D).
        """
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
        dropout = self.attn_drop.p if self.training else 0.0
        x = attend(self.q_norm(q), self.k_norm(k), v, attn_mask=attn_mask, dropout_p=dropout, is_causal=is_causal)
        return self.proj_drop(self.proj(self.norm(x.transpose(1, 2).flatten(2))))


def use_fast_attention(model: nn.Module) -> nn.Module:
    """Let timm's plain ``Attention`` modules attend by ``attend``, in place; parameters stay the same objects."""
    for module in model.modules():
        children: list[tuple[str, Any]] = list(module.named_children())
        for name, child in children:
            if type(child) is Attention and getattr(child, "gate", None) is None:  # older timm knows no gate
                fast = FastAttention.__new__(FastAttention)
                fast.__dict__.update(child.__dict__)
                setattr(module, name, fast)
    return model
