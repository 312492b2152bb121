"""Names and shapes of other code's vision transformers, turned into timm's.

Shapes: D width, L positions, R registers, M hidden width of the MLP.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isqrt

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
        (r"\.attention\.attention\.query\.|\.attention\.q_proj\.", ".attn.q_proj."),
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


def to_canonical(tensors: Mapping[str, Tensor], *, hub_names: bool, label: str, as_timm: bool = False) -> Canonical:
    """Rename to timm's names and put separate projections together.

    Args:
        tensors: tensors of DINOv2 (Meta's, timm's or Hugging Face's names), of MAE, SatMAE or ExPLoRA.
        hub_names: whether the names are those of Hugging Face's transformers.
        label: the file's name, for messages.
        as_timm: whether the position encoding is known to have timm's rows.

    Returns:
        Canonical tensors: ``blocks.N.attn.qkv`` fused, ``mlp.fc1/fc2``, ``reg_token``; with registers the position
        encoding has no row for the class token, as in timm.

    Raises:
        WeightsError: if two tensors mean the same, a part of a projection is missing, or the rows of the position
            encoding can be understood in two ways.
    """
    named: dict[str, Tensor] = {}
    for name, value in tensors.items():
        new = _rename(name, _HUB_RENAMES if hub_names else _RENAMES)
        if new in named:
            raise WeightsError(f"{label}: {name} stands for {new}, which is there already", "Take another copy.")
        named[new] = value
    done = Canonical(named)
    _fuse(done, label)
    if not as_timm and "patch_embed.proj.weight" in named:
        _settle_position_rows(done, label)
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
    for name, match in [(name, match) for name in tensors if (match := _PART.match(name))]:
        stem, first, kind = match.groups()
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


def _settle_position_rows(done: Canonical, label: str) -> None:
    """Give a plain ViT the rows that timm's model has: with registers those of the patches, else the class token's too.

    Rows of class and register tokens are added to the tokens themselves, which is what the model would do.
    """
    registers, position = done.tensors.get("reg_token"), done.tensors.get("pos_embed")
    if position is None or position.ndim != 3:
        return
    count, rows = 0 if registers is None else registers.shape[1], position.shape[1]
    fitting = [prefix for prefix in sorted({0, 1, 1 + count}) if rows - prefix >= 4 and _is_square(rows - prefix)]
    if len(fitting) > 1:
        raise WeightsError(
            f"{label}: {rows} rows of positions beside {count} register tokens can be understood in two ways",
            "Load it in the library that wrote it, and save it at another image size.",
        )
    if not fitting or fitting == [0 if count else 1]:
        return
    if not count:  # timm's deit3: a class token without position
        done.tensors["pos_embed"] = torch.cat([torch.zeros_like(position[:, :1]), position], dim=1)
        done.converted["pos_embed"] = "with a zero row for the class token, which has no position there"
        return
    prefix = fitting[0]
    # In single precision: the sum of two 16-bit numbers is not one
    done.tensors["cls_token"] = done.tensors["cls_token"].float() + position[:, :1].float()
    done.converted["cls_token"] = "its row of the position encoding added"
    if prefix > 1 and registers is not None:
        done.tensors["reg_token"] = registers.float() + position[:, 1:prefix].float()
        done.converted["reg_token"] = "their rows of the position encoding added"
    done.tensors["pos_embed"] = position[:, prefix:]
    done.converted["pos_embed"] = "without the rows of the class token" + " and the registers" * (prefix > 1)


def _is_square(number: int) -> bool:
    return isqrt(number) ** 2 == number


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
