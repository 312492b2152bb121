"""Tables and pictures of ``downstream_sample.py``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.patches import Patch
from numpy.typing import NDArray

from geoexplora.bands import SENTINEL2
from geoexplora.datasets import sample
from geoexplora.runs.colours import CLASS_COLOURS

STARTS = {
    "random": "random weights",
    "source": "photographs (source)",
    "scratch": "pre-trained from scratch",
    "explora": "source + ExPLoRA",
}
METHODS = {"linear": "linear head", "lora": "LoRA-r8", "full": "full"}
KINDS = {"knn": "15 nearest neighbours", "few": "logistic, 10 labels a class", "all": "logistic, all labels"}
FLOORS = {"forest": "random forest of band statistics", "forest, balanced": "random forest, classes weighted",
          "logistic": "logistic regression of band statistics"}  # fmt: skip
COLOURS = dict(zip(sample.CLASSES, ("#e69f00", "#007a5a", "#b4dc82", "#cc79a7", "#0072b2"), strict=True))
STRETCH, VEIL = (2, 99.5), 0.65
"""Percentiles drawn black and brightest in each band; how white pixels of unknown land use are."""

READING = "## Reading"
CREDIT = "Contains modified Copernicus Sentinel data 2017; land use © OpenStreetMap contributors, ODbL 1.0"


def block(number: int) -> tuple[slice, slice]:
    """Rows and columns of an area block of the scene."""
    rows, columns = (side // n for side, n in zip(sample.read_scene().image.shape[1:], sample.BLOCKS, strict=True))
    top, left = number // sample.BLOCKS[1] * rows, number % sample.BLOCKS[1] * columns
    return slice(top, top + rows), slice(left, left + columns)


class Findings:
    """The results of a record, by what was done.

    Args:
        record: what ``downstream_sample.py`` keeps.
    """

    def __init__(self, record: dict[str, Any]) -> None:
        self.results: dict[str, Any] = record["results"]
        self.plan: dict[str, Any] = record["plan"]

    def of(self, key: str) -> list[dict[str, Any]]:
        """A result for each seed that has it; ``{seed}`` stands for the seed."""
        keys = [key.format(seed=seed) for seed in self.plan["seeds"]]
        return [self.results[one] for one in keys if one in self.results]

    def rate(self, task: str, method: str, fold: int) -> float:
        """The learning rate that did best on the validation areas, for the source and the first seed."""
        tried = {
            rate: self.results.get(f"{task}/source/{method}/{fold}/{self.plan['seeds'][0]}/{rate:g}")
            for rate in self.plan["rates"].get(f"{task} {method}", ())
        }
        return max(tried, key=lambda rate: tried[rate]["validated"] if tried[rate] else -1.0)

    def finetuned(self, task: str, start: str, method: str, fold: int = 0) -> list[dict[str, Any]]:
        """The fine-tunings with that rate, one for each seed."""
        return self.of(f"{task}/{start}/{method}/{fold}/{{seed}}/{self.rate(task, method, fold):g}")

    def probes(self) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
        """Name, kind and scores of each seed."""
        for start, name in STARTS.items():
            for kind in KINDS:
                yield name, kind, [one[kind] for one in self.of(f"probe/{start}/{{seed}}")]

    def floor(self, kind: str) -> list[dict[str, Any]]:
        """Scores of band statistics in the probes' protocol."""
        return [one[kind] for one in self.of("floor probe/{seed}")]


def cell(found: list[dict[str, Any]], name: str) -> str:
    """Mean and standard deviation over seeds, in percent; fewer seeds than planned are told by the caller."""
    values = [100 * one[name] for one in found]
    return f"{np.mean(values):.1f} ± {np.std(values):.1f}" if values else ""


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] + ["---:"] * (len(head) - 1), *rows]) + "\n"


def probe_table(findings: Findings) -> str:
    """Balanced accuracy of the probes, accuracy in brackets."""

    def both(found: list[dict[str, Any]]) -> str:
        return f"{cell(found, 'balanced')} ({cell(found, 'accuracy')})" if found else ""

    rows: dict[str, list[str]] = {}
    for name, _, found in findings.probes():
        rows.setdefault(name, [name]).append(both(found))
    statistics = ["band statistics", *(both(findings.floor(kind)) for kind in KINDS)]
    forest = ["random forest of band statistics", "", "", both(findings.floor("forest"))]
    return table(["features", *KINDS.values()], [statistics, forest, *rows.values()])


def class_table(findings: Findings) -> str:
    """Fine-tuning to classes."""
    rows = []
    for key, name in FLOORS.items():
        found = [one[key] for one in findings.of("floor classes/{seed}")]
        rows.append([name, "", cell(found, "balanced"), cell(found, "accuracy"), "", str(len(found))])
    for method in findings.plan["methods"]:
        for start in findings.plan["starts"]:
            found = findings.finetuned("classification", start, method)
            numbers = [cell(found, name) for name in ("balanced", "accuracy", "validated")]
            rows.append([STARTS[start], METHODS[method], *numbers, str(len(found))])
    return table(["start", "method", "balanced accuracy", "accuracy", "balanced, validation areas", "seeds"], rows)


