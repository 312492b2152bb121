"""Weights: reading, converting, reporting, writing. Names are imported on first use, so that this imports no torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from geoexplora.weights.contract import Allowed
    from geoexplora.weights.files import read_weights
    from geoexplora.weights.load import build_encoder, load_decoder_into, load_encoder, load_into
    from geoexplora.weights.report import LoadReport
    from geoexplora.weights.source_weights import SourceWeights
    from geoexplora.weights.spec import EncoderSpec
    from geoexplora.weights.write import save_encoder

_HOMES = {
    "contract": ("Allowed",),
    "files": ("read_weights",),
    "load": ("build_encoder", "load_decoder_into", "load_encoder", "load_into"),
    "report": ("LoadReport",),
    "source_weights": ("SourceWeights",),
    "spec": ("EncoderSpec",),
    "write": ("save_encoder",),
}

__all__ = [
    "Allowed",
    "EncoderSpec",
    "LoadReport",
    "SourceWeights",
    "build_encoder",
    "load_decoder_into",
    "load_encoder",
    "load_into",
    "read_weights",
    "save_encoder",
]


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
