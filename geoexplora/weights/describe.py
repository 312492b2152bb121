"""Describing an encoder from the shapes of its tensors.

Shapes: D width, C bands, P patch, L positions, G channel groups, E channel width.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isqrt
from typing import Any

import timm
import torch
from torch import Tensor

from geoexplora.bands import (
    FMOW_SENTINEL_BANDS,
    FMOW_SENTINEL_GROUPS,
    FMOW_SENTINEL_STATISTICS,
    IMAGENET_STATISTICS,
    RGB,
    SENTINEL2,
    Statistics,
)
from geoexplora.errors import ConfigError, WeightsError
from geoexplora.registry import CUSTOM, MODELS, Style, model_name, usual_mlp_width
from geoexplora.weights.sources.shortcuts import Hints
from geoexplora.weights.spec import EncoderSpec

KERNEL = "patch_embed.proj.weight"
GROUP_KERNEL = re.compile(r"patch_embed\.(\d+)\.proj\.weight")
HEAD_WIDTH = 64
"""Usual width of an attention head."""

_WIDE_HEADS = {(1152, 27): 16, (1408, 40): 16, (1664, 48): 16}
"""Heads of timm's vision transformers (so400m, giant, gigantic) that have other ones, by width and depth."""

_HUB_BLOCKS = {"hidden_act": "gelu", "layer_norm_eps": 1e-6, "qkv_bias": True, "apply_layernorm": True}
"""What does not show in the tensors of a Hugging Face model, as it must be."""


@dataclass(frozen=True)
class Shapes:
    """Sizes that show in an encoder's tensors.

    Attributes:
        width: D.
        depth: number of blocks.
        patch_size: P.
        grid: rows (and columns) of positions.
        channels: C of each channel group; of a plain ViT the one number.
        grouped: whether there are channel groups.
        style: what it has beside its sizes.
    """

    width: int
    depth: int
    patch_size: int
    grid: int
    channels: tuple[int, ...]
    grouped: bool
    style: Style


def shapes_of(label: str, tensors: Mapping[str, Tensor]) -> Shapes:
    """Read an encoder's sizes off its tensors.

    Args:
        label: the file's name, for messages.
        tensors: tensors under canonical names.

    Raises:
        WeightsError: if a tensor that tells a size is missing or has a strange shape.
    """
    grouped = "patch_embed.0.proj.weight" in tensors
    depth = _count(tensors, "blocks")
    kernels = [
        _kernel(label, tensors, f"patch_embed.{group}.proj.weight") for group in range(_count(tensors, "patch_embed"))
    ]
    kernels = kernels if grouped else [_kernel(label, tensors, KERNEL)]
    width, patch = kernels[0][0], kernels[0][2]
    registers = int(tensors["reg_token"].shape[1]) if "reg_token" in tensors else 0
    position = _tensor(label, tensors, "pos_embed", 3)
    rows = position.shape[1] - (1 + registers if grouped else 0 if registers else 1)
    grid = isqrt(max(rows, 0))
    if grid * grid != rows or not rows:
        raise WeightsError(f"{label}: {rows} positions are no square grid", "Only square images can be read.")
    mlp_width = int(_tensor(label, tensors, "blocks.0.mlp.fc1.weight", 2).shape[0])
    swiglu = int(_tensor(label, tensors, "blocks.0.mlp.fc2.weight", 2).shape[1]) * 2 == mlp_width
    style = Style(
        layer_scale="blocks.0.ls1.gamma" in tensors,
        registers=registers,
        swiglu=swiglu,
        mlp_width=None if mlp_width == usual_mlp_width(width, swiglu) else mlp_width,
        channel_width=int(_tensor(label, tensors, "channel_embed", 3).shape[2]) if grouped else None,
        class_token_encoding="channel_cls_embed" in tensors,
        pooled_norm="fc_norm.weight" in tensors and "norm.weight" not in tensors,
    )
    return Shapes(width, depth, patch, grid, tuple(kernel[1] for kernel in kernels), grouped, style)


def describe(
    label: str,
    shapes: Shapes,
    hints: Hints,
    config: Mapping[str, Any],
    statistics: Statistics,
    heads: int | None = None,
) -> tuple[EncoderSpec, tuple[str, ...]]:
    """Describe an encoder.

    Args:
        label: the file's name, for messages.
        shapes: the encoder's sizes.
        hints: what is known beside the file's content.
        config: a Hugging Face folder's config.json; empty for others.
        statistics: what the format's RGB models are normalized by, where nothing tells it.
        heads: attention heads, if the caller knows.

    Returns:
        The description, and what it takes for granted because nothing tells it.

    Raises:
        WeightsError: if bands, channel groups or heads are not known.
    """
    sensor, bands, groups, normalization, assumed = _input(label, shapes, hints, config, statistics)
    told = heads or hints.heads or _stated_heads(config)
    heads = told or _usual_heads(label, shapes)
    if not told:
        assumed.append(f"{heads} attention heads")
    model = model_name(shapes.width, shapes.depth, heads)
    style = shapes.style
    if model != CUSTOM and style.channel_width == MODELS[model].channel_width:
        style = replace(style, channel_width=None)
    try:
        spec = EncoderSpec.of(
            model, image_size=shapes.grid * shapes.patch_size, patch_size=shapes.patch_size, sensor=sensor,
            bands=bands, groups=groups, normalization=normalization, style=style,
            sizes=(shapes.width, shapes.depth, heads),
            antialias=sensor == RGB.name,  # photographs went through PIL, which always smooths
        )  # fmt: skip
    except ConfigError as problem:
        raise WeightsError(f"{label}: {problem}", "Take another copy of the file.") from problem
    return spec, tuple(assumed)