def segmentation_table(findings: Findings) -> str:
    """Segmentation."""
    rows = []
    for fold in sorted({fold for _, fold in findings.plan["segmentation"]}):
        rows.append(
            segmentation_row("random forest of single pixels", "", fold, findings.of(f"floor pixels/{fold}/{{seed}}"))
        )
    for method, fold in findings.plan["segmentation"]:
        for start in findings.plan["starts"]:
            found = findings.finetuned("segmentation", start, method, fold)
            rows.append(segmentation_row(STARTS[start], METHODS[method], fold, found))
    return table(["start", "method", "test block", "mIoU", "accuracy", "balanced", *sample.CLASSES, "seeds"], rows)


def segmentation_row(name: str, method: str, fold: int, found: list[dict[str, Any]]) -> list[str]:
    """Scores, and the mean intersection over union of each class."""
    classes = [""] * len(sample.CLASSES)
    if found:
        classes = [f"{100 * value:.0f}" for value in np.mean([one["iou"] for one in found], axis=0)]
    numbers = [cell(found, measure) for measure in ("miou", "accuracy", "balanced")]
    return [name, method, str(fold), *numbers, *classes, str(len(found))]


def write_tables(record: dict[str, Any], file: Path) -> None:
    """Write the Markdown; what an earlier one holds from its reading on stays."""
    findings = Findings(record)
    plan = findings.plan
    rates = {f"{task} {method}": findings.rate(task, method, fold) for task, method, fold in trained(plan)}
    old = file.read_text(encoding="utf-8") if file.exists() else ""
    kept = old[old.index(READING) :] if READING in old else ""
    file.write_text(
        "# Downstream of four starts, on the bundled sample scene\n\n"
        f"Made by `benchmarks/downstream_sample.py`; circumstances and all numbers in `{file.stem}.json`, pictures in\n"
        f"`{file.stem}*.png`. Percent: mean ± standard deviation (of the population) over {len(plan['seeds'])} seeds;"
        " a seed decides\nthe pre-training, the weights of heads, the order and the few labels.\n\n"
        "## Probes of frozen features, each of 8 area blocks predicted from the other seven\n\n"
        f"Balanced accuracy (accuracy in brackets).\n\n{probe_table(findings)}\n"
        "## Fine-tuning to classes: four blocks to learn from, one to validate, three to test\n\n"
        f"{plan['steps']} steps of {plan['batch']} tiles.\n\n{class_table(findings)}\n"
        "## Segmentation: five blocks to learn from, two to validate, one to test\n\n"
        f"{plan['tile_steps']} steps of {plan['tile_batch']} tiles of {plan['tile']} px, linear head; intersection over"
        f" union of each class.\n\n{segmentation_table(findings)}\n"
        f"Learning rates: {', '.join(f'{name} {rate:g}' for name, rate in rates.items())}.\n\n{kept}",
        encoding="utf-8",
    )


def trained(plan: dict[str, Any]) -> list[tuple[str, str, int]]:
    """Task, method and test block of all fine-tunings."""
    classes = [("classification", method, 0) for method in plan["methods"]]
    return classes + [("segmentation", method, fold) for method, fold in plan["segmentation"]]


def plot_scores(record: dict[str, Any], file: Path) -> None:
    """Every seed as a point, beside the floors."""
    findings = Findings(record)
    plan = findings.plan
    figure, axes = plt.subplots(1, 3, figsize=(16, 5.4), layout="constrained", width_ratios=[3, 3, 2])
    probes: dict[str, dict[str, list[float]]] = {kind: {} for kind in KINDS}
    for name, kind, found in findings.probes():
        probes[kind][name] = [one["balanced"] for one in found]
    floors = {"band statistics, same classifier": [findings.floor(kind) for kind in KINDS]}
    floors["random forest of band statistics"] = [[], [], findings.floor("forest")]
    draw_groups(axes[0], list(KINDS.values()), list(probes.values()))
    draw_floors(axes[0], floors, "balanced")
    axes[0].set(title="probes: 8 areas in turn", ylabel="balanced accuracy, %")
    groups = [
        {
            STARTS[s]: [one["balanced"] for one in findings.finetuned("classification", s, method)]
            for s in plan["starts"]
        }
        for method in plan["methods"]
    ]
    floor = findings.of("floor classes/{seed}")
    draw_groups(axes[1], [METHODS[method] for method in plan["methods"]], groups)
    lines = {
        FLOORS[key]: [[one[key] for one in floor]] * len(groups) for key in ("logistic", "forest", "forest, balanced")
    }
    draw_floors(axes[1], lines, "balanced")
    axes[1].set(title="fine-tuning to classes: three test areas", ylabel="balanced accuracy, %")
    groups = [
        {
            STARTS[s]: [one["miou"] for one in findings.finetuned("segmentation", s, method, fold)]
            for s in plan["starts"]
        }
        for method, fold in plan["segmentation"]
    ]
    draw_groups(axes[2], [f"{METHODS[method]}, area {fold}" for method, fold in plan["segmentation"]], groups)
    pixels = [findings.of(f"floor pixels/{fold}/{{seed}}") for _, fold in plan["segmentation"]]
    draw_floors(axes[2], {"random forest of single pixels": pixels}, "miou")
    axes[2].set(title="segmentation", ylabel="mean intersection over union, %")
    for axis in axes:
        axis.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.09), ncols=2)
    figure.suptitle(
        f"Sample scene, small ViT, {len(plan['seeds'])} seeds: each a point, bars their means; pre-training saw the"
        " whole scene without labels (transductive)",
        fontsize=10,
    )
    figure.savefig(file, dpi=90)
    plt.close(figure)


