"""GeoExPLoRA: parameter-efficient extended pre-training of vision transformers for satellite imagery.

Names are imported on first use, so that importing the package, and starting its command line, imports no torch. Its
models are known to timm from then on, whichever of the two is imported first.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from geoexplora.timm_hook import register_with_timm

if TYPE_CHECKING:
    from geoexplora.datamodules import FMoWRGBDataModule, FMoWSentinelDataModule, PhotographsDataModule
    from geoexplora.datasets import FMoWRGB, FMoWSentinel, Photographs
    from geoexplora.explora import ExploraConfig, apply_explora, load_adapter, merge_lora, save_adapter
    from geoexplora.models import GroupChannelVisionTransformer, MaskedAutoencoder
    from geoexplora.tasks.exporting import export_encoder
    from geoexplora.tasks.finetune.exports import load_finetuned
    from geoexplora.transforms import Normalization
    from geoexplora.weights.load import build_encoder, load_encoder
    from geoexplora.weights.spec import EncoderSpec

__version__ = "0.1.0"

_HOMES = {
    "geoexplora.datamodules": ("FMoWRGBDataModule", "FMoWSentinelDataModule", "PhotographsDataModule"),
    "geoexplora.datasets": ("FMoWRGB", "FMoWSentinel", "Photographs"),
    "geoexplora.explora": ("ExploraConfig", "apply_explora", "load_adapter", "merge_lora", "save_adapter"),
    "geoexplora.models": ("GroupChannelVisionTransformer", "MaskedAutoencoder"),
    "geoexplora.tasks.exporting": ("export_encoder",),
    "geoexplora.tasks.finetune.exports": ("load_finetuned",),
    "geoexplora.transforms": ("Normalization",),
    "geoexplora.weights.load": ("build_encoder", "load_encoder"),
    "geoexplora.weights.spec": ("EncoderSpec",),
}

__all__ = [
    "EncoderSpec",
    "ExploraConfig",
    "FMoWRGB",
    "FMoWRGBDataModule",
    "FMoWSentinel",
    "FMoWSentinelDataModule",
    "GroupChannelVisionTransformer",
    "MaskedAutoencoder",
    "Normalization",
    "Photographs",
    "PhotographsDataModule",
    "apply_explora",
    "build_encoder",
    "export_encoder",
    "load_adapter",
    "load_encoder",
    "load_finetuned",
    "merge_lora",
    "save_adapter",
]


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_with_timm()
