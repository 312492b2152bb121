"""Opening weights files and folders without running any code in them.

Tensors are mapped from the file: only what is used is ever read.
"""

from __future__ import annotations

import argparse
import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from geoexplora.errors import WeightsError

HUB_CONFIG = "config.json"
_SAFETENSORS, _INDEX, _PICKLE = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"


@dataclass(frozen=True)
class Opened:
    """What a file or folder holds before its format is known.

    Attributes:
        path: the file; of a folder the first weights file.
        content: tensors by key, and for pickled files whatever else stands there, nested as it is.
        metadata: a safetensors header; empty for other files.
        config: a Hugging Face folder's config.json, with its preprocessor_config.json under ``preprocessor``.
        files: all files that hold tensors.
    """

    path: Path
    content: Mapping[str, Any]
    metadata: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    files: tuple[Path, ...] = ()


def is_hub_folder(folder: Path) -> bool:
    """Whether a folder is a model as Hugging Face's libraries (transformers, timm) save it."""
    return (folder / HUB_CONFIG).is_file() and any(
        (folder / name).is_file() for name in (_SAFETENSORS, _INDEX, _PICKLE)
    )


def open_hub_folder(folder: Path) -> Opened:
    """Open a Hugging Face folder: config.json beside model.safetensors, its shards, or pytorch_model.bin.

    Raises:
        WeightsError: if a file is missing or damaged.
    """
    config = _read_json(folder / HUB_CONFIG)
    if (folder / "preprocessor_config.json").is_file():
        config["preprocessor"] = _read_json(folder / "preprocessor_config.json")
    if (folder / _SAFETENSORS).is_file():
        names = [_SAFETENSORS]
    elif (folder / _INDEX).is_file():
        names = sorted(set(_read_json(folder / _INDEX).get("weight_map", {}).values()))
        if not names or any(Path(name).name != name for name in names):  # an index may name no file elsewhere
            raise _damaged(folder / _INDEX, "it names no weights files beside it")
    else:
        names = [_PICKLE]
    parts = [open_file(folder / name) for name in names]
    content = {key: value for part in parts for key, value in part.content.items()}
    return Opened(parts[0].path, content, parts[0].metadata, config, tuple(part.path for part in parts))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as problem:
        raise WeightsError(
            f"cannot read {path}: {problem}", "Take or download another copy of the folder."
        ) from problem


def open_file(path: Path) -> Opened:
    """Read a safetensors or pickled file without running any code in it.

    Raises:
        WeightsError: if it is missing, damaged, or could only be read by running its code.
    """
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as problem:
        raise WeightsError(f"cannot read {path}: {problem.strerror}", "Check the path.") from problem
    if start[8:9] == b"{":
        return _open_safetensors(path)
    if path.suffix == ".onnx":
        raise WeightsError(f"{path} is a graph of ONNX, from which no weights are read", "Name what it was made from.")
    if not start.startswith((b"PK", b"\x80")):  # a zip archive, or torch's older pickles
        raise _damaged(path, "it starts like no format of weights")
    return _open_pickle(path)


def _open_safetensors(path: Path) -> Opened:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            content = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return Opened(path, content, metadata, files=(path,))
    except (SafetensorError, OSError, ValueError) as problem:
        raise WeightsError(f"{path} is damaged: {problem}", "Take or download another copy of the file.") from problem


def _open_pickle(path: Path) -> Opened:
    try:
        # Training checkpoints of MAE and its descendants keep their command line as a Namespace, which is harmless
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings(action="ignore"):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as problem:
        if "weights_only" not in str(problem).lower():
            raise _damaged(path, problem) from problem
        code = re.search(r"GLOBAL ([\w.]+)", str(problem))
        named = f" ({code[1]})" if code else ""
        raise WeightsError(
            f"{path} could only be read by running code stored in it{named}, which is refused",
            "If you trust it, load it yourself and save its state dict with safetensors.torch.save_file.",
        ) from problem
    except Exception as problem:  # a damaged pickle is a damaged program: it may fail in any way
        raise _damaged(path, problem) from problem
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds a {type(content).__name__}, not a state dict", "Name a weights file.")
    return Opened(path, content, files=(path,))


def _damaged(path: Path, problem: Exception | str) -> WeightsError:
    reason = problem if isinstance(problem, str) else _first_line(problem)
    return WeightsError(
        f"{path} is not a weights file, or is truncated or damaged: {reason}",
        "Compare its size with the original and take or download another copy.",
    )


def _first_line(problem: Exception) -> str:
    return (str(problem) or type(problem).__name__).splitlines()[0]
