"""The timm model, by name and arguments, that has given sizes and style. Torch-free.

Arguments are plain JSON types, and only what differs from timm's own model of that name, so that a description made
from them can be read by people and by stock timm.
"""

from __future__ import annotations

import re
from typing import Any

from geoexplora.registry import CUSTOM, MODELS, Architecture, Style, usual_mlp_width

LAYER_SCALE_INIT = 1e-5
"""DINOv2's; loaded weights replace it."""


def plain_model(
    model: str, sizes: Architecture, style: Style, image_size: int, patch_size: int, channels: int
) -> tuple[str, dict[str, Any]]:
    """A plain ViT: timm's stock model and the arguments that turn it into the wanted one.

    Args:
        model: name in ``MODELS``, or ``CUSTOM``.
        sizes: its sizes.
        style: its style.
        image_size: image side in pixels.
        patch_size: patch side in pixels.
        channels: number of bands.
    """
    name, stock = _stock(model, style)
    wanted = {
        "img_size": image_size,
        "patch_size": patch_size,
        "in_chans": channels,
        "embed_dim": sizes.width,
        "depth": sizes.depth,
        "num_heads": sizes.heads,
    } | _style_arguments(sizes.width, style)
    arguments = {key: value for key, value in wanted.items() if value != stock[key]}
    if style.pooled_norm:
        arguments["global_pool"] = "avg"
    return name, arguments | {"num_classes": 0}


def group_channel_model(
    model: str, sizes: Architecture, style: Style, image_size: int, patch_size: int, groups: list[list[int]]
) -> tuple[str, dict[str, Any]]:
    """A group-channel ViT, as ``geoexplora.models`` registers it with timm.

    Args:
        model: name in ``MODELS``, or ``CUSTOM``.
        sizes: its sizes.
        style: its style.
        image_size: image side in pixels.
        patch_size: patch side in pixels.
        groups: for each channel group the positions of its bands in the input.
    """
    arguments: dict[str, Any] = {"img_size": image_size, "patch_size": patch_size, "groups": groups, "num_classes": 0}
    base = model
    if model == CUSTOM:
        base = "vit_tiny"
        arguments |= {"embed_dim": sizes.width, "depth": sizes.depth, "num_heads": sizes.heads}
    if style.channel_width is not None or model == CUSTOM:
        arguments["channel_width"] = style.channel_width or sizes.channel_width
    plain = _style_arguments(sizes.width, Style())
    arguments |= {key: value for key, value in _style_arguments(sizes.width, style).items() if value != plain[key]}
    if style.swiglu:
        arguments["swiglu"] = True
    if style.class_token_encoding:
        arguments["class_token_encoding"] = True
    if style.pooled_norm:
        arguments["global_pool"] = "avg"
    return f"group_channel_{base}", arguments


def _style_arguments(width: int, style: Style) -> dict[str, Any]:
    return {
        "init_values": LAYER_SCALE_INIT if style.layer_scale else 0,  # timm drops arguments that are None
        "reg_tokens": style.registers,
        "mlp_ratio": _ratio(style.mlp_width or usual_mlp_width(width, style.swiglu), width),
    }


def _stock(model: str, style: Style) -> tuple[str, dict[str, Any]]:
    """Name and defaults of the timm model that is nearest to a style."""
    if style.swiglu or style.layer_scale or style.registers:
        size = (
            "vit_giant" if style.swiglu else model if model in {"vit_small", "vit_base", "vit_large"} else "vit_small"
        )
        name = f"{size}_patch14_{'reg4_' if style.registers else ''}dinov2"
        patch, image = 14, 518
        base = Style(layer_scale=True, registers=4 if style.registers else 0, swiglu=style.swiglu)
    else:
        name = MODELS[model].timm if model not in {CUSTOM, "vit_giant"} else MODELS["vit_tiny"].timm
        parsed = re.fullmatch(r"(\w+)_patch(\d+)_(\d+)", name)
        if parsed is None:
            raise ValueError(f"{name} does not tell its patch and image size")
        size, patch, image = parsed[1], int(parsed[2]), int(parsed[3])
        base = Style()
    sizes = MODELS[size]
    return name, {
        "img_size": image,
        "patch_size": patch,
        "in_chans": 3,
        "embed_dim": sizes.width,
        "depth": sizes.depth,
        "num_heads": sizes.heads,
    } | _style_arguments(sizes.width, base)


def _ratio(mlp_width: int, width: int) -> float:
    """The ``mlp_ratio`` from which timm, which truncates the product with the width, makes this MLP width."""
    ratio = mlp_width / width
    return ratio if int(width * ratio) == mlp_width else (mlp_width + 0.5) / width
