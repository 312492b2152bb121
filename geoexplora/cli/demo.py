"""``geoexplora demo``: the commands that a user would type, one after the other, on the bundled sample."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from geoexplora.cli.command import Command, Finding
from geoexplora.cli.options import Options
from geoexplora.cli.pretrain import COMMAND as PRETRAIN
from geoexplora.cli.resolve import resolve
from geoexplora.cli.values import path, setting


@dataclass(frozen=True, kw_only=True)
class DemoOptions(Options):
    """Demo.

    Attributes:
        output: folder for the data, runs, table and pictures of the demo; if it is in use, a number is added.
        steps: optimizer steps of each training.
        seed: seed of weights, order of the data, crops and masks.
    """

    output: str = setting("runs/demo", "DIR", path)
    steps: int = setting(300, "N")
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
    from geoexplora.datasets.sample import source_weights
    from geoexplora.tasks.demo import Comparison, draw_scene, write_trees

    output, begin = _free(Path(options.output)), time.monotonic()
    explora, scratch = output / "explora", output / "scratch"
    _say("1. Writing the bundled Sentinel-2 scene (west of Berlin, 13 bands) as fMoW-Sentinel trees.")
    unlabelled, labelled = write_trees(output)
    comparison = Comparison(labelled)
    comparison.add_statistics()
    _say("2. ExPLoRA: the weights of a small MAE on natural photographs go on learning on the unlabelled tiles.")
    adapt = _settings("explora", unlabelled, explora, options, "--init", str(source_weights()))
    comparison.add_start("source, untrained", adapt)
    PRETRAIN.run(adapt)
    comparison.add_run("source + ExPLoRA", explora)
    draw_scene(adapt, explora, output / "scene.png")
    _say("3. For comparison: the same model from scratch, for as many steps.")
    PRETRAIN.run(_settings("scratch", unlabelled, scratch, options))
    comparison.add_run("from scratch", scratch)
    table = comparison.table()
    (output / "table.txt").write_text(table + "\n", encoding="utf-8")
    sys.stdout.write(_summary(table, output, options.steps, time.monotonic() - begin))
    return 0


def _free(folder: Path) -> Path:
    """The folder, or if it is in use the same name with the first free number."""
    candidates = [folder, *(folder.with_name(f"{folder.name}-{number}") for number in range(2, 1000))]
    return next(path for path in candidates if not path.exists() or not any(path.iterdir()))


def _settings(recipe: str, root: Path, output: Path, options: DemoOptions, *more: str) -> Options:
    """The settings of a ``pretrain`` command, which is shown."""
    words = ["--config", f"pretrain/demo-{recipe}", "--root", str(root), "--output", str(output), *more]
    words += ["--max-steps", str(options.steps), "--seed", str(options.seed)]
    sys.stdout.write(f"   geoexplora pretrain {shlex.join(words)}\n")
    return resolve(PRETRAIN, words).options


def _say(text: str) -> None:
    sys.stdout.write(f"\n{text}\n")
    sys.stdout.flush()


def _summary(table: str, output: Path, steps: int, seconds: float) -> str:
    return f"""
Done: a small MAE of photographs was adapted by ExPLoRA to ten bands of the scene in {steps} steps, and the same model
trained from scratch for as many. Balanced accuracy of five land-use classes from frozen features,
leaving one of eight areas out in turn:

{table}

The unlabelled tiles come from the whole scene, those of the left-out area included, without labels.
One small scene, a small model and one seed: read the order of the rows with care (--seed shows another one).

It took {seconds / 60:.1f} minutes. Look, in {output}, at
  scene.png                         a part of the scene, what the model sees of it, and what it makes of that
  explora/plots/                    single tiles likewise, and how the loss fell
  explora/encoder.safetensors       the adapted encoder: geoexplora inspect {output / "explora"}
  table.txt                         the table above
"""


COMMAND = Command(
    name="demo",
    description=(
        "Adapt an encoder of natural photographs to ten bands of a real Sentinel-2 scene that ships with the\n"
        "package, measure its features before and after, and draw what it reconstructs. Needs no download and no GPU."
    ),
    usage="[--output DIR] [--steps N] [--seed N]",
    options=DemoOptions,
    run=run,
    checks={_counts: ("steps", "seed", "output")},
    examples=("demo", "demo --steps 100 --output /tmp/demo"),
)
