"""Reading weights files: what format a file has is recognised from its keys and header, never from its name."""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import pickle
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from geoexplora.errors import WeightsError
from geoexplora.weights.meta_mae import read_meta_mae, recognises_meta_mae
from geoexplora.weights.spec import EncoderSpec
from geoexplora.weights.write import is_decoder

log = logging.getLogger(__name__)

ENCODER_FILE = "encoder.safetensors"
DECODER_FILE = "decoder.safetensors"


@dataclass(frozen=True)
class SourceWeights:
    """Weights read from a file or run folder, under canonical names.

    Attributes:
        path: the file, or the encoder's file of a run folder.
        format: what was recognised: ``geoexplora`` or ``meta-mae``.
        sha256: digest of the file (of the encoder's file).
        spec: what the encoder is; None where the file does not tell.
        tensors: encoder tensors under timm's names; decoder tensors, if any, under Meta's (``decoder_*``,
            ``mask_token``).
        decoder: the decoder's settings, if it has one: width, depth, and what else is known.
        step: the optimizer step the weights were taken at, if known.
    """

    path: Path
    format: str
    sha256: str
    spec: EncoderSpec | None
    tensors: Mapping[str, Tensor]
    decoder: Mapping[str, Any] | None = None
    step: int | None = None

    @property
    def encoder_tensors(self) -> dict[str, Tensor]:
        """The encoder's part of ``tensors``."""
        return {name: value for name, value in self.tensors.items() if not is_decoder(name)}

    @property
    def decoder_tensors(self) -> dict[str, Tensor]:
        """The decoder's part of ``tensors``."""
        return {name: value for name, value in self.tensors.items() if is_decoder(name)}

    def record(self) -> dict[str, Any]:
        """Where the weights come from, for run.json and the header of what is made from them.

        The file's name stands for its path, so that the record is the same wherever it is made.
        """
        at = self.path
        name = f"{at.parent.name}/{at.name}" if at.name == ENCODER_FILE and at.parent.name else at.name
        return {"name": name, "sha256": self.sha256, "format": self.format}


@dataclass(frozen=True)
class Opened:
    """A file's content before its format is known.

    Attributes:
        path: the file.
        content: tensors by key, and for pickled files whatever else stands there, nested as it is.
        metadata: a safetensors header; empty for other files.
    """

    path: Path
    content: Mapping[str, Any]
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Read:
    """What a reader makes of a file: see the attributes of the same names of :class:`SourceWeights`."""

    spec: EncoderSpec | None
    tensors: Mapping[str, Tensor]
    decoder: Mapping[str, Any] | None = None
    step: int | None = None


def read_weights(path: str | Path) -> SourceWeights:
    """Read a weights file or the weights of a run folder.

    Args:
        path: our ``encoder.safetensors`` (alone), a run folder (with its ``decoder.safetensors`` if there is one), or
            Meta's ``mae_pretrain_vit_*.pth`` / ``mae_visualize_vit_*.pth``.

    Returns:
        The weights, on the CPU.

    Raises:
        WeightsError: if it is missing, damaged, needs code to run, or is of no known format.
    """
    path = Path(path)
    if not path.is_dir():
        return _read_file(path)
    if not (path / ENCODER_FILE).is_file():
        raise WeightsError(
            f"{path} has no {ENCODER_FILE}",
            "Name a weights file or a run folder; a run gets its encoder with its first checkpoint.",
        )
    encoder = _read_file(path / ENCODER_FILE)
    if not (path / DECODER_FILE).is_file():
        return encoder
    decoder = _read_file(path / DECODER_FILE)
    if encoder.step != decoder.step:
        log.warning("%s: encoder of step %s beside decoder of step %s", path, encoder.step, decoder.step)
    return SourceWeights(
        encoder.path, encoder.format, encoder.sha256, encoder.spec,
        {**encoder.tensors, **decoder.tensors}, decoder.decoder, encoder.step,
    )  # fmt: skip


