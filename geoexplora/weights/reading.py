"""From an opened file to canonical tensors and a description."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from geoexplora.errors import WeightsError
from geoexplora.weights.canonical import to_canonical, widen_temporal_positions
from geoexplora.weights.describe import describe, refuse_other_blocks, shapes_of
from geoexplora.weights.formats import is_temporal, recognise, unknown
from geoexplora.weights.layout import Found, find_model
from geoexplora.weights.opening import Opened
from geoexplora.weights.source_weights import SourceWeights
from geoexplora.weights.sources.shortcuts import Hints
from geoexplora.weights.spec import EncoderSpec
from geoexplora.weights.write import is_decoder

OWN, OWN_DECODER = "geoexplora", "geoexplora-decoder"
"""Formats of our own files, and the name of the entry that describes our exports for other libraries."""

_MAE_DECODER = {"width": 512, "heads": 16}
"""Heads do not show in tensors; those of all published MAE and SatMAE decoders, which are this wide."""


def read_opened(opened: Opened, hints: Hints, heads: int | None = None) -> SourceWeights:
    """Turn a file's content into canonical names, with what it tells.

    Args:
        opened: the file.
        hints: what is known of it beside its content.
        heads: attention heads, if the caller knows.

    Raises:
        WeightsError: if it is of no known format, incomplete or damaged.
    """
    if OWN in opened.metadata:
        return _read_own(opened)
    if "geoexplora_source" in opened.content:
        raise WeightsError(
            f"{opened.path} is a checkpoint of a run, for going on with it",
            "Name the run's folder: its encoder.safetensors holds the merged encoder.",
        )
    found = find_model(opened.content, opened.path)
    if found is None:
        raise unknown(opened)
    known, header, label = recognise(found), _header_of_export(opened), str(opened.path)
    refuse_other_blocks(label, opened.config)
    done = to_canonical(
        found.tensors, hub_names=found.hub_names, label=label, as_timm=bool(header) and not found.hub_names
    )
    if missing := [name for name in ("pos_embed", "blocks.0.norm1.weight") if name not in done.tensors]:
        raise WeightsError(
            f"{label} has a class token but lacks {', '.join(missing)}; it is nearest to {known.description}, which"
            f" has {', '.join(known.keys)}",
            "Name the weights of a vision transformer; this file may be of another model, or a part of one.",
        )
    if is_temporal(done.tensors):
        widen_temporal_positions(done)
    tensors, left_out = _parts(found, done.tensors)
    left_out |= {f"{name} beside its parts": "they differ, and the separate projections count" for name in done.stale}
    account: dict[str, Any] = {"place": found.prefix, "converted": done.converted, "left_out": left_out}
    if header:
        return _with_header(opened, header, tensors, hints.format or known.name, **account)
    encoder = {name: value for name, value in tensors.items() if not is_decoder(name)}
    shapes = shapes_of(label, encoder)
    try:
        spec, assumed = describe(label, shapes, hints, opened.config, known.statistics, heads)
        why = ""
    except WeightsError as problem:
        spec, assumed, why = None, (), str(problem)
    name = hints.format or known.name
    return SourceWeights(
        opened.path, name, spec, tensors, _decoder(tensors),
        files=opened.files, assumed=assumed, undescribed=why, **account,
        mask_token=done.tensors.get("mask_token") if "mask_token" in left_out else None,
    )  # fmt: skip


def _parts(found: Found, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The encoder's and decoder's tensors, and why others are left out."""
    left_out = dict.fromkeys(found.outside, f"stands outside {found.prefix.removesuffix('.')}")
    kept = {}
    for name, value in tensors.items():
        if name.startswith(("head.", "head_drop.", "classifier.", "fc.", "projection_head.", "prediction_head.")):
            left_out[name] = "a head of the source's task"
        elif name == "mask_token" and "decoder_embed.weight" not in tensors:
            left_out[name] = "stands for hidden patches in DINOv2's pre-training, which --objective dinov2 takes up"
        else:
            kept[name] = value
    return kept, left_out


def _decoder(tensors: Mapping[str, Tensor]) -> dict[str, int] | None:
    """What the tensors tell of a decoder."""
    if "decoder_embed.weight" not in tensors:
        return None
    width = int(tensors["decoder_embed.weight"].shape[0])
    depth = len({name.split(".")[1] for name in tensors if name.startswith("decoder_blocks.")})
    return {"width": width, "depth": depth} | (_MAE_DECODER if width == _MAE_DECODER["width"] else {})


def _read_own(opened: Opened) -> SourceWeights:
    header = opened.metadata
    if header["geoexplora"] == "adapter":
        raise WeightsError(
            f"{opened.path} is a part of an adapter: it holds what was trained, without the weights that it adapts",
            "Merge it first: geoexplora export ADAPTER --base FILE --format safetensors --output NEW.safetensors.",
        )
    if header["geoexplora"] == "heads":
        raise WeightsError(
            f"{opened.path} holds the projection heads of a run", "Name the run's folder, or its encoder.safetensors."
        )
    if header["geoexplora"] == "decoder" and "cls_token" not in opened.content:
        return _with_header(opened, header, opened.content, OWN_DECODER)
    return _with_header(opened, header, opened.content, OWN)


def _header_of_export(opened: Opened) -> dict[str, str]:
    """The description that our exports for other libraries carry beside their tensors; empty if there is none."""
    told = opened.content.get(OWN, opened.config.get(OWN))
    return {str(name): str(value) for name, value in told.items()} if isinstance(told, Mapping) else {}


def _with_header(
    opened: Opened, header: Mapping[str, str], tensors: Mapping[str, Tensor], form: str, **account: Any
) -> SourceWeights:
    spec = EncoderSpec.from_metadata(header)
    try:
        decoder = dict(json.loads(header["decoder"])) if "decoder" in header else None
        step = int(header["step"]) if "step" in header else None
        trained = json.loads(header["trained"]) if "trained" in header else None
        assumed = tuple(map(str, json.loads(header.get("assumed", "[]"))))
    except (ValueError, TypeError) as problem:
        raise WeightsError(f"{opened.path}: damaged header ({problem})", "Take another copy of the file.") from problem
    return SourceWeights(
        opened.path, form, spec, tensors, decoder, step, trained,
        files=opened.files, assumed=assumed, told=not assumed, **account,
    )  # fmt: skip
