"""``geoexplora demo``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from geoexplora.cli.command import Command, Finding
from geoexplora.cli.options import Options
from geoexplora.cli.values import path, setting


@dataclass(frozen=True, kw_only=True)
class DemoOptions(Options):
    """Demo.

    Attributes:
        output: folder for the data, runs, table and pictures of the demo.
        steps: optimizer steps of each training.
        seed: seed of weights, order of the data, crops and masks.
    """

    output: str = setting("runs/demo", "DIR", path)
    steps: int = setting(400, "N")
    seed: int = setting(0, "N")


def _counts(options: DemoOptions) -> Iterator[Finding]:
    if options.steps < 1:
        yield Finding(("steps",), f"--steps must be at least 1, not {options.steps}.")
    if options.seed < 0:
        yield Finding(("seed",), f"--seed must be at least 0, not {options.seed}.")
    if Path(options.output).is_file():
        yield Finding(("output",), f"--output {options.output} is a file. Name a folder.")


def run(options: DemoOptions) -> int:
    """Run the demo."""
    from geoexplora.tasks.demo import demo

    demo(options)
    return 0


COMMAND = Command(
    name="demo",
    description=(
        "Adapt an encoder of natural photographs to the 13 bands of a real Sentinel-2 scene that ships with the\n"
        "package, measure its features before and after, and draw what it reconstructs. Needs no download and no GPU."
    ),
    usage="[--output DIR] [--steps N] [--seed N]",
    options=DemoOptions,
    run=run,
    checks={_counts: ("steps", "seed", "output")},
    examples=("demo", "demo --steps 100 --output /tmp/demo"),
)
