"""Weights as they were read."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from geoexplora.errors import WeightsError
from geoexplora.weights.spec import EncoderSpec
from geoexplora.weights.write import is_decoder

ENCODER_FILE = "encoder.safetensors"


@dataclass(frozen=True)
class SourceWeights:
    """Weights read from a file or folder, under canonical names.

    Attributes:
        path: the file; the encoder's file of a run folder, the first of a Hugging Face folder.
        format: what was recognised: ``geoexplora``, or a name in ``geoexplora.weights.formats.FORMATS``.
        spec: what the encoder is; None where the file does not tell.
        tensors: encoder tensors under timm's names; decoder tensors, if any, under Meta's (``decoder_*``,
            ``mask_token``). They are mapped from the file: change copies only.
        decoder: the decoder's settings, if it has one: width, depth, and what else is known.
        step: the optimizer step the weights were taken at, if known.
        trained: which parts were trained, as ``geoexplora.explora.table_to_json`` gives them, if known.
        name: what the user called it: the file's name, an address, a shortcut, an enum.
        address: where it was fetched from; None for local files.
        licence: of the weights, where it is known.
        place: wrapper and prefix that the tensors stood behind in the file, such as ``teacher.backbone.``.
        converted: tensors that were made of others under the file's own names, with how.
        left_out: the file's tensors that belong neither to encoder nor to decoder, with why.
        assumed: what the description takes for granted because the file does not tell.
        undescribed: why there is no description.
        told: whether the file itself tells bands and normalization, as all that this package writes does.
        files: all files that were read.
        mask_token: what stands for hidden patches in DINOv2's objective, D values of any shape, if it is there.
        heads_file: where a run of this package keeps its mask token and projection heads.
    """

    path: Path
    format: str
    spec: EncoderSpec | None
    tensors: Mapping[str, Tensor]
    decoder: Mapping[str, Any] | None = None
    step: int | None = None
    trained: Any = None
    name: str = ""
    address: str | None = None
    licence: str | None = None
    place: str = ""
    converted: Mapping[str, str] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    assumed: tuple[str, ...] = ()
    undescribed: str = ""
    told: bool = False
    files: tuple[Path, ...] = ()
    mask_token: Tensor | None = None
    heads_file: Path | None = None

    @cached_property
    def sha256(self) -> str:
        """Digest of the file (of the encoder's file of a run; of the digests of several files)."""
        digests = [sha256(path) for path in self.files or (self.path,)]
        return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()

    @property
    def encoder_tensors(self) -> dict[str, Tensor]:
        """The encoder's part of ``tensors``."""
        return {name: value for name, value in self.tensors.items() if not is_decoder(name)}

    @property
    def decoder_tensors(self) -> dict[str, Tensor]:
        """The decoder's part of ``tensors``."""
        return {name: value for name, value in self.tensors.items() if is_decoder(name)}

    def described(self) -> EncoderSpec:
        """The description.

        Raises:
            WeightsError: if the file does not tell.
        """
        if self.spec is None:
            raise WeightsError(*self.undescribed.split("\n", 1))
        return self.spec

    def record(self) -> dict[str, Any]:
        """Where the weights come from, for run.json and the header of what is made from them.

        The file's name stands for its path, so that the record is the same wherever it is made.
        """
        at = self.path
        name = f"{at.parent.name}/{at.name}" if at.name == ENCODER_FILE and at.parent.name else self.name or at.name
        return {"name": name, "sha256": self.sha256, "format": self.format}


def sha256(path: Path) -> str:
    """The hexadecimal SHA-256 of a file.

    Raises:
        WeightsError: if it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as problem:
        raise WeightsError(f"cannot read {path}: {problem.strerror}", "Check the path.") from problem
