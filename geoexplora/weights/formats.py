"""Formats of weights files: how each is recognised from its keys, and what its encoder expects."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from geoexplora.bands import (
    FMOW_RGB_STATISTICS,
    FMOW_SENTINEL_BANDS,
    FMOW_SENTINEL_STATISTICS,
    IMAGENET_STATISTICS,
    RGB,
    SENTINEL2,
    Statistics,
)
from geoexplora.errors import WeightsError
from geoexplora.weights.canonical import to_canonical, widen_temporal_positions
from geoexplora.weights.describe import KERNEL, describe, shapes_of
from geoexplora.weights.layout import Found, find_model
from geoexplora.weights.opening import Opened
from geoexplora.weights.sources.shortcuts import Hints
from geoexplora.weights.spec import EncoderSpec
from geoexplora.weights.write import is_decoder

OWN = "geoexplora"


@dataclass(frozen=True)
class Read:
    """What was made of a file: see the attributes of the same names of ``SourceWeights``."""

    format: str
    spec: EncoderSpec | None
    tensors: Mapping[str, Tensor]
    decoder: Mapping[str, Any] | None = None
    step: int | None = None
    trained: Any = None
    place: str = ""
    converted: Mapping[str, str] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    assumed: tuple[str, ...] = ()
    undescribed: str = ""


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


def _separate(found: Found) -> bool:
    return "blocks.0.attn.q_proj.weight" in found.tensors


def _flat(found: Found) -> bool:
    return not found.prefix


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
        ("hyper_parameters", "state_dict"),
    ),
    Format(
        "explora",
        "the ExPLoRA authors' files",
        lambda found: _separate(found) or found.prefix.startswith("teacher."),
        ("blocks.0.attn.q_proj.weight", "blocks.0.attn.k_proj.weight", "blocks.0.attn.v_proj.weight"),
    ),
    Format(
        "satmae",
        "SatMAE's group-channel models",
        lambda found: "patch_embed.0.proj.weight" in found.tensors,
        ("patch_embed.0.proj.weight", "channel_embed"),
    ),
    Format(
        "satmae-temporal",
        "SatMAE's temporal models",
        lambda found: _temporal(found.tensors),
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


def read_opened(opened: Opened, hints: Hints, heads: int | None = None) -> Read:
    """Turn a file's content into canonical names, with what it tells.

    Args:
        opened: the file.
        hints: what is known of it beside its content.
        heads: attention heads, if the caller knows.

    Raises:
        WeightsError: if it is of no known format, incomplete or damaged.
    """
    if "geoexplora" in opened.metadata:
        return _read_own(opened)
    found = find_model(opened.content, opened.path)
    if found is None:
        raise _unknown(opened)
    known = next(one for one in FORMATS if one.recognises(found))
    label = str(opened.path)
    done = to_canonical(found.tensors, hub_names=found.hub_names, label=label)
    if missing := [name for name in ("pos_embed", "blocks.0.norm1.weight") if name not in done.tensors]:
        raise WeightsError(
            f"{label} has a class token but lacks {', '.join(missing)}; it is nearest to {known.description}, which"
            f" has {', '.join(known.keys)}",
            "Name the weights of a vision transformer; this file may be of another model, or a part of one.",
        )
    if _temporal(done.tensors):
        widen_temporal_positions(done)
    tensors, left_out = _parts(found, done.tensors)
    left_out |= {f"{name} beside its parts": "they differ, and the separate projections count" for name in done.stale}
    account: dict[str, Any] = {"place": found.prefix, "converted": done.converted, "left_out": left_out}
    if header := _header_of_export(opened):
        return _with_header(opened, header, tensors, hints.format or known.name, **account)
    spec, assumed, why = _describe(label, known, hints, opened, tensors, heads)
    decoder = None
    if "decoder_embed.weight" in tensors:
        decoder = {"width": int(tensors["decoder_embed.weight"].shape[0]), "depth": _decoder_depth(tensors)}
    return Read(hints.format or known.name, spec, tensors, decoder, assumed=assumed, undescribed=why, **account)


def _parts(found: Found, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The encoder's and decoder's tensors, and why others are left out."""
    left_out = dict.fromkeys(found.outside, f"stands outside {found.prefix.removesuffix('.')}")
    kept = {}
    for name, value in tensors.items():
        if name.startswith(("head.", "head_drop.", "classifier.", "fc.", "projection_head.", "prediction_head.")):
            left_out[name] = "a head of the source's task"
        elif name == "mask_token" and "decoder_embed.weight" not in tensors:
            left_out[name] = "stands for hidden patches in DINOv2's pre-training"
        else:
            kept[name] = value
    return kept, left_out


