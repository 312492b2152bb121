"""Describing an encoder from the shapes of its tensors.

Shapes: D width, C bands, P patch, L positions, G channel groups, E channel width.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Any

from torch import Tensor

from geoexplora.bands import FMOW_SENTINEL_BANDS, FMOW_SENTINEL_GROUPS, SENTINEL2
from geoexplora.errors import ConfigError, WeightsError
from geoexplora.registry import CUSTOM, MODELS, Style, model_name, usual_mlp_width
from geoexplora.weights.spec import EncoderSpec

KERNEL = "patch_embed.proj.weight"
GROUP_KERNEL = re.compile(r"patch_embed\.(\d+)\.proj\.weight")
HEAD_WIDTH = 64
"""Width of an attention head in every published vision transformer of the formats known here."""


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
        raise WeightsError(f"{label}: {rows} positions are no square grid", "Take another copy of the file.")
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
    *,
    sensor: str | None,
    bands: Sequence[str] | None,
    normalization: Mapping[str, Any] | None,
    heads: int | None = None,
) -> EncoderSpec:
    """Describe an encoder.

    Args:
        label: the file's name, for messages.
        shapes: its sizes.
        sensor: name of its sensor.
        bands: its input bands; ``None`` for SatMAE's ten bands of Sentinel-2.
        normalization: ``Normalization.to_dict()`` of its input.
        heads: attention heads; ``None`` takes those of the model of this width and depth, or heads 64 wide.

    Raises:
        WeightsError: if bands, channel groups or heads are not known.
    """
    count = sum(shapes.channels)
    if shapes.grouped:
        if shapes.channels != tuple(len(group) for group in FMOW_SENTINEL_GROUPS):
            raise WeightsError(
                f"{label} has channel groups of {', '.join(map(str, shapes.channels))} bands, and does not tell which",
                "SatMAE's 4, 4 and 2 bands of Sentinel-2 are known; other groups only from files that name them.",
            )
        sensor, bands, groups = SENTINEL2.name, FMOW_SENTINEL_BANDS, FMOW_SENTINEL_GROUPS
    else:
        groups = None
    if sensor is None or bands is None or normalization is None or len(bands) != count:
        raise WeightsError(
            f"{label} takes {count} bands and does not tell which",
            "Three bands are taken for red, green, blue; others are known of TorchGeo's weights by their enum's name"
            " (ViTSmall16_Weights.SENTINEL2_ALL_MOCO) and of files saved by geoexplora.",
        )
    if heads is None:
        named = [known.heads for known in MODELS.values() if (known.width, known.depth) == (shapes.width, shapes.depth)]
        if not named and shapes.width % HEAD_WIDTH:
            raise WeightsError(
                f"{label} is {shapes.width} wide with {shapes.depth} blocks; how many attention heads that has does not"
                " show in its tensors",
                f"Known are {', '.join(MODELS)}, and widths that are multiples of {HEAD_WIDTH}.",
            )
        heads = named[0] if named else shapes.width // HEAD_WIDTH
    model = model_name(shapes.width, shapes.depth, heads)
    style = shapes.style
    if model != CUSTOM and style.channel_width == MODELS[model].channel_width:
        style = Style(**(vars(style) | {"channel_width": None}))
    try:
        return EncoderSpec.of(
            model,
            image_size=shapes.grid * shapes.patch_size,
            patch_size=shapes.patch_size,
            sensor=sensor,
            bands=bands,
            groups=groups,
            normalization=normalization,
            style=style,
            sizes=(shapes.width, shapes.depth, heads),
        )
    except ConfigError as problem:
        raise WeightsError(f"{label}: {problem}", "Take another copy of the file.") from problem


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
