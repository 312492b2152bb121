"""Every recipe of fine-tuning and probing runs through the command line, on data of its dataset's layout."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from geoexplora.cli.recipe_files import recipe_header, recipe_names
from geoexplora.datasets.sample_rgb_tree import write_fmow_rgb_tree
from geoexplora.registry import DATASETS
from geoexplora.runs.metrics import read_metrics
from geoexplora.weights.files import read_weights

from ..datasets.torchgeo_trees import (
    write_bigearthnet,
    write_eurosat,
    write_loveda,
    write_resisc45,
    write_so2sat,
    write_ucmerced,
)
from .conftest import run_command

FINETUNE, PROBE = ([name for name in recipe_names() if name.startswith(f"{kind}/")] for kind in ("finetune", "probe"))
MACHINE = ("--accelerator", "cpu", "--precision", "32", "--num-workers", "0")
FINE = (
    "--batch-size", "4", "--effective-batch-size", "4", "--max-steps", "1", "--warmup-steps", "0", "--eval-every", "1",
    "--log-every", "1", *MACHINE,
)  # fmt: skip
LOW_RANK = {"lora", "adalora"}
SETTINGS: dict[str, tuple[str, ...]] = {
    "finetune": ("--root", "data", "--init", "dinov2-vitb14", "--output", "runs/a"),
    "probe": ("--root", "data", "--init", "dinov2-vitb14"),
}


def with_test_list(root: Path) -> Path:
    """TorchGeo's lists of a dataset, that of ``test`` as that of ``val``."""
    (found,) = root.glob("*-val.txt")
    found.with_name(found.name.replace("-val", "-test")).write_text(found.read_text())
    return root