def refuse_other_blocks(label: str, config: Mapping[str, Any]) -> None:
    """Refuse a Hugging Face model whose blocks compute something else than the tensors alone would tell.

    Raises:
        WeightsError: if its configuration says so.
    """
    for name, usual in _HUB_BLOCKS.items():
        if name in config and config[name] != usual:
            raise WeightsError(
                f"{label}: its config.json has {name} {config[name]!r}; only {usual!r} can be built",
                "Load it with transformers itself.",
            )


def _input(
    label: str, shapes: Shapes, hints: Hints, config: Mapping[str, Any], statistics: Statistics
) -> tuple[str, Sequence[str], Sequence[Sequence[str]] | None, Mapping[str, Any], list[str]]:
    """Sensor, bands, channel groups and normalization of the input, and what of it is taken for granted."""
    if shapes.grouped:
        if shapes.channels != tuple(len(group) for group in FMOW_SENTINEL_GROUPS):
            raise WeightsError(
                f"{label} has channel groups of {', '.join(map(str, shapes.channels))} bands, and does not tell which",
                "SatMAE's 4, 4 and 2 bands of Sentinel-2 are known; other groups only from files that name them.",
            )
        normalization = FMOW_SENTINEL_STATISTICS.select(FMOW_SENTINEL_BANDS).normalization("clip-uint8")
        assumed = [] if hints.bands else ["SatMAE's bands, channel groups and statistics"]
        return SENTINEL2.name, FMOW_SENTINEL_BANDS, FMOW_SENTINEL_GROUPS, normalization, assumed
    count, assumed = sum(shapes.channels), []
    sensor, bands = hints.sensor, hints.bands
    if bands is None and count == len(RGB.bands):
        sensor, bands = RGB.name, RGB.band_names
        assumed.append("bands red, green, blue")
    if sensor is None or bands is None or len(bands) != count:
        raise WeightsError(
            f"{label} takes {count} bands and does not tell which",
            "Three bands are taken for red, green, blue; others are known of TorchGeo's weights by their enum's name"
            " (ViTSmall16_Weights.SENTINEL2_ALL_MOCO) and of files saved by geoexplora.",
        )
    if hints.normalization is not None:
        return sensor, bands, None, hints.normalization, assumed
    if sensor != RGB.name:
        assumed.append("nothing of the normalization")
        return sensor, bands, None, {}, assumed
    stated = _preprocessor(config)
    if stated is None:
        assumed.append("statistics of " + ("ImageNet" if statistics == IMAGENET_STATISTICS else "fMoW-RGB"))
    return sensor, bands, None, (stated or statistics).normalization("standardize"), assumed


def _preprocessor(config: Mapping[str, Any]) -> Statistics | None:
    """Statistics that a Hugging Face folder (transformers' or timm's) names, in digital numbers."""
    stated = config.get("preprocessor", {}), config.get("pretrained_cfg", {})
    for settings, mean, std in ((stated[0], "image_mean", "image_std"), (stated[1], "mean", "std")):
        if len(settings.get(mean) or ()) == len(settings.get(std) or ()) == 3:
            means, stds = (tuple(round(255 * value, 6) for value in settings[name]) for name in (mean, std))
            return Statistics(RGB.band_names, means, stds)
    return None


def _stated_heads(config: Mapping[str, Any]) -> int | None:
    """Heads that a Hugging Face folder (transformers' or timm's) states, or that timm's model of its name has."""
    stated = config.get("num_attention_heads") or config.get("model_args", {}).get("num_heads")
    architecture = str(config.get("architecture", ""))
    if stated or not timm.is_model(architecture):
        return stated
    with torch.device("meta"):  # only to look at it
        blocks = getattr(timm.create_model(architecture), "blocks", [None])
    return getattr(getattr(blocks[0], "attn", None), "num_heads", None)


def _usual_heads(label: str, shapes: Shapes) -> int:
    """Heads of the model of this width and depth, or heads 64 wide."""
    sizes = (shapes.width, shapes.depth)
    named = {(known.width, known.depth): known.heads for known in MODELS.values()} | _WIDE_HEADS
    if sizes not in named and shapes.width % HEAD_WIDTH:
        raise WeightsError(
            f"{label} is {shapes.width} wide with {shapes.depth} blocks; how many attention heads that has does not"
            " show in its tensors",
            f"Known are {', '.join(MODELS)}, and widths that are multiples of {HEAD_WIDTH}; in Python name them:"
            " geoexplora.weights.read_weights(path, heads=...).",
        )
    return named.get(sizes, shapes.width // HEAD_WIDTH)


def _tensor(label: str, tensors: Mapping[str, Tensor], name: str, dimensions: int) -> Tensor:
    if name not in tensors:
        raise WeightsError(f"{label} lacks {name}", "Take another copy of the file.")
    if tensors[name].ndim != dimensions:
        raise WeightsError(f"{label}: {name} has shape {tuple(tensors[name].shape)}", "Take another copy of the file.")
    return tensors[name]


def _kernel(label: str, tensors: Mapping[str, Tensor], name: str) -> tuple[int, int, int]:
    """D, C and P of a patch embedding."""
    shape = _tensor(label, tensors, name, 4).shape
    if shape[2] != shape[3]:
        raise WeightsError(
            f"{label}: {name} has patches of {shape[2]} x {shape[3]} pixels", "Only square ones will do."
        )
    return int(shape[0]), int(shape[1]), int(shape[2])


def _count(tensors: Mapping[str, Tensor], stem: str) -> int:
    found = (re.match(rf"{stem}\.(\d+)\.", name) for name in tensors)
    return 1 + max((int(match[1]) for match in found if match), default=-1)