def draw_groups(axis: Axes, titles: list[str], groups: list[dict[str, list[float]]]) -> None:
    """Points of each start, group by group."""
    for place, group in enumerate(groups):
        for number, (name, values) in enumerate(group.items()):
            x, color = place + 0.18 * (number - (len(group) - 1) / 2), CLASS_COLOURS[number]
            axis.plot([x] * len(values), [100 * value for value in values], "o", color=color, alpha=0.7, markersize=5)
            if values:
                axis.hlines(100 * np.mean(values), x - 0.07, x + 0.07, color=color, linewidth=3)
            if place == 0:
                axis.plot([], [], "o-", color=color, label=name)
    axis.set_xticks(range(len(titles)), titles, fontsize=8)


def draw_floors(axis: Axes, floors: dict[str, list[list[dict[str, Any]]]], measure: str) -> None:
    """A line over each group that has the floor."""
    for style, (name, places) in zip((":", "--", "-."), floors.items(), strict=False):
        for place, found in enumerate(places):
            if found:
                mean = 100 * np.mean([one[measure] for one in found])
                axis.hlines(mean, place - 0.42, place + 0.42, color="black", linestyle=style)
        axis.plot([], [], "k" + style, label=name)


def plot_land_use(record: dict[str, Any], work: Path, file: Path) -> None:
    """True colour, truth and predictions of a test block."""
    plan = record["plan"]
    method, fold = plan["segmentation"][-1]
    seed = plan["seeds"][0]
    rows, columns = block(fold)
    truth = sample.class_mask()[rows, columns]
    known = truth != sample.IGNORE
    picture = sample.read_scene().image[list(SENTINEL2.indices(("B4", "B3", "B2"))), rows, columns]
    low, high = np.percentile(picture, STRETCH, axis=(1, 2), keepdims=True)
    named = {"random forest of single pixels": "forest"}
    named |= {f"{STARTS[start]}, {METHODS[method]}": f"{start}-{method}" for start in plan["starts"]}
    panels: dict[str, NDArray[Any]] = {
        f"true colour, area {fold}": np.clip(np.moveaxis((picture - low) / (high - low), 0, -1), 0, 1),
        "truth (white: unknown)": paint(np.where(known, truth, 0), known, 1.0),
    }
    for name, stem in named.items():
        source = work / f"map-{stem}-{fold}-{seed}.npy"
        if source.exists():
            told = np.load(source)
            right = 100 * (told == truth)[known].mean()
            panels[f"{name}\n{right:.0f} % of the known pixels right"] = paint(told, known, VEIL)
    columns_count = (len(panels) + 1) // 2
    figure, axes = plt.subplots(2, columns_count, figsize=(3.4 * columns_count, 7.6), layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for axis, (name, colours) in zip(axes.flat, panels.items(), strict=False):
        axis.imshow(colours, interpolation="nearest")
        axis.set_title(name, fontsize=9)
    figure.legend(
        handles=[Patch(color=colour, label=name) for name, colour in COLOURS.items()],
        loc="outside lower center", ncols=len(sample.CLASSES), fontsize=9,
    )  # fmt: skip
    figure.suptitle(f"Land use, first seed; pale: no known land use. {CREDIT}", fontsize=8)
    figure.savefig(file, dpi=75)
    plt.close(figure)


def paint(classes: NDArray[Any], known: NDArray[np.bool_], veil: float) -> NDArray[np.float64]:
    """Classes as colours, paler where the land use is not known."""
    palette = np.array([to_rgb(colour) for colour in COLOURS.values()])
    colours: NDArray[np.float64] = palette[classes]
    return np.where(known[..., None], colours, colours * (1 - veil) + veil)


def write_report(record: dict[str, Any], work: Path, output: Path) -> None:
    """Write ``OUTPUT.json``, ``.md``, ``.png`` and ``_land_use.png``."""
    output.with_suffix(".json").write_text(json.dumps(record) + "\n", encoding="utf-8")
    write_tables(record, output.with_suffix(".md"))
    plot_scores(record, output.with_suffix(".png"))
    plot_land_use(record, work, output.with_name(f"{output.name}_land_use.png"))
