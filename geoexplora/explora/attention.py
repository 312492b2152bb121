"""Self-attention with separate query, key and value projections, so that LoRA can reach Q and V but not K.

Shapes: B batch, N tokens, D width, h heads.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import Attention
from torch import Tensor, nn

from geoexplora.explora.lora import is_fusible, lora_projections
from geoexplora.models.attention import attend

PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def _refuse_gate(attention: Attention) -> None:
    if getattr(attention, "gate", None) is not None:  # older timm knows no gate
        raise ValueError("gated attention cannot be split")


class SplitAttention(Attention):
    """timm's ``Attention`` with ``qkv`` split in three; usable as timm's ``attn_layer``.

    Args:
        args: as for timm's ``Attention``.
        kwargs: as for timm's ``Attention``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _refuse_gate(self)
        self._take(self.qkv)
        del self.qkv

    def _take(self, qkv: Any) -> None:
        """Cut a fused projection (3 D, D) in three."""
        biases = [None] * 3 if qkv.bias is None else list(qkv.bias.detach().chunk(3))
        for name, weight, bias in zip(PROJECTIONS, qkv.weight.detach().chunk(3), biases, strict=True):
            layer = nn.Linear(1, 1, bias=bias is not None, device="meta")
            layer.in_features, layer.out_features = weight.shape[1], weight.shape[0]
            layer.weight = nn.Parameter(weight.clone(), requires_grad=qkv.weight.requires_grad)
            if bias is not None:
                layer.bias = nn.Parameter(bias.clone(), requires_grad=qkv.weight.requires_grad)
            setattr(self, name, layer)

    @classmethod
    def from_fused(cls, attention: Attention) -> SplitAttention:
        """The same attention with its fused projection cut in three; other submodules are shared.

        Raises:
            ValueError: if the attention is gated.
        """
        _refuse_gate(attention)
        split = cls.__new__(cls)
        nn.Module.__init__(split)
        split.__dict__.update({k: v for k, v in attention.__dict__.items() if not k.startswith("_")})
        split.training = attention.training
        for name, module in attention.named_children():
            if name != "qkv":
                setattr(split, name, module)
        split.gate = None
        split._take(attention.qkv)
        return split

    def to_fused(self) -> Attention:
        """Timm's ``Attention`` with the projections put together again.

        Raises:
            ValueError: if a projection still carries LoRA.
        """
        parts = [getattr(self, name) for name in PROJECTIONS]
        if not all(isinstance(part, nn.Linear) for part in parts):
            raise ValueError("merge LoRA before fusing the projections")
        fused = Attention.__new__(Attention)
        nn.Module.__init__(fused)
        fused.__dict__.update({k: v for k, v in self.__dict__.items() if not k.startswith("_")})
        fused.training = self.training
        qkv = nn.Linear(1, 1, bias=parts[0].bias is not None, device="meta")
        qkv.in_features, qkv.out_features = parts[0].in_features, sum(part.out_features for part in parts)
        qkv.weight = nn.Parameter(torch.cat([part.weight.detach() for part in parts]))
        if parts[0].bias is not None:
            qkv.bias = nn.Parameter(torch.cat([part.bias.detach() for part in parts]))
        fused.qkv = qkv
        fused.gate = None
        for name, module in self.named_children():
            if name not in PROJECTIONS:
                setattr(fused, name, module)
        return fused

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Attend.

        Args:
            x: (B, N, D).
            attn_mask: as in ``scaled_dot_product_attention``.
            is_causal: as in ``scaled_dot_product_attention``.

        Returns:
            (B, N, D).
        """
        layers = tuple(getattr(self, name) for name in PROJECTIONS)
        if all(is_fusible(layer) for layer in layers):
            projected = lora_projections(x, layers).chunk(3, dim=-1)
        else:
            # As rows: AdaLoRA adds to its linear layer's output in place, and oneDNN's of (B, N, D) would be a view.
            rows = x.flatten(0, -2)
            projected = tuple(layer(rows).unflatten(0, x.shape[:-1]) for layer in layers)
        q, k, v = (y.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for y in projected)
        x = attend(
            self.q_norm(q),
            self.k_norm(k),
            v,
            attn_mask=attn_mask,
            dropout_p=self.attn_drop.p if self.training else 0.0,
            is_causal=is_causal,
        )
        return self.proj_drop(self.proj(self.norm(x.transpose(1, 2).flatten(2))))
