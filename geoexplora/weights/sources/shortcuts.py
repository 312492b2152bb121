"""What source weights may be called beside paths and addresses: short names of files, and other names. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from geoexplora.bands import (
    FMOW_RGB_STATISTICS,
    FMOW_SENTINEL_BANDS,
    FMOW_SENTINEL_STATISTICS,
    IMAGENET_STATISTICS,
    RGB,
    SENTINEL2,
    Sensor,
    Statistics,
    nearest,
)
from geoexplora.weights.sources.addresses import looks_like_path

FORMS = (
    "Give a weights file, a run folder, an https:// or hf:// address, a shortcut such as dinov2-vitl14, TorchGeo's name"
    " of weights such as ViTSmall16_Weights.SENTINEL2_ALL_MOCO, or a timm model's name."
)
"""What may be given, for messages."""

TORCHGEO_NAME = re.compile(r"\w+_Weights\.\w+")
"""TorchGeo's name of a weight enum, such as ``ViTSmall16_Weights.SENTINEL2_ALL_MOCO``."""

_TIMM_PARTS = ("vit", "deit", "beit3", "aimv2", "eva_large")
"""The name of each of timm's plain vision transformers holds one of these."""


@dataclass(frozen=True)
class Hints:
    """What is known of weights beside what their file tells.

    Attributes:
        sensor: name of the sensor, as in ``geoexplora.bands.SENSORS``.
        bands: names of the input bands, in the order of the channels.
        normalization: as ``Normalization.to_dict()`` gives it.
        format: the name of the format in reports, instead of what the file looks like.
        heads: attention heads.
    """

    sensor: str | None = None
    bands: tuple[str, ...] | None = None
    normalization: Mapping[str, Any] | None = None
    format: str | None = None
    heads: int | None = None


@dataclass(frozen=True)
class Shortcut:
    """A public weights file under a short name.

    Attributes:
        address: where it lies.
        format: the name of its format in reports.
        licence: the licence of the weights, or where to read it.
        note: what they are, in a few words.
        sensor: name of the sensor that they were trained on.
        bands: names of the input bands.
        normalization: as ``Normalization.to_dict()`` gives it; no file tells it.
        sha256: the file's digest, where it is published.
    """

    address: str
    format: str
    licence: str
    note: str
    sensor: str
    bands: tuple[str, ...]
    normalization: Mapping[str, Any]
    sha256: str | None = None


_META = "https://dl.fbaipublicfiles.com"
_DINOV2_DIGESTS = {
    "vits14": "b938bf1bc15cd2ec0feacfe3a1bb553fe8ea9ca46a7e1d8d00217f29aef60cd9",
    "vits14-reg4": "f433177089a681826f849f194ece3bb48f4d63fb38d32fc837e3dc7a4e5641fb",
    "vitb14": "0b8b82f85de91b424aded121c7e1dcc2b7bc6d0adeea651bf73a13307fad8c73",
    "vitb14-reg4": "73182a088cf94833c94b1666d1c99e02fe87e2007bff57b564fb6206e25dba71",
    "vitl14": "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428",
    "vitl14-reg4": "36e4deffbaef061a2576705b0c36f93621e2ae20bf6274694821b0b492551b51",
    "vitg14": "baf8467e50af277596bbbafa06887c177ee899ab46033649c383577d7e9309d3",
    "vitg14-reg4": "746ecb8c6301c645c5c855be91687d274587d6e48fdaec4a729753160b34a283",
}
"""As finegrain-ai/refiners checks the same eight files (conversion/models/dinov2.py); Meta publishes none."""

_SATMAE_LICENCE = "CC-BY-NC-4.0; see https://github.com/sustainlab-group/SatMAE and the Zenodo record"
_EXPLORA_LICENCE = "see https://huggingface.co/samarkhanna/ExPLoRA"


def _shortcut(
    address: str, format: str, licence: str, note: str, sensor: Sensor, method: str, statistics: Statistics,
    sha256: str | None = None,
) -> Shortcut:  # fmt: skip
    normalization = statistics.normalization(method)
    return Shortcut(address, format, licence, note, sensor.name, statistics.bands, normalization, sha256)


def _dinov2(name: str) -> Shortcut:
    size, _, registers = name.partition("-")
    file = f"dinov2_{size}_{registers}_pretrain.pth" if registers else f"dinov2_{size}_pretrain.pth"
    note = "Meta's DINOv2 on LVD-142M" + (", four register tokens" if registers else "")
    address = f"{_META}/dinov2/dinov2_{size}/{file}"
    digest = _DINOV2_DIGESTS[name]
    return _shortcut(address, "meta-dinov2", "Apache-2.0", note, RGB, "standardize", IMAGENET_STATISTICS, digest)


def _mae(size: str, pixels: bool) -> Shortcut:
    kind = "visualize" if pixels else "pretrain"
    note = "Meta's MAE on ImageNet-1k" + (", trained on plain pixels, with its decoder" if pixels else ", encoder only")
    address = f"{_META}/mae/{kind}/mae_{kind}_vit_{size}.pth"
    return _shortcut(address, "meta-mae", "CC-BY-NC-4.0", note, RGB, "standardize", IMAGENET_STATISTICS)


