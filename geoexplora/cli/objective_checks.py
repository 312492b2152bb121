"""Checks of the settings of one objective. Torch-free. See ``geoexplora.cli.checks``."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from geoexplora.cli.command import Check, Finding
from geoexplora.errors import ConfigError
from geoexplora.registry import find_dataset

SMALLEST_BLURRED = 5
"""Pixels a side that a blur of 9 px needs: it reflects 4 at each border."""


def decoder(options: Any) -> Iterator[Finding]:
    """The decoder of a masked autoencoder can be built."""
    if options.objective != "mae":
        return
    low = [name for name in ("decoder_width", "decoder_depth", "decoder_heads") if getattr(options, name) < 1]
    for name in low:
        yield Finding((name,), f"--{name.replace('_', '-')} must be at least 1, not {getattr(options, name)}.")
    if not low and options.decoder_width % options.decoder_heads:
        yield Finding(
            ("decoder_heads", "decoder_width"),
            f"--decoder-width {options.decoder_width} does not divide by --decoder-heads {options.decoder_heads}.",
        )
    step = 4 if options.groups is None else 16  # a quarter encodes the group; sines and cosines of two axes need 4
    if not low and options.decoder_width % step:
        near = " or ".join(
            str(one * step) for one in (options.decoder_width // step, options.decoder_width // step + 1) if one
        )
        text = (
            f"--decoder-width {options.decoder_width} is not a multiple of {step}, which the position encoding needs."
            f" Near it: {near}."
        )
        yield Finding(("decoder_width",), text)


def mask(options: Any) -> Iterator[Finding]:
    """Some tokens are masked and some are not."""
    if options.objective != "mae":
        return
    if not 0 < options.mask_ratio < 1:
        yield Finding(("mask_ratio",), f"--mask-ratio {options.mask_ratio:g} must lie between 0 and 1; 0.75 is usual.")
        return
    if min(options.image_size, options.patch_size) < 1 or options.image_size % options.patch_size:
        return  # reported elsewhere
    tokens = _tokens(options, options.mask == "independent")
    if not 1 <= math.floor((1 - options.mask_ratio) * tokens) < tokens:
        yield Finding(
            ("image_size", "patch_size", "mask_ratio"),
            f"an image has {tokens} token{'' if tokens == 1 else 's'} to mask, too few for --mask-ratio"
            f" {options.mask_ratio:g}: none would be visible, or none hidden. Use larger images or smaller patches.",
        )


def _tokens(options: Any, by_group: bool) -> int:
    positions: int = (options.image_size // options.patch_size) ** 2
    return positions * (len(options.groups) if by_group and options.groups else 1)


def crops(options: Any) -> Iterator[Finding]:
    """DINOv2's crops hold whole patches and lie within their image."""
    if options.objective != "dinov2":
        return
    patch, size = options.patch_size, options.local_size
    if options.local_crops < 0:
        yield Finding(("local_crops",), f"--local-crops {options.local_crops} is negative. Give 0 for none.")
    if patch >= 1 and options.local_crops > 0 and (size < patch or size % patch):
        near = sorted({max(size // patch, 1) * patch, (size // patch + 1) * patch})
        yield Finding(
            ("local_size", "patch_size"),
            f"--local-size {size} is not a multiple of --patch-size {patch}. Near it: {' or '.join(map(str, near))}.",
        )
    for name in ("global_scale", "local_scale"):
        low, high = getattr(options, name)
        if not 0 < low <= high <= 1:
            text = f"--{name.replace('_', '-')} {low:g},{high:g}: expected two shares of the area, rising, above 0 and"
            yield Finding((name,), f"{text} up to 1.")
    small = min([options.image_size, *([size] if options.local_crops > 0 else [])])
    if options.augmentation != "none" and 0 < small < SMALLEST_BLURRED:
        text = f"crops of {small} px are too small to be blurred. Use {SMALLEST_BLURRED} px or more, or"
        yield Finding(("local_size", "image_size"), f"{text} --augmentation none.")
    if options.local_crops > 0 and size > options.image_size:
        text = f"local crops of {size} px are larger than global ones of {options.image_size} px."
        yield Finding(("local_size", "image_size"), text, "warning")
    if options.load_size is not None and options.load_size < 1:
        yield Finding(("load_size",), f"--load-size {options.load_size} must be at least 1 pixel.")


def augmentation(options: Any) -> Iterator[Finding]:
    """Colours are changed where there are colours."""
    if options.objective != "dinov2" or options.augmentation != "colour" or options.dataset is None:
        return
    with suppress(ConfigError):  # reported elsewhere
        sensor = find_dataset(options.dataset).sensor
        if sensor not in {None, "rgb"}:
            text = f"--augmentation colour needs red, green and blue; {options.dataset} is {sensor}. Use auto or bands."
            yield Finding(("augmentation", "dataset"), text)


def hidden_tokens(options: Any) -> Iterator[Finding]:
    """DINOv2's masks hide a part of the tokens of some crops."""
    if options.objective != "dinov2":
        return
    probability, (low, high) = options.mask_probability, options.mask_range
    if not 0 <= probability <= 1:
        yield Finding(("mask_probability",), f"--mask-probability {probability:g} is no share from 0 to 1.")
    if not 0 <= low <= high < 1:
        text = f"--mask-range {low:g},{high:g}: expected two shares of the tokens, rising, from 0 and below 1."
        yield Finding(("mask_range",), text)
    elif 0 <= probability <= 1 and options.ibot_weight and min(options.image_size, options.patch_size) >= 1:
        masked = math.floor(probability * 2 * max(1, options.batch_size))
        most = int(high * _tokens(options, by_group=True))
        if masked < 1 or most < 1:
            text = (
                f"no token is ever hidden: {masked} crops of a batch are masked, {most} tokens of each at most."
                " The loss of hidden tokens (iBOT) stays 0; raise --mask-probability, --mask-range or --batch-size."
            )
            yield Finding(("mask_probability", "mask_range"), text, "warning")


def teacher(options: Any) -> Iterator[Finding]:
    """DINOv2's teacher and heads are possible."""
    if options.objective != "dinov2":
        return
    for name in ("teacher_temperature", "teacher_temperature_start"):
        value = getattr(options, name)
        if not (0 < value <= 1):
            text = f"--{name.replace('_', '-')} {value:g} must lie above 0 and up to 1; 0.04 to 0.07 are usual."
            yield Finding((name,), text)
    if not 0 <= options.teacher_momentum <= 1:
        text = f"--teacher-momentum {options.teacher_momentum:g} must lie between 0 and 1; 0.992 is usual."
        yield Finding(("teacher_momentum",), text)
    low = {"prototypes": 2, "head_layers": 1, "head_hidden": 1, "head_bottleneck": 1}
    low |= {"ibot_weight": 0, "koleo_weight": 0, "teacher_warmup_epochs": 0, "teacher_warmup_steps": 0}
    low |= {"freeze_last_epochs": 0, "freeze_last_steps": 0}
    for name, least in low.items():
        value = getattr(options, name)
        if value is not None and not (value >= least and math.isfinite(value)):
            yield Finding((name,), f"--{name.replace('_', '-')} must be at least {least}, not {value:g}.")
    if options.koleo_weight > 0 and options.batch_size == 1:
        text = (
            "--batch-size 1 with KoLeo: it spreads the images of a batch, and one has no neighbour."
            " Use --batch-size 2 or more, or --koleo-weight 0."
        )
        yield Finding(("batch_size", "koleo_weight"), text)


OBJECTIVE_CHECKS: dict[Check, tuple[str, ...]] = {
    decoder: ("objective", "decoder_width", "decoder_depth", "decoder_heads", "groups"),
    mask: ("objective", "mask_ratio", "image_size", "patch_size", "groups", "mask"),
    crops: (
        "objective", "image_size", "patch_size", "local_size", "local_crops", "global_scale", "local_scale",
        "load_size", "augmentation",
    ),
    augmentation: ("objective", "augmentation", "dataset"),
    hidden_tokens: (
        "objective", "mask_probability", "mask_range", "ibot_weight", "batch_size", "image_size", "patch_size",
        "groups",
    ),
    teacher: (
        "objective", "teacher_temperature", "teacher_temperature_start", "teacher_momentum", "prototypes",
        "head_layers", "head_hidden", "head_bottleneck", "ibot_weight", "koleo_weight", "batch_size",
        "teacher_warmup_epochs", "teacher_warmup_steps", "freeze_last_epochs", "freeze_last_steps",
    ),
}  # fmt: skip
"""Checks of the objectives, with the settings that each reads."""
