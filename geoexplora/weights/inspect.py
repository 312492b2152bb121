"""Saying what a weights file or a run is, without building a model."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from geoexplora.errors import WeightsError
from geoexplora.weights.files import ENCODER_FILE, SourceWeights, read_weights
from geoexplora.weights.write import is_decoder

RUN_RECORD = "run.json"


def describe(path: str | Path, *, tensors: bool = False) -> dict[str, Any]:
    """Describe a weights file or a run folder.

    Args:
        path: a file of a known format, or a run folder.
        tensors: also list every tensor with its shape and type.

    Returns:
        Plain JSON types: ``path``, ``kind`` (``file`` or ``run``), ``weights`` (None for a run without a checkpoint
        yet) and for a run ``run``, what run.json holds (source, trained parts, final metrics, ...), and ``files`` with
        their sizes. ``weights`` holds ``format``, ``sha256``, ``bytes``, ``step``, ``encoder`` and ``decoder`` (their
        descriptions, or None), ``values`` (how many the encoder and decoder have), ``dtypes`` (how many of each type)
        and, if asked for, ``tensors``.

    Raises:
        WeightsError: if it is missing, damaged, of no known format, or a folder that holds no run.
    """
    path = Path(path)
    if not path.is_dir():
        return {"path": str(path), "kind": "file", "weights": _weights(read_weights(path), tensors)}
    record = _record(path / RUN_RECORD)
    if record is None and not (path / ENCODER_FILE).is_file():
        raise WeightsError(
            f"{path} holds neither {RUN_RECORD} nor {ENCODER_FILE}",
            "Name a weights file, or a folder that geoexplora pretrain --output made.",
        )
    has_encoder = (path / ENCODER_FILE).is_file()
    return {
        "path": str(path),
        "kind": "run",
        "weights": _weights(read_weights(path), tensors) if has_encoder else None,
        "run": record or {},
        "files": {
            file.relative_to(path).as_posix(): file.stat().st_size
            for file in sorted(path.rglob("*"))
            if file.is_file() and not file.name.startswith(".")
        },
    }


def _weights(source: SourceWeights, listed: bool) -> dict[str, Any]:
    values: dict[str, int] = {}
    dtypes: dict[str, int] = {}
    for name, tensor in source.tensors.items():
        part = "decoder" if is_decoder(name) else "encoder"
        values[part] = values.get(part, 0) + tensor.numel()
        dtypes[_dtype(tensor)] = dtypes.get(_dtype(tensor), 0) + tensor.numel()
    described: dict[str, Any] = {
        "format": source.format,
        "sha256": source.sha256,
        "bytes": source.path.stat().st_size,
        "step": source.step,
        "encoder": None if source.spec is None else json.loads(json.dumps(asdict(source.spec))),
        "decoder": None if source.decoder is None else dict(source.decoder),
        "values": values,
        "dtypes": dtypes,
    }
    if listed:
        described["tensors"] = {
            name: {"shape": list(tensor.shape), "dtype": _dtype(tensor)} for name, tensor in source.tensors.items()
        }
    return described


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _record(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as problem:
        raise WeightsError(f"cannot read {path}: {problem}", "Remove it to see the weights alone.") from problem