def _describe(
    label: str, known: Format, hints: Hints, opened: Opened, tensors: Mapping[str, Tensor], heads: int | None
) -> tuple[EncoderSpec | None, tuple[str, ...], str]:
    """The description, what it takes for granted, and where there is none, why."""
    shapes = shapes_of(label, {name: value for name, value in tensors.items() if not is_decoder(name)})
    sensor, bands, normalization, assumed = hints.sensor, hints.bands, hints.normalization, []
    if shapes.grouped:
        statistics = FMOW_SENTINEL_STATISTICS.select(FMOW_SENTINEL_BANDS)
        sensor, bands = SENTINEL2.name, FMOW_SENTINEL_BANDS
        normalization = statistics.normalization("clip-uint8")
        assumed.append("SatMAE's bands, channel groups and statistics")
    elif bands is None and shapes.channels == (3,):
        sensor, bands = RGB.name, RGB.band_names
        assumed.append("bands red, green, blue")
    if normalization is None and bands == RGB.band_names:
        statistics = _preprocessor(opened.config) or known.statistics
        normalization = statistics.normalization("standardize")
        assumed.append("statistics of " + {IMAGENET_STATISTICS: "ImageNet", FMOW_RGB_STATISTICS: "fMoW-RGB"}.get(
            statistics, "its preprocessor_config.json"))  # fmt: skip
    heads = heads or opened.config.get("num_attention_heads")
    try:
        spec = describe(label, shapes, sensor=sensor, bands=bands, normalization=normalization, heads=heads)
    except WeightsError as problem:
        return None, (), str(problem)
    if heads is None and spec.model == "custom":
        assumed.append(f"{spec.heads} attention heads, 64 wide")
    return spec, tuple(assumed), ""


def _preprocessor(config: Mapping[str, Any]) -> Statistics | None:
    """Statistics that a Hugging Face folder (transformers' or timm's) names, in digital numbers."""
    stated = config.get("preprocessor", {}), config.get("pretrained_cfg", {})
    for settings, mean, std in ((stated[0], "image_mean", "image_std"), (stated[1], "mean", "std")):
        if len(settings.get(mean) or ()) == len(settings.get(std) or ()) == 3:
            means, stds = (tuple(round(255 * value, 6) for value in settings[name]) for name in (mean, std))
            found = Statistics(RGB.band_names, means, stds)
            return IMAGENET_STATISTICS if found == IMAGENET_STATISTICS else found
    return None


def _temporal(tensors: Mapping[str, Tensor]) -> bool:
    position, token = tensors.get("pos_embed"), tensors.get("cls_token")
    if position is None or token is None or KERNEL not in tensors:
        return False
    return token.shape[-1] - position.shape[-1] == 384


def _decoder_depth(tensors: Mapping[str, Tensor]) -> int:
    return len({name.split(".")[1] for name in tensors if name.startswith("decoder_blocks.")})


def _read_own(opened: Opened) -> Read:
    header = opened.metadata
    if header["geoexplora"] == "adapter":
        raise WeightsError(
            f"{opened.path} is a part of an adapter: it holds what was trained, without the weights that it adapts",
            "Merge it first: geoexplora export ADAPTER --base FILE --format safetensors --output NEW.safetensors.",
        )
    return _with_header(opened, header, opened.content, OWN)


def _header_of_export(opened: Opened) -> dict[str, str]:
    """The description that our exports for other libraries carry beside their tensors; empty if there is none."""
    told = opened.content.get(OWN, opened.config.get(OWN))
    return {str(name): str(value) for name, value in told.items()} if isinstance(told, Mapping) else {}


def _with_header(
    opened: Opened, header: Mapping[str, str], tensors: Mapping[str, Tensor], form: str, **account: Any
) -> Read:
    spec = EncoderSpec.from_metadata(header)
    try:
        decoder = dict(json.loads(header["decoder"])) if "decoder" in header else None
        step = int(header["step"]) if "step" in header else None
        trained = json.loads(header["trained"]) if "trained" in header else None
    except (ValueError, TypeError) as problem:
        raise WeightsError(f"{opened.path}: damaged header ({problem})", "Take another copy of the file.") from problem
    return Read(form, spec, tensors, decoder, step, trained, **account)


def _unknown(opened: Opened) -> WeightsError:
    """The error for a file in which no vision transformer was found: names the nearest format and what differs."""
    keys = [str(key) for key in opened.content]
    inner = next((value for value in opened.content.values() if isinstance(value, Mapping) and value), None)
    names = keys + ([str(key) for key in inner] if inner is not None else [])
    first = ", ".join(names[:5]) or "none"

    def likeness(known: Format) -> float:
        return sum(max((difflib.SequenceMatcher(None, key, name).ratio() for name in names[:200]), default=0)
                   for key in known.keys) / len(known.keys)  # fmt: skip

    nearest = max(FORMATS, key=likeness)
    lacking = [key for key in nearest.keys if key not in names]
    return WeightsError(
        f"{opened.path} is of no known format; its first keys are: {first}. Nearest are {nearest.description},"
        f" but it lacks {', '.join(lacking[:5])}",
        f"Known: encoder.safetensors of this package; {'; '.join(known.description for known in FORMATS)};"
        " or a run folder.",
    )
