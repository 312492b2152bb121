"""Names that TorchGeo and timm give weights: where the files lie, and what the libraries tell of them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from geoexplora.bands import RGB, SENSORS, Statistics, nearest
from geoexplora.errors import ConfigError, WeightsError
from geoexplora.torchgeo_facts import SSL4EO_L_KELVIN, SSL4EO_L_WHITE
from geoexplora.weights.sources.addresses import Address, parse_address
from geoexplora.weights.sources.shortcuts import FORMS, SHORT_NAMES, Hints


@dataclass(frozen=True)
class LibraryWeights:
    """Weights that a library knows by name.

    Attributes:
        name: what to call them in records.
        addresses: where the file lies; each counts only if nothing is at those before it.
        hints: what the library tells of them.
        licence: their licence, or where to read it, if known.
    """

    name: str
    addresses: tuple[Address, ...]
    hints: Hints
    licence: str | None = None


def _address(url: str) -> Address:
    """The address of a library's file, with the start of its digest if its name ends in it, as torch.hub reads it."""
    digest = re.search(r"-([0-9a-f]{8,64})\.\w+$", url)
    return parse_address(url, digest[1] if digest else None)


# TorchGeo

_TORCHGEO_SENSORS = {
    "LANDSAT_TM_": "landsat-tm",
    "LANDSAT_ETM_": "landsat-etm",
    "LANDSAT_OLI_": "landsat-oli",
    "SENTINEL2_": "sentinel-2",
    "SENTINEL1_": "sentinel-1",
}


def from_torchgeo(text: str) -> LibraryWeights:
    """Look weights up by TorchGeo's name of them.

    Args:
        text: a weight enum, such as ``ViTSmall16_Weights.SENTINEL2_ALL_MOCO``.

    Raises:
        WeightsError: if there are none, or not of a vision transformer.
    """
    from torchgeo.models import get_weight

    try:
        weight = get_weight(text)
    except ValueError:
        usable = [str(weight) for weight in torchgeo_weights()]
        raise WeightsError(f"TorchGeo has no weights {text}", f"{nearest(text, usable)}{_usable(usable)}") from None
    if not _is_vit(weight):
        raise WeightsError(
            f"{text} are weights of {weight.meta.get('model') or 'another model'}, not of a vision transformer (ViT)",
            _usable([str(other) for other in torchgeo_weights()]),
        )
    return LibraryWeights(text, (_address(weight.url),), torchgeo_hints(weight))


def _usable(names: list[str]) -> str:
    kinds = ", ".join(dict.fromkeys(name.partition(".")[0] for name in names))
    return f"Those of vision transformers can be used: all of {kinds}."


def _is_vit(weight: Any) -> bool:
    return str(weight.meta.get("model")).startswith("vit_")


def torchgeo_weights() -> Iterator[Any]:
    """TorchGeo's weight enums of vision transformers."""
    from torchgeo.models import get_model_weights, list_models

    for name in list_models():
        with suppress(KeyError):  # a model without weights
            yield from (weight for weight in get_model_weights(name) if _is_vit(weight))


def torchgeo_hints(weight: Any) -> Hints:
    """What a weight enum of TorchGeo tells: its bands by name, and the normalization where its transforms tell it.

    Args:
        weight: a member of one of TorchGeo's weight enums.
    """
    name = str(weight.name)
    sensor = next((SENSORS[known] for start, known in _TORCHGEO_SENSORS.items() if name.startswith(start)), RGB)
    told = weight.meta.get("bands") or (RGB.band_names if "RGB" in name else ())
    try:
        bands = sensor.select(band.removeprefix("SR_") for band in told)
    except ConfigError:  # it tells none, or such as are not known here
        bands = ()
    if not bands or len(bands) != weight.meta.get("in_chans"):
        return Hints(format="torchgeo")
    method, scaling = "standardize", _standardization(weight.transforms, len(bands))
    if sensor.name.startswith("landsat"):
        # The transforms take images that SSL4EO-L had clipped to 8 bits; the sensor's units are physical ones
        top = next((top for level, top in SSL4EO_L_WHITE.items() if f"_{level}_" in name), None)
        if scaling != [(0.0, 255.0)] * len(bands) or top is None:
            return Hints(sensor.name, bands, None, "torchgeo")
        scaling = [_clipping(sensor.band(band).common_name, top) for band in bands]
        method = "clip-uint8"
    if scaling is None:
        return Hints(sensor.name, bands, None, "torchgeo")
    mean, std = (tuple(round(values[part], 6) for values in scaling) for part in (0, 1))
    return Hints(sensor.name, bands, Statistics(bands, mean, std).normalization(method), "torchgeo")


