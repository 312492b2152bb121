"""Formats of weights files other than our own: how each is recognised from its keys."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from geoexplora.bands import FMOW_RGB_STATISTICS, IMAGENET_STATISTICS, Statistics
from geoexplora.errors import WeightsError
from geoexplora.weights.canonical import TIME_PARTS, TIME_WIDTH
from geoexplora.weights.describe import KERNEL
from geoexplora.weights.layout import Found
from geoexplora.weights.opening import Opened


@dataclass(frozen=True)
class Format:
    """A format other than our own.

    Attributes:
        name: its name in reports.
        description: what it is, for messages.
        recognises: whether a model found in a file is of this format.
        keys: names that tell it, for messages about files that are nearly of it.
        statistics: of the normalization of its RGB models.
    """

    name: str
    description: str
    recognises: Callable[[Found], bool]
    keys: tuple[str, ...]
    statistics: Statistics = IMAGENET_STATISTICS


def is_temporal(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a model is SatMAE's of several dates: a part of the width of its tokens encodes the time."""
    position, token = tensors.get("pos_embed"), tensors.get("cls_token")
    if position is None or token is None or KERNEL not in tensors:
        return False
    return token.shape[-1] - position.shape[-1] == TIME_PARTS * TIME_WIDTH


def _separate(found: Found) -> bool:
    return "blocks.0.attn.q_proj.weight" in found.tensors


_PLAIN = ("cls_token", "pos_embed", KERNEL, "blocks.0.attn.qkv.weight", "norm.weight")

FORMATS: tuple[Format, ...] = (
    Format(
        "huggingface-dinov2",
        "Hugging Face's Dinov2Model and Dinov2WithRegistersModel",
        lambda found: found.hub_names,
        ("embeddings.cls_token", "embeddings.position_embeddings", "encoder.layer.0.norm1.weight", "layernorm.weight"),
    ),
    Format(
        "torchgeo",
        "checkpoints of TorchGeo's and Lightning's tasks",
        lambda found: "hyper_parameters" in found.content and found.prefix.startswith("state_dict."),
        ("hyper_parameters", "state_dict", *_PLAIN),
    ),
    Format(
        "explora",
        "the ExPLoRA authors' files, and teachers of DINO's training",
        lambda found: _separate(found) or found.prefix.startswith("teacher."),
        ("cls_token", "pos_embed", "blocks.0.attn.q_proj.weight", "blocks.0.attn.k_proj.weight", "norm.weight"),
    ),
    Format(
        "satmae",
        "SatMAE's group-channel models",
        lambda found: "patch_embed.0.proj.weight" in found.tensors,
        ("cls_token", "pos_embed", "patch_embed.0.proj.weight", "channel_embed", "norm.weight"),
    ),
    Format(
        "satmae-temporal",
        "SatMAE's temporal models",
        lambda found: is_temporal(found.tensors),
        _PLAIN,
        FMOW_RGB_STATISTICS,
    ),
    Format(
        "satmae-rgb",
        "SatMAE's fMoW-RGB models",
        lambda found: hasattr(found.content.get("args"), "dataset_type"),
        _PLAIN,
        FMOW_RGB_STATISTICS,
    ),
    Format(
        "meta-dinov2",
        "Meta's dinov2_vit*14_pretrain.pth",
        lambda found: (
            "blocks.0.ls1.gamma" in found.tensors
            and ("mask_token" in found.tensors or "register_tokens" in found.tensors)
        ),
        ("cls_token", "mask_token", "blocks.0.ls1.gamma", "blocks.0.attn.qkv.weight", "norm.weight"),
    ),
    Format(
        "meta-mae",
        "Meta's mae_pretrain_vit_*.pth and mae_visualize_vit_*.pth",
        lambda found: found.prefix == "model." or "decoder_embed.weight" in found.tensors,
        _PLAIN,
    ),
    Format("timm", "vision transformers under timm's names", lambda found: True, _PLAIN),
)
"""Known formats; the first that recognises a model reads it."""


def recognise(found: Found) -> Format:
    """The format of a model found in a file."""
    return next(known for known in FORMATS if known.recognises(found))


def unknown(opened: Opened) -> WeightsError:
    """The error for a file in which no vision transformer was found: names the nearest format and what it lacks."""
    kind = opened.config.get("model_type")
    inner = next((value for value in opened.content.values() if isinstance(value, Mapping) and value), {})
    names = [str(name) for name in (*opened.content, *inner)]

    def likeness(known: Format) -> float:
        near = (bool(difflib.get_close_matches(key, names[:300], n=1, cutoff=0.9)) for key in known.keys)
        return sum(near) / len(known.keys)

    nearest = max(FORMATS, key=likeness)
    lacking = [key for key in nearest.keys if key not in names]
    reason = f"it is a {kind} of Hugging Face" if kind else "it has no class token (cls_token), as all models here have"
    return WeightsError(
        f"{opened.path} is of no known format: {reason}; its first keys are: {', '.join(names[:5]) or 'none'}."
        f" Nearest are {nearest.description}, but it lacks {', '.join(lacking[:5])}",
        f"Known: encoder.safetensors of this package; {'; '.join(known.description for known in FORMATS)};"
        " or a run folder.",
    )
