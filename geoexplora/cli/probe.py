"""``geoexplora probe``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from geoexplora.cli import checks
from geoexplora.cli.command import Check, Command, Finding
from geoexplora.cli.options import DataOptions, DeviceOptions, FMoWRGBOptions, Options
from geoexplora.cli.values import names, path, setting, source


@dataclass(frozen=True, kw_only=True)
class EncoderOptions(Options):
    """Encoder.

    Attributes:
        init: encoder to probe: a run folder or a weights file, or all else that pretrain takes.
        bands: input bands, by name (none: those the encoder was trained with).
        image_size: side of the square input, in pixels (none: as the encoder was trained).
        pool: feature of an image: the mean of its patch tokens, or the class token.
        batch_size: images in one forward pass.
    """

    init: str | None = setting(None, "SOURCE", source, required=True)
    bands: tuple[str, ...] | None = setting(None, "B,B,...", names, expects="band names such as B2,B3,B4")
    image_size: int | None = setting(None, "PIXELS")
    pool: Literal["mean", "cls"] = "mean"
    batch_size: int = setting(256, "IMAGES")


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions(Options):
    """Evaluation.

    Attributes:
        holdout: test on the dataset's own validation split, or leave locations out in turn.
        k: neighbours of the kNN classifier.
        few_shot: labels of each class to learn from (none: all).
        seed: seed of the few labels drawn and of the linear classifier.
        output: folder to write probe.json into (none: only show the result).
    """

    holdout: Literal["split", "location"] = "split"
    k: int = setting(20, "N")
    few_shot: int | None = setting(None, "N")
    seed: int = setting(0, "N")
    output: str | None = setting(None, "DIR", path)


@dataclass(frozen=True, kw_only=True)
class ProbeOptions(DeviceOptions, EvaluationOptions, EncoderOptions, FMoWRGBOptions, DataOptions):
    """Settings of ``geoexplora probe``; the base classes hold them, by group."""


def _encoder(options: ProbeOptions) -> Iterator[Finding]:
    if options.init is None:
        yield Finding(("init",), "--init is missing. Name the encoder to probe: a weights file or a run.", "unready")
    else:
        yield from checks.exists(options)


def _counts(options: ProbeOptions) -> Iterator[Finding]:
    for name in ("k", "few_shot", "image_size"):
        value = getattr(options, name)
        if value is not None and value < 1:
            yield Finding((name,), f"--{name.replace('_', '-')} must be at least 1, not {value}.")


PROBE_CHECKS: dict[Check, tuple[str, ...]] = checks.SOURCE_CHECKS | {
    _encoder: ("init",),
    _counts: ("k", "few_shot", "image_size"),
    checks.numbers: (),
}


def run(options: ProbeOptions) -> int:
    """Probe."""
    from geoexplora.tasks.probing import format_scores, probe

    sys.stdout.write(format_scores(probe(options)) + "\n")
    return 0


COMMAND = Command(
    name="probe",
    description=(
        "Measure how well the features of a frozen encoder tell the classes of a labelled dataset apart: by the\n"
        "nearest neighbours, and by a linear classifier."
    ),
    usage="--init SOURCE --dataset NAME --root DIR [options]",
    options=ProbeOptions,
    run=run,
    checks=PROBE_CHECKS,
    configurable=True,
    examples=(
        "probe --init runs/a --dataset fmow-sentinel --root data/fmow",
        "probe --init runs/a/encoder.safetensors --dataset fmow-sentinel --root data/fmow --few-shot 10",
    ),
)
