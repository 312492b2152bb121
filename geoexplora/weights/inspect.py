"""Saying what weights or a run are, without building a model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from geoexplora.errors import WeightsError
from geoexplora.weights.files import read_weights
from geoexplora.weights.source_weights import ENCODER_FILE, SourceWeights
from geoexplora.weights.spec import EncoderSpec
from geoexplora.weights.write import is_decoder

RUN_RECORD = "run.json"


def describe(source: str | Path, *, tensors: bool = False) -> dict[str, Any]:
    """Describe weights or a run folder.

    Args:
        source: what ``read_weights`` takes, or a run folder without weights yet.
        tensors: also list every tensor with its shape and type.

    Returns:
        Plain JSON types: ``path``, ``kind`` (``file`` or ``run``), ``weights`` (None for a run without a checkpoint
        yet) and for a run ``run``, what run.json holds (source, trained parts, final metrics, ...), and ``files`` with
        their sizes. For ``weights`` see ``describe_weights``.

    Raises:
        WeightsError: if it is missing, damaged, of no known format, or a folder that holds neither.
    """
    path = Path(source)
    record = _record(path / RUN_RECORD) if path.is_dir() else None
    if record is None and not (path / ENCODER_FILE).is_file():
        weights = read_weights(source)
        return {"path": str(source), "kind": "file", "weights": describe_weights(weights, tensors)}
    has_encoder = (path / ENCODER_FILE).is_file()
    return {
        "path": str(path),
        "kind": "run",
        "weights": describe_weights(read_weights(path), tensors) if has_encoder else None,
        "run": record or {},
        "files": {
            file.relative_to(path).as_posix(): file.stat().st_size
            for file in sorted(path.rglob("*"))
            if file.is_file() and not file.name.startswith(".")
        },
    }


def describe_weights(source: SourceWeights, listed: bool) -> dict[str, Any]:
    """Describe weights.

    Args:
        source: the weights.
        listed: also list every tensor.

    Returns:
        Plain JSON types: ``format``, ``sha256``, ``bytes``, ``step``, where it was fetched from (``address``),
        ``licence``, ``place`` (wrapper and prefix in the file), ``encoder`` and ``decoder`` (their descriptions, or
        None), ``undescribed`` (why there is none), ``assumed``, ``converted`` and ``left_out`` (see
        ``SourceWeights``), ``trained`` (counts by part, if known), ``values`` (how many the encoder and decoder have),
        ``dtypes`` (how many of each type) and, if asked for, ``tensors``.
    """
    described: dict[str, Any] = {
        "format": source.format,
        "sha256": source.sha256,
        "bytes": sum(path.stat().st_size for path in source.files),
        "step": source.step,
        "address": source.address,
        "licence": source.licence,
        "place": source.place,
        "encoder": None if source.spec is None else describe_encoder(source.spec),
        "decoder": None if source.decoder is None else dict(source.decoder),
        "undescribed": source.undescribed,
        "assumed": list(source.assumed),
        "converted": dict(source.converted),
        "left_out": dict(source.left_out),
        "trained": source.trained,
    }
    return described | count_tensors(source.tensors, listed)


def describe_encoder(spec: EncoderSpec) -> dict[str, Any]:
    """A description in plain JSON types; of the style only what is not as in a plain ViT."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(spec) | {"style": spec.style.to_dict()}))
    return plain


def count_tensors(tensors: Mapping[str, Tensor], listed: bool) -> dict[str, Any]:
    """``values``, ``dtypes`` and, if asked for, ``tensors`` of ``describe_weights``."""
    values: dict[str, int] = {}
    dtypes: dict[str, int] = {}
    for name, tensor in tensors.items():
        part = "decoder" if is_decoder(name) else "encoder"
        values[part] = values.get(part, 0) + tensor.numel()
        dtypes[_dtype(tensor)] = dtypes.get(_dtype(tensor), 0) + tensor.numel()
    counted: dict[str, Any] = {"values": values, "dtypes": dtypes}
    if listed:
        counted["tensors"] = {
            name: {"shape": list(tensor.shape), "dtype": _dtype(tensor)} for name, tensor in tensors.items()
        }
    return counted


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _record(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as problem:
        raise WeightsError(f"cannot read {path}: {problem}", "Remove it to see the weights alone.") from problem