def _satmae_rgb(file: str, format: str, note: str) -> Shortcut:
    address = f"https://zenodo.org/records/7369797/files/{file}?download=1"
    return _shortcut(address, format, _SATMAE_LICENCE, note, RGB, "standardize", FMOW_RGB_STATISTICS)


_TEN_BANDS = FMOW_SENTINEL_STATISTICS.select(FMOW_SENTINEL_BANDS)


def _satmae_sentinel(file: str, note: str) -> Shortcut:
    address = f"https://zenodo.org/records/7338613/files/{file}?download=1"
    return _shortcut(address, "satmae", _SATMAE_LICENCE, note, SENTINEL2, "clip-uint8", _TEN_BANDS)


def _explora(file: str, note: str) -> Shortcut:
    address = f"hf://samarkhanna/ExPLoRA/{file}"
    if "sentinel" in file:
        return _shortcut(address, "explora", _EXPLORA_LICENCE, note, SENTINEL2, "clip-uint8", _TEN_BANDS)
    return _shortcut(address, "explora", _EXPLORA_LICENCE, note, RGB, "standardize", IMAGENET_STATISTICS)


_DINO_FILE = "explora_dinov2_fmow_rgb/explora_dinov2_vit_{}_fmow_rgb{}.pth"
_MAE_FILE = "explora_mae_multispectral/explora_mae_fmow_sentinel{}.pth"

SHORTCUTS: dict[str, Shortcut] = {
    **{f"dinov2-{name}": _dinov2(name) for name in _DINOV2_DIGESTS},
    "mae-vitb16": _mae("base", pixels=False),
    "mae-vitl16": _mae("large", pixels=False),
    "mae-vith14": _mae("huge", pixels=False),
    "mae-vitb16-pixel": _mae("base", pixels=True),
    "mae-vitl16-pixel": _mae("large", pixels=True),
    "mae-vith14-pixel": _mae("huge", pixels=True),
    "satmae-vitl-fmow-rgb": _satmae_rgb("fmow_pretrain.pth", "satmae-rgb", "SatMAE on fMoW-RGB, 800 epochs"),
    "satmae-vitl-fmow-temporal": _satmae_rgb(
        "pretrain_fmow_temporal.pth", "satmae-temporal", "SatMAE on three dates of fMoW-RGB, 50 epochs"
    ),
    "satmae-vitb-fmow-sentinel": _satmae_sentinel("pretrain-vit-base-e199.pth", "SatMAE on fMoW-Sentinel, 200 epochs"),
    "satmae-vitl-fmow-sentinel": _satmae_sentinel("pretrain-vit-large-e199.pth", "SatMAE on fMoW-Sentinel, 200 epochs"),
    "satmae-vitb-fmow-sentinel-finetuned": _satmae_sentinel(
        "finetune-vit-base-e7.pth", "SatMAE fine-tuned on fMoW-Sentinel; published validation accuracy 62.65 %"
    ),
    "satmae-vitl-fmow-sentinel-finetuned": _satmae_sentinel(
        "finetune-vit-large-e7.pth", "SatMAE fine-tuned on fMoW-Sentinel; published validation accuracy 63.84 %"
    ),
    "explora-vitb14-fmow-rgb": _explora(_DINO_FILE.format("base", "_encoder_only"), "ExPLoRA of DINOv2 on fMoW-RGB"),
    "explora-vitl14-fmow-rgb": _explora(_DINO_FILE.format("large", "_encoder_only"), "ExPLoRA of DINOv2 on fMoW-RGB"),
    "explora-vitb14-fmow-rgb-full": _explora(
        _DINO_FILE.format("base", ""), "ExPLoRA of DINOv2 on fMoW-RGB: the whole teacher, q, k and v kept apart as well"
    ),
    "explora-vitl14-fmow-rgb-full": _explora(
        _DINO_FILE.format("large", ""),
        "ExPLoRA of DINOv2 on fMoW-RGB: the whole teacher, q, k and v kept apart as well",
    ),
    "explora-vitl-fmow-sentinel": _explora(_MAE_FILE.format("_encoder_only"), "ExPLoRA of MAE on fMoW-Sentinel"),
    "explora-vitl-fmow-sentinel-full": _explora(
        _MAE_FILE.format(""), "ExPLoRA of MAE on fMoW-Sentinel: with its decoder, q, k and v kept apart as well"
    ),
}
"""Public weights by short names; the addresses are those that their authors give."""

BUNDLED = {"sample-source": "sample/source"}
"""Weights that come with this package by short names, and where in it they lie."""

SHORT_NAMES = (*SHORTCUTS, *BUNDLED)
"""All short names."""


def looks_fetchable(text: str) -> bool:
    """Whether a text is an address, or nearly a shortcut, or may be TorchGeo's or timm's name of weights.

    Without the network, torch or timm: a text that only ``locate`` can tell to be wrong passes.

    Args:
        text: what the user named, where no such file or folder exists.
    """
    if "://" in text:
        return True
    if not text.strip() or looks_like_path(text):
        return False
    named = TORCHGEO_NAME.fullmatch(text) or any(part in text.lower() for part in _TIMM_PARTS)
    return bool(named or nearest(text, SHORT_NAMES))