def _clipping(common_name: str, top: float) -> tuple[float, float]:
    """Mean and deviation whose clipping, at two deviations, is from black to white."""
    low, high = SSL4EO_L_KELVIN if common_name.startswith("lwir") else (0.0, top)
    return (low + high) / 2, (high - low) / 4


def _standardization(transforms: Any, channels: int) -> list[tuple[float, float]] | None:
    """Mean and deviation of each channel that a chain of transforms amounts to; None if that cannot be told."""
    chain = list(transforms.children()) or list(getattr(transforms, "transforms", [transforms]))
    scaling, normalized = [(0.0, 1.0)] * channels, False
    for step in chain:
        kind = type(step).__name__
        if kind in {"Resize", "CenterCrop"}:
            continue
        if kind != "Normalize":
            return None
        settings = step.flags if hasattr(step, "flags") else vars(step)  # kornia's, torchvision's
        means, stds = ([float(value) for value in settings[part]] for part in ("mean", "std"))
        if not {len(means), len(stds)} <= {1, channels}:
            return None
        means, stds = (values * channels if len(values) == 1 else values for values in (means, stds))
        scaling = [
            (mean + std * then_mean, std * then_std)
            for (mean, std), then_mean, then_std in zip(scaling, means, stds, strict=True)
        ]
        normalized = True
    return scaling if normalized else None


# timm


def _peculiarities(model: Any) -> list[str]:
    """What a vision transformer of timm has that no model here has, known before its weights are fetched."""
    from torch import nn

    attention: Any = model.blocks[0].attn
    qkv, (rows, columns) = getattr(attention, "qkv", None), model.patch_embed.grid_size
    found = {
        "has no class token": not model.has_class_token,
        "has no position encoding": model.pos_embed is None,
        "takes images that are not square": rows != columns,
        "normalizes before its blocks": not isinstance(model.norm_pre, nn.Identity),
        "normalizes queries and keys": not isinstance(getattr(attention, "q_norm", None), nn.Identity),
        "has no fused queries, keys and values with bias": getattr(qkv, "bias", None) is None,
        "pools by attention": model.attn_pool is not None,
    }
    return [what for what, holds in found.items() if holds]


def from_timm(text: str) -> LibraryWeights:
    """Look weights up by timm's name of a pretrained model.

    Args:
        text: the name, such as ``vit_base_patch16_224.mae``; without a tag timm's default is meant.

    Raises:
        WeightsError: if there are none, or not of a plain vision transformer.
    """
    import timm
    import torch
    from timm.layers import PatchEmbed
    from timm.models.vision_transformer import VisionTransformer

    if not timm.is_model(text):
        raise WeightsError(f"unknown weights {text}", f"{nearest(text, SHORT_NAMES)}{FORMS}")
    architecture = text.partition(".")[0]
    try:
        settings = timm.get_pretrained_cfg(text)
    except RuntimeError:
        tagged = timm.list_models(f"{architecture}.*", pretrained=True)
        known = ", ".join(tagged) or "none"
        raise WeightsError(f"timm has no weights {text}", f"{nearest(text, tagged)}Known: {known}.") from None
    with torch.device("meta"):  # only to look at it
        model = timm.create_model(architecture)
    plain = type(model) is VisionTransformer and isinstance(model.patch_embed, PatchEmbed)
    if other := _peculiarities(model) if plain else [f"is a {type(model).__name__}"]:
        raise WeightsError(
            f"{text} is no plain vision transformer: it {' and '.join(other)}",
            "Take one of timm's VisionTransformer: names that start with vit_ or deit_ and a size, such as"
            " vit_base_patch16_224.mae.",
        )
    if settings is None or not (settings.hf_hub_id or settings.url):
        raise WeightsError(
            f"timm has no pretrained weights of {text}",
            "Take another model: timm.list_models('vit_*', pretrained=True) lists those that have some.",
        )
    if settings.hf_hub_id:  # as timm itself: the safe format first
        files = [settings.hf_hub_filename] if settings.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
        addresses = tuple(parse_address(f"hf://{settings.hf_hub_id}/{file}") for file in files)
    else:
        addresses = (_address(settings.url),)
    heads = int(model.blocks[0].attn.num_heads)
    hints = Hints(format="timm", heads=heads)
    if settings.input_size[0] == 3:
        mean, std = (tuple(round(255 * value, 6) for value in values) for values in (settings.mean, settings.std))
        statistics = Statistics(RGB.band_names, mean, std)
        hints = Hints(RGB.name, RGB.band_names, statistics.normalization("standardize"), "timm", heads)
    name = f"{architecture}.{settings.tag}" if settings.tag else text
    return LibraryWeights(name, addresses, hints, settings.license)
