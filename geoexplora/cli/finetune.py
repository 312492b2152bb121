"""``geoexplora finetune``."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from geoexplora.cli.command import Command
from geoexplora.cli.finetune_checks import FINETUNE_CHECKS
from geoexplora.cli.finetune_options import LossOptions, MethodOptions, SelectionOptions, TaskOptions
from geoexplora.cli.options import (
    DataOptions,
    EncoderOptions,
    FMoWRGBOptions,
    OptimizationOptions,
    RunOptions,
    SampleOptions,
    ScalingOptions,
)
from geoexplora.cli.values import setting


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions(
    RunOptions,
    ScalingOptions,
    SelectionOptions,
    OptimizationOptions,
    LossOptions,
    MethodOptions,
    TaskOptions,
    EncoderOptions,
    SampleOptions,
    FMoWRGBOptions,
    DataOptions,
):
    """Settings of ``geoexplora finetune``; the base classes hold them, by group."""

    epochs: int | None = setting(50, "N")
    lr: float = setting(1e-3, "X")


def run(options: FinetuneOptions) -> int:
    """Fine-tune."""
    from geoexplora.tasks.finetune.finetuning import finetune, format_metrics

    sys.stdout.write(format_metrics(finetune(options)) + "\n")
    return 0


COMMAND = Command(
    name="finetune",
    description=(
        "Train an encoder and a new head on labelled images: their classes, several labels, the class of each pixel,\n"
        "or a value. Settings come from the recipe of --dataset, then --config, then the command line. The run folder\n"
        "holds the weights that did best on the validation split, test metrics, and pictures of predictions."
    ),
    usage="--init SOURCE --dataset NAME --root DIR --output RUN [options]",
    options=FinetuneOptions,
    run=run,
    checks=FINETUNE_CHECKS,
    configurable=True,
    examples=(
        "finetune --init runs/a --dataset fmow-sentinel --root data/fmow --output runs/b",
        "finetune --init dinov2-vitb14 --dataset resisc45 --root data/resisc45 --method adalora --output runs/c",
        "finetune --init runs/a --dataset sample --task segmentation --head linear --output runs/d",
        "finetune --resume runs/b",
    ),
)
