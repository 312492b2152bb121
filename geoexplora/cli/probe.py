"""``geoexplora probe``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from geoexplora.cli import checks
from geoexplora.cli.command import Check, Command, Finding
from geoexplora.cli.options import DataOptions, DeviceOptions, EncoderOptions, FMoWRGBOptions, Options, SampleOptions
from geoexplora.cli.values import names, path, setting


@dataclass(frozen=True, kw_only=True)
class FeatureOptions(Options):
    """Features.

    Attributes:
        pool: features of knn and logistic: the mean of the patch tokens of each channel group, or the class token
            (none: as the encoder's weights say). The linear probe tries both.
        batch_size: images read at once.
    """

    pool: Literal["mean", "cls"] | None = None
    batch_size: int = setting(256, "IMAGES")


@dataclass(frozen=True, kw_only=True)
class SplitOptions(Options):
    """Training and test samples.

    Attributes:
        holdout: split tests on a split of the dataset, location leaves locations of all splits out in turn.
        test_split: what to test on with --holdout split; the training samples are always those of train.
        few_shot: labels of each class to learn from, drawn at random; several numbers give a table each (none: all).
        repeats: seeds, from --seed on, that are averaged: of the labels drawn, first weights and order.
        seed: the first seed.
    """

    holdout: Literal["split", "location"] = "split"
    test_split: Literal["val", "test"] = "val"
    few_shot: tuple[int, ...] | None = setting(None, "N,N,...", names, expects="numbers such as 1,5,10")
    repeats: int = setting(1, "N")
    seed: int = setting(0, "N")


@dataclass(frozen=True, kw_only=True)
class ClassifierOptions(Options):
    """Classifiers.

    Attributes:
        classifiers: knn, linear (the linear probe of DINOv2 and ExPLoRA) or logistic (logistic regression, for few
            samples) (none: all of them, logistic on up to 10000 training samples).
        k: neighbours; each number gives a line.
        temperature: a neighbour's vote weighs exp(cosine similarity / temperature).
        linear_steps: steps of the linear probe, 256 samples each
            (none: 15000, or 100 passes over the training samples if these are fewer, but at least 1000).
        select: where the linear probe's learning rate and features are chosen: on a held-out tenth of the training
            samples, or on the test samples, as papers do, which flatters.
    """

    classifiers: tuple[Literal["knn", "linear", "logistic"], ...] | None = setting(
        None, "NAME,...", names, expects="some of knn,linear,logistic"
    )
    k: tuple[int, ...] = setting((10, 20, 100, 200), "N,N,...", names, expects="numbers such as 10,20")
    temperature: float = setting(0.07, "X")
    linear_steps: int | None = setting(None, "STEPS")
    select: Literal["held-out", "test"] = "held-out"


@dataclass(frozen=True, kw_only=True)
class ResultOptions(Options):
    """Result.

    Attributes:
        output: folder to write probe.json, per_class.csv, confusion.png and the features into
            (none: only show the result; features are kept where --init is a run).
    """

    output: str | None = setting(None, "DIR", path)


@dataclass(frozen=True, kw_only=True)
class ProbeOptions(
    DeviceOptions,
    ResultOptions,
    ClassifierOptions,
    SplitOptions,
    FeatureOptions,
    EncoderOptions,
    SampleOptions,
    FMoWRGBOptions,
    DataOptions,
):
    """Settings of ``geoexplora probe``; the base classes hold them, by group."""


def _encoder(options: ProbeOptions) -> Iterator[Finding]:
    if options.init is not None and options.model is not None:
        text = f"--model {options.model} names the sizes of random weights, but --init gives weights. Leave one out."
        yield Finding(("model", "init"), text)
    elif options.init is not None:
        yield from checks.exists(options)
    elif options.model is not None:
        yield from checks.model(options)
    else:
        text = (
            "--init is missing. Name the encoder to probe: a weights file or a run; or give --model to probe random"
            " weights."
        )
        yield Finding(("init", "model"), text, "unready")


def _counts(options: ProbeOptions) -> Iterator[Finding]:
    for name in ("k", "few_shot", "image_size", "patch_size", "repeats", "linear_steps"):
        value = getattr(options, name)
        for number in value if isinstance(value, tuple) else [value]:
            if number is not None and number < 1:
                yield Finding((name,), f"--{name.replace('_', '-')} must be at least 1, not {number}.")
    for name in ("k", "classifiers"):
        if getattr(options, name) == ():
            yield Finding((name,), f"--{name} is empty. Name at least one.")
    if not options.temperature > 0:
        yield Finding(("temperature",), f"--temperature must be above 0, not {options.temperature:g}.")


def _repeats(options: ProbeOptions) -> Iterator[Finding]:
    """Seeds that nothing depends on."""
    if options.repeats > 1 and not options.few_shot and "linear" not in (options.classifiers or ("linear",)):
        text = (
            f"--repeats {options.repeats} changes nothing here: only the linear probe and --few-shot depend on seeds."
        )
        yield Finding(("repeats", "few_shot", "classifiers"), text, "warning")


PROBE_CHECKS: dict[Check, tuple[str, ...]] = checks.SOURCE_CHECKS | {
    _encoder: ("init", "model"),
    _counts: ("k", "few_shot", "image_size", "patch_size", "repeats", "linear_steps", "classifiers", "temperature"),
    _repeats: ("repeats", "few_shot", "classifiers"),
    checks.numbers: (),
}


def run(options: ProbeOptions) -> int:
    """Probe."""
    from geoexplora.tasks.probe.probing import probe
    from geoexplora.tasks.probe.report import format_results

    sys.stdout.write(format_results(probe(options), options.select) + "\n")
    return 0


COMMAND = Command(
    name="probe",
    description=(
        "Measure how well the features of a frozen encoder tell the classes of a labelled dataset apart: by the\n"
        "nearest neighbours, by the linear probe of DINOv2 and ExPLoRA, and by logistic regression. Features are\n"
        "computed once and kept."
    ),
    usage="--init SOURCE --dataset NAME --root DIR [options]",
    options=ProbeOptions,
    run=run,
    checks=PROBE_CHECKS,
    configurable=True,
    examples=(
        "probe --init runs/a --dataset fmow-sentinel --root data/fmow",
        "probe --init runs/a/encoder.safetensors --dataset sample --few-shot 1,5,10 --repeats 5 --output probes/a",
        "probe --init dinov2-vitb14 --dataset resisc45 --root data/resisc45 --test-split test --select test",
    ),
)
