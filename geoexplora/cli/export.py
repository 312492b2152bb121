"""``geoexplora export``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from geoexplora.cli import checks
from geoexplora.cli.command import Command, Finding
from geoexplora.cli.options import Options
from geoexplora.cli.values import path, setting, source
from geoexplora.weights.exports.targets import TARGETS, objections


@dataclass(frozen=True, kw_only=True)
class ExportOptions(Options):
    """What to export.

    Attributes:
        init: a run folder, a weights file or whatever else pretrain takes, or the adapter of a run.
        format: who shall read it: timm, TorchGeo's tasks, transformers' Dinov2Model, MAE's and SatMAE's scripts, this
            package, or onnxruntime.
        output: file or folder to write; must not exist yet.
        base: the weights that an adapter was trained on; only for adapters.
        task: TorchGeo's task that the weights are for, by its DPT if it is segmentation
            (none: classification); only for torchgeo.
        dtype: type of the stored weights.
    """

    init: str | None = setting(None, "SOURCE", source, positional=True)
    format: Literal["timm", "torchgeo", "hf-dinov2", "satmae", "safetensors", "onnx"] | None = setting(
        None, "|".join(TARGETS), required=True
    )
    output: str | None = setting(None, "PATH", path, required=True)
    base: str | None = setting(None, "FILE", source)
    task: Literal["classification", "segmentation"] | None = setting(None, "classification|segmentation")
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"


def _named(options: ExportOptions) -> Iterator[Finding]:
    if options.init is None:
        yield Finding(("init",), "nothing to export. Name a run folder, a weights file or an adapter.", "unready")
    else:
        yield from checks.positional_exists(options)


def _possible(options: ExportOptions) -> Iterator[Finding]:
    if options.format is None:
        yield Finding(("format",), f"--format is missing. Name one of: {', '.join(TARGETS)}.", "unready")
    if options.output is None:
        wanted = TARGETS[options.format].wanted if options.format else "the file or folder to write"
        yield Finding(("output",), f"--output is missing. Name {wanted}.", "unready")
    if options.format is not None and options.output is not None:
        for objection in objections(options.format, options.output, options.task, options.dtype):
            yield Finding((objection.key,), f"--{objection.key}: {objection.problem}. {objection.remedy}")


def run(options: ExportOptions) -> int:
    """Export."""
    from geoexplora.tasks.exporting import export_encoder

    assert options.init is not None and options.format is not None and options.output is not None
    done = export_encoder(
        options.init, options.format, options.output, base=options.base, task=options.task, dtype=options.dtype
    )
    spec = done.content.spec
    size = sum(done.files.values()) / 1e6
    lines = [
        f"{done.path}: {spec.model} as {options.format}, {options.dtype}, {len(done.files)} file(s), {size:,.1f} MB",
        f"read back by {done.library}: outputs differ by at most {done.difference:.1e} of the largest",
        f"input: {len(spec.bands)} bands ({', '.join(spec.bands)}), {spec.image_size} px, normalization"
        f" {spec.normalization.get('method', 'not known')}",
        f"load: {done.usage}",
    ]
    if done.without_decoder:
        lines.insert(1, f"left out: the source's decoder, for which weights of format {options.format} have no place")
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


COMMAND = Command(
    name="export",
    description=(
        "Write an encoder, merged and plain, for another library, and check it: it is loaded there and must give the\n"
        "same outputs."
    ),
    usage="SOURCE --format FORMAT --output PATH [--base FILE] [options]",
    options=ExportOptions,
    run=run,
    checks={_named: ("init",), _possible: ("format", "output", "task", "dtype")},
    examples=(
        "export runs/a --format timm --output exports/a",
        "export runs/a --format torchgeo --task segmentation --output a.ckpt",
        "export runs/a/adapter --base mae_visualize_vit_large.pth --format safetensors --output a.safetensors",
        "export dinov2-vitl14 --format onnx --output dinov2.onnx",
    ),
)