def _read_file(path: Path) -> SourceWeights:
    opened = open_file(path)
    known = recognise(opened)
    read = known.read(opened)
    return SourceWeights(path, known.name, sha256(path), read.spec, read.tensors, read.decoder, read.step)


@dataclass(frozen=True)
class Format:
    """A known format.

    Attributes:
        name: its name in reports.
        description: what it is, for messages.
        recognises: whether a file is of this format.
        read: turns the file's content into canonical names.
    """

    name: str
    description: str
    recognises: Callable[[Opened], bool]
    read: Callable[[Opened], Read]


def _read_own(opened: Opened) -> Read:
    spec = EncoderSpec.from_metadata(opened.metadata)
    decoder = opened.metadata.get("decoder")
    step = opened.metadata.get("step")
    try:
        settings = None if decoder is None else dict(json.loads(decoder))
        return Read(spec, opened.content, settings, None if step is None else int(step))
    except (ValueError, TypeError) as problem:
        raise WeightsError(f"{opened.path}: damaged header ({problem})", "Take another copy of the file.") from problem


def _read_mae(opened: Opened) -> Read:
    return Read(*read_meta_mae(opened.path, opened.content["model"]))


FORMATS: tuple[Format, ...] = (
    Format(
        "geoexplora", "encoder.safetensors of this package", lambda opened: "geoexplora" in opened.metadata, _read_own
    ),
    Format(
        "meta-mae",
        "Meta's mae_pretrain_vit_*.pth and mae_visualize_vit_*.pth",
        lambda opened: recognises_meta_mae(opened.content),
        _read_mae,
    ),
)
"""Known formats; the first that recognises a file reads it."""


def recognise(opened: Opened) -> Format:
    """The format of a file.

    Raises:
        WeightsError: if it is of none; names the file's first keys and the known formats.
    """
    for known in FORMATS:
        if known.recognises(opened):
            return known
    keys = [str(key) for key in list(opened.content)[:5]]
    raise WeightsError(
        f"{opened.path} is of no known format; its first keys are: {', '.join(keys) or 'none'}",
        f"Known: {'; '.join(known.description for known in FORMATS)}; or a run folder.",
    )


def open_file(path: Path) -> Opened:
    """Read a safetensors or pickled file without running any code in it.

    Raises:
        WeightsError: if it is missing, damaged, or could only be read by running its code.
    """
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as problem:
        raise WeightsError(f"cannot read {path}: {problem.strerror}", "Check the path given by --init.") from problem
    if start[8:9] == b"{":
        return _open_safetensors(path)
    if not start.startswith((b"PK", b"\x80")):  # a zip archive, or torch's older pickles
        raise _damaged(path, "it starts like no format of weights")
    return _open_pickle(path)


def _open_safetensors(path: Path) -> Opened:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            return Opened(path, {name: file.get_tensor(name) for name in file.keys()}, metadata)  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as problem:
        raise WeightsError(f"{path} is damaged: {problem}", "Take or download another copy of the file.") from problem


def _open_pickle(path: Path) -> Opened:
    try:
        # Training checkpoints of MAE and its descendants keep their command line as a Namespace, which is harmless
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as problem:
        if "weights_only" not in str(problem).lower():
            raise _damaged(path, problem) from problem
        raise WeightsError(
            f"{path} could only be read by running code stored in it, which is refused: {_first_line(problem)}",
            "If you trust it, load it yourself and save its state dict with safetensors.torch.save_file.",
        ) from problem
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError, SafetensorError) as problem:
        raise _damaged(path, problem) from problem
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds a {type(content).__name__}, not a state dict", "Name a weights file.")
    return Opened(path, content)


def _damaged(path: Path, problem: Exception | str) -> WeightsError:
    reason = problem if isinstance(problem, str) else _first_line(problem)
    return WeightsError(
        f"{path} is not a weights file, or is truncated or damaged: {reason}",
        "Compare its size with the original and take or download another copy.",
    )


def _first_line(problem: Exception) -> str:
    return (str(problem) or type(problem).__name__).splitlines()[0]


def sha256(path: Path) -> str:
    """The hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
