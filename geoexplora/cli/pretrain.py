"""``geoexplora pretrain``."""

from __future__ import annotations

from dataclasses import dataclass

from geoexplora.cli.checks import PRETRAIN_CHECKS
from geoexplora.cli.command import Command
from geoexplora.cli.objective_options import DINOv2Options, MAEOptions, ObjectiveOptions
from geoexplora.cli.options import (
    DataOptions,
    ExploraOptions,
    FMoWRGBOptions,
    InputOptions,
    ModelOptions,
    OptimizationOptions,
    PretrainRateOptions,
    RunOptions,
    SampleOptions,
    ScalingOptions,
)


@dataclass(frozen=True, kw_only=True)
class PretrainOptions(
    RunOptions,
    ScalingOptions,
    PretrainRateOptions,
    OptimizationOptions,
    DINOv2Options,
    MAEOptions,
    ObjectiveOptions,
    ExploraOptions,
    ModelOptions,
    InputOptions,
    SampleOptions,
    FMoWRGBOptions,
    DataOptions,
):
    """Settings of ``geoexplora pretrain``; the base classes hold them, by group."""


def run(options: PretrainOptions) -> int:
    """Pre-train."""
    from geoexplora.tasks.pretrain.pretraining import pretrain

    pretrain(options)
    return 0


COMMAND = Command(
    name="pretrain",
    description=(
        "Go on with self-supervised pre-training on unlabelled imagery, training few weights (ExPLoRA).\n"
        "Settings come from the recipe of --dataset, then --config, then the command line. The run folder holds the\n"
        "merged encoder, the adapter, metrics and pictures, complete after every checkpoint."
    ),
    usage="--dataset NAME --root DIR --output RUN [--init SOURCE] [options]",
    options=PretrainOptions,
    run=run,
    checks=PRETRAIN_CHECKS,
    configurable=True,
    examples=(
        "pretrain --dataset fmow-sentinel --root data/fmow --init mae_visualize_vit_large.pth --output runs/a",
        "pretrain --dataset fmow-sentinel --root data/fmow --model vit_base --rank 16 --output runs/b",
        "pretrain --dataset fmow-rgb --root data/fmow --init dinov2-vitl14 --output runs/c",
        "pretrain --dataset torchgeo:RESISC45 --root data/resisc45 --objective mae --init mae-vitb16 --output runs/d",
        "pretrain --resume runs/a",
        "pretrain --config my.yaml --max-steps 100 --print-config",
    ),
)
