"""Vision transformers written out from their papers on the files' own names, to hold the readers to."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

State = dict[str, Tensor]


def random_state(
    width: int = 128,
    depth: int = 2,
    patch: int = 14,
    grid: int = 3,
    channels: int = 3,
    *,
    layer_scale: bool = True,
    registers: int = 0,
    swiglu: bool = False,
    mask_token: bool = True,
    seed: int = 0,
) -> State:
    """A model in the layout of Meta's DINOv2 (with ``layer_scale`` off: of MAE), every weight random."""
    hidden = (width * 8 // 3 + 7) // 8 * 8 if swiglu else 4 * width
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 1 + grid * grid, width),
        "patch_embed.proj.weight": (width, channels, patch, patch),
        "patch_embed.proj.bias": (width,),
    }
    if mask_token:
        shapes["mask_token"] = (1, width)
    if registers:
        shapes["register_tokens"] = (1, registers, width)
    for block in range(depth):
        inner = {
            "norm1.weight": (width,), "norm1.bias": (width,), "attn.qkv.weight": (3 * width, width),
            "attn.qkv.bias": (3 * width,), "attn.proj.weight": (width, width), "attn.proj.bias": (width,),
            "norm2.weight": (width,), "norm2.bias": (width,),
        }  # fmt: skip
        if layer_scale:
            inner |= {"ls1.gamma": (width,), "ls2.gamma": (width,)}
        if swiglu:
            inner |= {"mlp.w12.weight": (2 * hidden, width), "mlp.w12.bias": (2 * hidden,)}
            inner |= {"mlp.w3.weight": (width, hidden), "mlp.w3.bias": (width,)}
        else:
            inner |= {"mlp.fc1.weight": (hidden, width), "mlp.fc1.bias": (hidden,)}
            inner |= {"mlp.fc2.weight": (width, hidden), "mlp.fc2.bias": (width,)}
        shapes |= {f"blocks.{block}.{name}": shape for name, shape in inner.items()}
    shapes |= {"norm.weight": (width,), "norm.bias": (width,)}
    generator = torch.Generator().manual_seed(seed)
    # LayerScale near 1: at its usual 1e-5 swapped projections would not show
    state = {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes.items()}
    for name, value in state.items():
        if value.ndim == 1 and name.endswith(("gamma", "weight")):
            value.add_(1.0)
    return state


def forward(state: State, images: Tensor, heads: int) -> Tensor:
    """Tokens after the final norm: (B, 1 + R + L, D), class token first, then registers."""
    width = state["cls_token"].shape[-1]
    x = F.conv2d(
        images,
        state["patch_embed.proj.weight"],
        state["patch_embed.proj.bias"],
        state["patch_embed.proj.weight"].shape[-1],
    )
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], dim=1) + state["pos_embed"]
    if "register_tokens" in state:
        x = torch.cat([x[:, :1], state["register_tokens"].expand(len(x), -1, -1), x[:, 1:]], dim=1)
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    for block in range(depth):
        part = {
            name.removeprefix(f"blocks.{block}."): value
            for name, value in state.items()
            if name.startswith(f"blocks.{block}.")
        }
        x = x + part.get("ls1.gamma", 1.0) * _attention(part, _norm(part, "norm1", x), heads)
        x = x + part.get("ls2.gamma", 1.0) * _mlp(part, _norm(part, "norm2", x))
    return F.layer_norm(x, (width,), state["norm.weight"], state["norm.bias"], 1e-6)


def _norm(part: State, name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], part[f"{name}.weight"], part[f"{name}.bias"], 1e-6)


def _linear(part: State, name: str, x: Tensor) -> Tensor:
    return x @ part[f"{name}.weight"].T + part[f"{name}.bias"]


def _attention(part: State, x: Tensor, heads: int) -> Tensor:
    qkv: Any = _linear(part, "attn.qkv", x).chunk(3, dim=-1)
    outputs = []
    for q, k, v in zip(*(projected.chunk(heads, dim=-1) for projected in qkv), strict=True):
        weights = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).softmax(-1)
        outputs.append(weights @ v)
    return _linear(part, "attn.proj", torch.cat(outputs, dim=-1))


def _mlp(part: State, x: Tensor) -> Tensor:
    if "mlp.w12.weight" in part:
        gate, value = _linear(part, "mlp.w12", x).chunk(2, dim=-1)
        return _linear(part, "mlp.w3", gate * torch.sigmoid(gate) * value)
    hidden = _linear(part, "mlp.fc1", x)
    return _linear(part, "mlp.fc2", 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2))))


_HUB_NAMES = {
    "blocks.": "encoder.layer.",
    "attn.proj": "attention.output.dense",
    "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1",
    "mlp.w12": "mlp.weights_in",
    "mlp.w3": "mlp.weights_out",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "pos_embed": "embeddings.position_embeddings",
    "register_tokens": "embeddings.register_tokens",
    "cls_token": "embeddings.cls_token",
    "mask_token": "embeddings.mask_token",
}


def to_huggingface(state: State) -> State:
    """The same model under the names of a Hugging Face Dinov2 file."""
    renamed: State = {}
    for name, value in state.items():
        if ".attn.qkv." in name:
            stem, kind = name.split(".attn.qkv.")
            for part, chunk in zip(("query", "key", "value"), value.chunk(3), strict=True):
                renamed[f"encoder.layer.{stem.split('.')[1]}.attention.attention.{part}.{kind}"] = chunk.clone()
            continue
        for old, new in _HUB_NAMES.items():
            name = name.replace(old, new)
        renamed["layernorm." + name.removeprefix("norm.") if name.startswith("norm.") else name] = value
    return renamed


def split_projections(state: State, names: tuple[str, str, str] = ("q_proj", "k_proj", "v_proj")) -> State:
    """The same model with separate query, key and value projections."""
    split: State = {}
    for name, value in state.items():
        if ".attn.qkv." not in name:
            split[name] = value
            continue
        for part, chunk in zip(names, value.chunk(3), strict=True):
            split[name.replace("qkv", part)] = chunk.clone()
    return split
