"""Names and shapes of other code's vision transformers, turned into timm's.

Shapes: D width, L positions, R registers, M hidden width of the MLP.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from geoexplora.errors import WeightsError
from geoexplora.models.embeddings import sincos_1d

TIME_PARTS = 3
"""Year, month and hour, each encoded 128 wide (SatMAE's temporal models)."""
TIME_WIDTH = 128

_RENAMES = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),  # DINOv2's chunks of blocks
        (r"^register_tokens$", "reg_token"),
        (r"\.mlp\.w12\.", ".mlp.fc1."),
        (r"\.mlp\.w3\.", ".mlp.fc2."),
        (r"\.attn\.([qkv])\.", r".attn.\1_proj."),
    )
)
_HUB_RENAMES = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"^embeddings\.position_embeddings$", "pos_embed"),
        (r"^embeddings\.register_tokens$", "reg_token"),
        (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
        (r"^embeddings\.(cls_token|mask_token)$", r"\1"),
        (r"^layernorm\.", "norm."),
        (r"^encoder\.layer\.(\d+)\.", r"blocks.\1."),
        (r"\.attention\.attention\.(q)uery\.|\.attention\.q_proj\.", ".attn.q_proj."),
        (r"\.attention\.attention\.key\.|\.attention\.k_proj\.", ".attn.k_proj."),
        (r"\.attention\.attention\.value\.|\.attention\.v_proj\.", ".attn.v_proj."),
        (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
        (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
        (r"\.mlp\.weights_in\.", ".mlp.fc1."),
        (r"\.mlp\.(weights_out|down_proj)\.", ".mlp.fc2."),
    )
)
_PART = re.compile(r"(.*\.)(q_proj|gate_proj)\.(weight|bias)$")
_FUSED = {"q_proj": (("q_proj", "k_proj", "v_proj"), "qkv"), "gate_proj": (("gate_proj", "up_proj"), "fc1")}


@dataclass
class Canonical:
    """Tensors under timm's names, and what was done to get there.

    Attributes:
        tensors: tensors by name.
        converted: names of those that were made of others or changed, with how.
        stale: names of fused projections that were left for the separate ones beside them, which differ.
    """

    tensors: dict[str, Tensor]
    converted: dict[str, str] = field(default_factory=dict)
    stale: list[str] = field(default_factory=list)


def to_canonical(tensors: Mapping[str, Tensor], *, hub_names: bool, label: str) -> Canonical:
    """Rename to timm's names and put separate projections together.

    Args:
        tensors: tensors of DINOv2 (Meta's, timm's or Hugging Face's names), of MAE, SatMAE or ExPLoRA.
        hub_names: whether the names are those of Hugging Face's transformers.
        label: the file's name, for messages.

    Returns:
        Canonical tensors: ``blocks.N.attn.qkv`` fused, ``mlp.fc1/fc2``, ``reg_token``; with registers the position
        encoding has no row for the class token, as in timm.

    Raises:
        WeightsError: if two tensors mean the same, or a part of a projection is missing.
    """
    named: dict[str, Tensor] = {}
    for name, value in tensors.items():
        new = _rename(name, _HUB_RENAMES if hub_names else _RENAMES)
        if new in named:
            raise WeightsError(f"{label}: {name} stands for {new}, which is there already", "Take another copy.")
        named[new] = value
    done = Canonical(named)
    _fuse(done, label)
    _fold_class_position(done)
    return done


def _rename(name: str, rules: tuple[tuple[re.Pattern[str], str], ...]) -> str:
    for pattern, new in rules:
        name = pattern.sub(new, name)
    return name


def _fuse(done: Canonical, label: str) -> None:
    """Put q, k, v and gate, up together; separate projections count before a fused one beside them.

    ExPLoRA's full files keep both: the separate ones are those that LoRA was merged into.
    """
    tensors = done.tensors
    for name in [name for name in tensors if _PART.match(name)]:
        stem, first, kind = _PART.match(name).groups()  # type: ignore[union-attr]
        parts, fused = _FUSED[first]
        names = [f"{stem}{part}.{kind}" for part in parts]
        if missing := [part for part in names if part not in tensors]:
            raise WeightsError(f"{label} has {name}, but lacks {', '.join(missing)}", "Take another copy of the file.")
        new = f"{stem}{fused}.{kind}"
        whole = torch.cat([tensors.pop(part) for part in names])
        beside = tensors.get(new)
        if beside is not None and beside.shape == whole.shape and torch.equal(beside, whole):
            continue
        if beside is not None:
            done.stale.append(new)
        tensors[new] = whole
        done.converted[new] = f"{', '.join(parts)} put together"


def _fold_class_position(done: Canonical) -> None:
    """With registers timm adds no position to the class token: Meta's row for it goes into the token itself."""
    registers, position = done.tensors.get("reg_token"), done.tensors.get("pos_embed")
    if registers is None or position is None or position.ndim != 3 or "patch_embed.proj.weight" not in done.tensors:
        return
    side = round((position.shape[1] - 1) ** 0.5)
    if side * side != position.shape[1] - 1 or position.shape[1] == 1:
        return  # timm's own files have no such row
    done.tensors["cls_token"] = done.tensors["cls_token"] + position[:, :1]
    done.tensors["pos_embed"] = position[:, 1:]
    done.converted["cls_token"] = "its row of the position encoding added"
    done.converted["pos_embed"] = "without the class token's row"


def widen_temporal_positions(done: Canonical) -> None:
    """Make a plain position encoding of SatMAE's temporal one: that of one image at the origin of time.

    A token of the temporal model carries its position (D - 384 wide) beside sines and cosines of year (from 2002),
    month and hour. With all three 0 the model is a plain ViT; the class token carries neither.
    """
    position = done.tensors["pos_embed"]
    time = sincos_1d(TIME_WIDTH, torch.zeros(1)).to(position.dtype).repeat(1, TIME_PARTS)
    rows = time.expand(position.shape[1], -1).clone()
    rows[0] = 0
    done.tensors["pos_embed"] = torch.cat([position, rows.unsqueeze(0)], dim=-1)
    done.converted["pos_embed"] = "with the encoding of one image at year 2002, month 0, hour 0"