@pytest.fixture(scope="module")
def roots(fmow_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """A folder for each dataset. Read only."""
    base = tmp_path_factory.mktemp("data")
    resisc45 = with_test_list(write_resisc45(base / "resisc45"))
    return {
        "fmow-sentinel": fmow_tree,
        "fmow-rgb": write_fmow_rgb_tree(base / "fmow-rgb", limit=1),
        "resisc45": resisc45,
        "torchgeo:RESISC45": resisc45,
        "ucmerced": with_test_list(write_ucmerced(base / "ucmerced")),
        "eurosat": with_test_list(write_eurosat(base / "eurosat")),
        "so2sat": write_so2sat(base / "so2sat"),
        "bigearthnet": write_bigearthnet(base / "bigearthnet"),
        "loveda": write_loveda(base / "loveda"),
        "sample": base,  # needs none
    }


@pytest.fixture(scope="module")
def encoders(photo_run: Path, explora_run: Path) -> Callable[[str], Path]:
    """An encoder that takes a dataset's images."""
    rgb = {"fmow-rgb", "resisc45", "torchgeo:RESISC45", "ucmerced", "loveda"}
    return lambda dataset: photo_run if dataset in rgb else explora_run


def settings(name: str, *more: object, command: str = "") -> dict[str, Any]:
    """What a recipe, or a dataset's name, comes to."""
    command = command or name.partition("/")[0]
    chosen = ("--config", name) if "/" in name else ("--dataset", name)
    got = run_command(command, *chosen, *SETTINGS[command], *more, "--print-config")
    assert got.status == 0, got.err
    return dict(yaml.safe_load(got.out))


@pytest.mark.parametrize("name", FINETUNE)
def test_a_step_of_fine_tuning(
    roots: Mapping[str, Path], encoders: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    recipe, run = settings(name), tmp_path / "run"
    init = encoders(recipe["dataset"])
    patch = read_weights(init).described().patch_size
    words = (*FINE, "--init", init, "--root", roots[recipe["dataset"]], "--output", run)
    words += ("--image-size", 4 * patch, "--rank", 2) if recipe["method"] in LOW_RANK else ("--image-size", 4 * patch)
    if recipe["head"] == "upernet" and recipe["task"] == "segmentation":
        words += ("--head-width", 16)
    got = run_command("finetune", "--config", name, *words)
    assert got.status == 0, got.err
    rows = read_metrics(run / "metrics.csv")
    assert {row["step"] for row in rows} == {1}
    assert any(row.get("loss") for row in rows)
    report = json.loads((run / "run.json").read_text())
    trained = {part["part"] for part in report["parameters"] if part["trainable"]}
    low_rank = {"LoRA", "head"}
    assert trained == low_rank if recipe["method"] in LOW_RANK else trained > {"head"} and "LoRA" not in trained
    assert report["best"]["step"] == 1
    split = "val" if recipe["dataset"] == "loveda" else "test"
    metric = {"segmentation": "AverageJaccardIndex", "multilabel": "OverallF1Score"}
    assert f"{split}_{metric.get(recipe['task'], 'OverallAccuracy')}" in report["best"]["metrics"]
    assert report["bands"] == list(read_weights(init).described().bands)


@pytest.mark.parametrize("name", PROBE)
def test_a_short_probe(roots: Mapping[str, Path], encoders: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    recipe, output = settings(name), tmp_path / "probe"
    init = encoders(recipe["dataset"])
    words = (*MACHINE, "--init", init, "--root", roots[recipe["dataset"]], "--output", output)
    words += ("--image-size", 4 * read_weights(init).described().patch_size, "--linear-steps", 2, "--k", "1,2")
    got = run_command("probe", "--config", name, *words)
    assert got.status == 0, got.err
    found = json.loads((output / "probe.json").read_text())
    assert {row["classifier"] for row in found["results"]} == {"knn k=1", "knn k=2", "linear"}


@pytest.mark.parametrize("command", ["finetune", "probe"])
def test_a_datasets_name_finds_its_recipe(command: str) -> None:
    labelled = {"probe": {"class"}}.get(command, {"class", "multilabel", "mask"})
    targets = {"bigearthnet": "multilabel", "loveda": "mask", "tropical-cyclone": "value"}
    for name in DATASETS.keys() - {"photographs", "ssl4eo-s12"}:
        if targets.get(name, "class") in labelled:
            own = f"{command}/{name}" if f"{command}/{name}" in recipe_names() else f"{command}/torchgeo"
            by_name, by_recipe = settings(name, command=command), settings(own)
            assert by_name == by_recipe | {"dataset": name}


# The rows of the paper


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("", {"method": "lora", "rank": 8}),
        ("-adalora", {"method": "adalora", "rank": 8}),
        ("-full", {"method": "full", "layer_decay": 0.75}),
    ],
)
def test_fine_tuning_on_fmow_rgb(row: str, expected: dict[str, Any]) -> None:
    recipe = settings(f"finetune/fmow-rgb{row}")
    expected |= {"drop_path": 0.2, "image_size": 224, "task": "classification"}
    assert {name: recipe[name] for name in expected} == expected


@pytest.mark.parametrize("row", ["fmow-rgb", "fmow-rgb-adalora", "fmow-sentinel"])
def test_the_reference_settings_of_low_ranks(row: str) -> None:
    """DESIGN's, from the authors' public script."""
    recipe = settings(f"finetune/{row}")
    reference = {
        "rank": 8, "effective_batch_size": 128, "epochs": 120, "max_steps": None, "lr": 1e-3, "weight_decay": 0,
        "layer_decay": 1, "drop_path": 0.2, "mixup": 0, "cutmix": 0, "random_erasing": 0,
    }  # fmt: skip
    assert {name: recipe[name] for name in reference} == reference


@pytest.mark.parametrize("row", ["fmow-sentinel-full", "fmow-rgb-full"])
def test_the_reference_settings_of_satmaes_fine_tuning(row: str) -> None:
    recipe = settings(f"finetune/{row}")
    reference = {
        "method": "full", "lr": 2e-4, "epochs": 30, "weight_decay": 0.05, "drop_path": 0.2, "random_erasing": 0.25,
        "mixup": 0.8, "cutmix": 1.0, "layer_decay": 0.75,
    }  # fmt: skip
    assert {name: recipe[name] for name in reference} == reference


@pytest.mark.parametrize("name", ["probe/fmow-rgb", "probe/fmow-sentinel"])
def test_the_protocol_of_the_linear_probe(name: str) -> None:
    recipe = settings(name)
    reference = {"linear_steps": 15000, "test_split": "val", "select": "test", "classifiers": ["knn", "linear"]}
    assert {key: recipe[key] for key in reference} == reference


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("finetune/fmow-rgb", {"79.28": "--init runs/fmow-rgb", "78.08": "--init dinov2-vitl14"}),
        ("finetune/fmow-rgb-adalora", {"78.87": "--init dinov2-vitl14"}),
        (
            "finetune/fmow-rgb-full",
            {"77.80": "--init ScaleMAELarge16_Weights.FMOW_RGB", "77.78": "--init satmae-vitl-fmow-rgb"},
        ),
        ("finetune/fmow-sentinel", {"60.15": "--init runs/fmow-sentinel"}),
        ("finetune/fmow-sentinel-full", {"61.48": "--init satmae-vitl-fmow-sentinel"}),
        (
            "probe/fmow-rgb",
            {
                "65.94": "--init satmae-vitl-fmow-rgb", "69.00": "--init dinov2-vitl14",
                "77.48": "--init runs/fmow-rgb", "54.29": "--init runs/fmow-rgb-scratch",
                "74.83": "--init runs/fmow-rgb-no-lora", "78.04": "--init runs/fmow-rgb-three-blocks",
            },
        ),
    ],
)  # fmt: skip
def test_headers_tell_the_papers_rows_and_their_encoders(name: str, rows: dict[str, str]) -> None:
    lines = recipe_header(name)
    for value, encoder in rows.items():
        assert any(value in line and encoder in line for line in lines), f"{value}: {encoder}"


@pytest.mark.parametrize("name", [name for name in (*FINETUNE, *PROBE) if "sample" not in name])
def test_each_has_a_twin_for_a_cpu(name: str) -> None:
    if not name.endswith("-cpu"):
        assert f"{name}-cpu" in recipe_names()
        return
    recipe, large = settings(name), settings(name.removesuffix("-cpu"))
    assert recipe["accelerator"] == "cpu"
    same = ("dataset", "task", "method", "rank", "mixup", "cutmix", "layer_decay", "weight_decay", "classifiers")
    assert all(recipe[key] == large[key] for key in same if key in recipe)
