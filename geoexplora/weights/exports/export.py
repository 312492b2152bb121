"""Exporting encoders for other libraries: written, read back there, compared, and only then put in place.

Shapes: B batch, C bands, S image side.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from geoexplora.errors import ConfigError, RunError, WeightsError
from geoexplora.registry import look_up
from geoexplora.weights.atomic import operating_system_error, write_failure
from geoexplora.weights.exports.base import Content, Exporter, vit_outputs
from geoexplora.weights.exports.hub import HubExporter
from geoexplora.weights.exports.onnx import OnnxExporter
from geoexplora.weights.exports.satmae import SatMAEExporter
from geoexplora.weights.exports.targets import TARGETS, Dtype, Format, Task, objections
from geoexplora.weights.exports.timm import SafetensorsExporter, TimmExporter
from geoexplora.weights.exports.torchgeo import TorchGeoExporter
from geoexplora.weights.write import not_finite

LARGEST_DIFFERENCE = 1e-5
"""Of outputs, relative to the largest of them, in single precision."""

_ROUNDING_ERRORS = 10
"""How many times its own rounding error another implementation may be off, where that is more than the above."""
_CHECKED_IMAGES = 2


@dataclass(frozen=True)
class Export:
    """What was exported.

    Attributes:
        path: the file or folder.
        files: its files and their sizes in bytes.
        content: what was written.
        library: who read it back.
        difference: the largest difference of outputs found by that, relative to the largest output.
        usage: the Python line that loads it.
        without_decoder: whether the source has a decoder, which the format does not hold.
    """

    path: Path
    files: Mapping[Path, int]
    content: Content
    library: str
    difference: float
    usage: str
    without_decoder: bool = False


def export(
    content: Content, form: Format, output: str | Path, *, task: Task | None = None, dtype: Dtype = "float32"
) -> Export:
    """Export an encoder, whole or not at all.

    Args:
        content: the encoder, in single precision.
        form: the format, a name in ``TARGETS``.
        output: the file to write, or a folder for it; the file must not exist yet, nor a folder of several files.
        task: TorchGeo's task that the weights are for, ``classification`` by default; only with ``torchgeo``.
        dtype: type of the stored weights.

    Returns:
        What was exported.

    Raises:
        ConfigError: if the format is unknown, or does not go with the output, task or type.
        WeightsError: if the format cannot hold the encoder, a library is missing, or the weights do not give the
            same outputs once they are read back; nothing is written then.
        RunError: if the output cannot be written.
    """
    check_request(form, output, task, dtype)
    exporter = _exporter(form, task)
    prepared = exporter.prepare(content)
    path = TARGETS[form].place(Path(output))
    with torch.inference_mode():
        image = _image(prepared)
        expected = vit_outputs(content.build(), image, content.spec.pool)
        reference = content
        if dtype != "float32":  # what is stored cannot give the same outputs, but what is rounded must
            _require(
                output, expected, vit_outputs(prepared.build(), image, prepared.spec.pool), content, "this package"
            )
            prepared = reference = _rounded(prepared, getattr(torch, dtype))
            expected = vit_outputs(reference.build(), image, reference.spec.pool)
    with _staged(path) as written:
        with _telling(path):
            exporter.write(prepared, written)
        with torch.inference_mode():
            got = exporter.outputs(prepared, written, image)
            difference = _require(output, expected, got, reference, exporter.library)
    return Export(
        path,
        {file: file.stat().st_size for file in _files(path)},
        prepared,
        exporter.library,
        difference,
        exporter.usage(prepared, path),
        without_decoder=bool(content.decoder) and not exporter.holds_decoder,
    )


def check_request(form: Format, output: str | Path, task: Task | None, dtype: Dtype) -> None:
    """Check what shows without the weights.

    Args:
        form: the format.
        output: where to write.
        task: TorchGeo's task.
        dtype: type of the stored weights.

    Raises:
        ConfigError: if the format is unknown, or does not go with the others.
    """
    look_up("format", form, TARGETS)
    for objection in objections(form, output, task, dtype):
        raise ConfigError(objection.problem, objection.remedy)


def _require(
    output: str | Path, expected: Mapping[str, Tensor], got: Mapping[str, Tensor], reference: Content, library: str
) -> float:
    """The largest difference of outputs.

    Raises:
        WeightsError: if it is more than rounding explains.
    """
    difference, limit = largest_difference(expected, got), LARGEST_DIFFERENCE
    if not difference <= limit:
        limit = max(limit, _ROUNDING_ERRORS * _rounding_error(reference, _image(reference), expected))
    if not difference <= limit:
        raise WeightsError(
            f"{output} is not written: read back by {library}, it gives outputs that differ by {difference:.2g} of the"
            f" largest, more than {limit:.0e}",
            f"Please report this, with the versions of geoexplora, torch and {library}.",
        )
    return difference


def largest_difference(expected: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> float:
    """The largest difference of outputs, relative to the largest output of that name.

    Args:
        expected: what they should be, by name.
        got: what they are; names may lack.

    Returns:
        Infinity if nothing can be compared; NaN if a value is not a number.
    """
    shared = expected.keys() & got.keys()
    if not shared or any(expected[name].shape != got[name].shape for name in shared):
        return float("inf")
    each = [(expected[name] - got[name]).abs().max() / expected[name].abs().max() for name in sorted(shared)]
    return float(torch.stack(each).max())


def _rounding_error(content: Content, image: Tensor, outputs: Mapping[str, Tensor]) -> float:
    """How far outputs are from those in double precision; very deep or badly scaled encoders amplify rounding."""
    with torch.inference_mode():
        exact = vit_outputs(content.build().double(), image.double(), content.spec.pool)
    return largest_difference(exact, outputs)


def _exporter(form: Format, task: Task | None) -> Exporter:
    match form:
        case "timm":
            return TimmExporter()
        case "torchgeo":
            return TorchGeoExporter(segmentation=task == "segmentation")
        case "hf-dinov2":
            return HubExporter()
        case "satmae":
            return SatMAEExporter()
        case "onnx":
            return OnnxExporter()
        case "safetensors":
            return SafetensorsExporter()


def _rounded(content: Content, dtype: torch.dtype) -> Content:
    rounded = content.to(dtype)
    if bad := not_finite({**rounded.tensors, **rounded.decoder}):
        raise WeightsError(
            f"{len(bad)} tensors hold values beyond the range of {str(dtype).removeprefix('torch.')}, such as {bad[0]}",
            "Use --dtype bfloat16 or float32.",
        )
    return rounded


def _image(content: Content) -> Tensor:
    """Random images (B, C, S, S), always the same."""
    size = content.spec.image_size
    generator = torch.Generator().manual_seed(0)
    return torch.randn(_CHECKED_IMAGES, len(content.spec.bands), size, size, generator=generator)


@contextmanager
def _staged(output: Path) -> Iterator[Path]:
    """A path in a folder beside ``output``; what was written there is put in place at the end, whole or not at all.

    Unlike a temporary file's, its name is the final one: ONNX files name the one that holds their weights.
    """
    final = Path(os.path.abspath(output))  # noqa: PTH100  (resolve would follow a link)
    folder = final.with_name(f".{final.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with _telling(output):
            folder.mkdir(parents=True)
        yield folder / final.name
        with _telling(output):
            for file in _files(folder):
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
            for part in sorted(folder.iterdir(), key=lambda part: part.name == final.name):
                part.replace(final.with_name(part.name))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _telling(output: Path) -> Iterator[None]:
    """Turn failures of the file system into the error to raise."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError, RunError) as problem:
        cause = operating_system_error(problem)
        if cause is None:
            raise
        raise write_failure(output, cause, resumable=False) from problem


def _files(path: Path) -> list[Path]:
    """The files of an export: all of a folder, or one file and that of its weights."""
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file())
    return [file for file in (path, path.with_name(f"{path.name}.data")) if file.is_file()]
