"""Every pre-training recipe takes a step through the command line, on data of its dataset's layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors import safe_open
from torchgeo.datasets import SSL4EOS12

from geoexplora.cli.recipe_files import recipe_file, recipe_names
from geoexplora.datasets.sample_rgb_tree import write_fmow_rgb_tree
from geoexplora.runs.metrics import read_metrics

from ..datasets.torchgeo_trees import (
    write_bigearthnet,
    write_eurosat,
    write_resisc45,
    write_so2sat,
    write_ssl4eo_s12,
)

RECIPES = [name for name in recipe_names() if name.startswith("pretrain/")]

SMALL = (
    "--model", "vit_pico", "--batch-size", "2", "--effective-batch-size", "2", "--max-steps", "1",
    "--accelerator", "cpu", "--precision", "32", "--num-workers", "0", "--probe-every", "0",
)  # fmt: skip
SMALL_HEADS = ("--prototypes", "16", "--head-hidden", "8", "--head-bottleneck", "4", "--local-crops", "2")
SMALL_DECODER = ("--decoder-width", "32", "--decoder-depth", "1", "--decoder-heads", "4")


@pytest.fixture(scope="module")
def roots(fmow_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    rgb = write_fmow_rgb_tree(tmp_path_factory.mktemp("rgb") / "data", limit=1)
    torchgeo = tmp_path_factory.mktemp("torchgeo")
    roots = {
        "fmow-sentinel": fmow_tree,
        "fmow-rgb": rgb,
        "torchgeo:RESISC45": write_resisc45(torchgeo / "resisc45"),
        "eurosat": write_eurosat(torchgeo / "eurosat"),
        "so2sat": write_so2sat(torchgeo / "so2sat"),
        "bigearthnet": write_bigearthnet(torchgeo / "bigearthnet"),
        "ssl4eo-s12": write_ssl4eo_s12(torchgeo / "ssl4eo-s12"),
    }
    return roots | dict.fromkeys(("photographs", "sample"), rgb)  # these need none


def settings(geoexplora: Callable[..., Any], name: str) -> dict[str, Any]:
    got = geoexplora("pretrain", "--config", name, "--root", "data", "--output", "runs/a", "--print-config")
    assert got.status == 0, got.err
    return dict(yaml.safe_load(got.out))


@pytest.mark.parametrize("name", RECIPES)
def test_one_step(
    geoexplora: Callable[..., Any],
    roots: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    monkeypatch.setattr(SSL4EOS12, "__len__", lambda dataset: 3)  # says 251,079 whatever is there
    recipe = settings(geoexplora, name)
    patch = recipe["patch_size"]
    words = [*SMALL, "--image-size", 4 * patch, "--rank", min(recipe["rank"], 4)]
    words += [*SMALL_HEADS, "--local-size", 2 * patch] if recipe["objective"] == "dinov2" else SMALL_DECODER
    run = tmp_path / "run"
    got = geoexplora("pretrain", "--config", name, "--root", roots[recipe["dataset"]], "--output", run, *words)
    assert got.status == 0, got.err
    assert [row["step"] for row in read_metrics(run / "metrics.csv")] == [1]
    if recipe["objective"] == "dinov2":
        assert read_metrics(run / "metrics.csv")[0]["ibot_loss"] > 0, "tokens are hidden"
    with safe_open(run / "encoder.safetensors", "pt") as file:
        assert json.loads(file.metadata()["bands"]) == (recipe["bands"] or ["R", "G", "B"])
    parts = {part["part"]: part for part in json.loads((run / "run.json").read_text())["parameters"]}
    assert ("LoRA" in parts) == (recipe["mode"] == "explora" and recipe["rank"] > 0)
    whole = recipe["mode"] != "explora" or bool(recipe["whole_blocks"])
    assert ("whole blocks" in parts) == whole


@pytest.mark.parametrize("name", ["eurosat", "so2sat", "bigearthnet", "ssl4eo-s12"])
def test_datasets_by_name_train_as_the_paper_does_on_many_bands(geoexplora: Callable[..., Any], name: str) -> None:
    recipe, sentinel = settings(geoexplora, f"pretrain/{name}"), settings(geoexplora, "pretrain/fmow-sentinel")
    same = ("bands", "groups", "mode", "whole_blocks", "rank", "objective", "mask_ratio", "mask", "lr", "weight_decay")
    assert {key: recipe[key] for key in same} == {key: sentinel[key] for key in same}


def test_papers_rows_are_there() -> None:
    rows = ("", "-three-blocks", "-no-lora", "-lora-only", "-full", "-scratch", "-mae")
    wanted = {f"pretrain/fmow-rgb{row}{size}" for row in rows for size in ("", "-vit-b", "-cpu")}
    assert wanted <= set(RECIPES)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("", {"mode": "explora", "whole_blocks": ["L"], "rank": 64, "objective": "dinov2"}),
        ("-three-blocks", {"mode": "explora", "whole_blocks": [1, "L-1", "L"], "rank": 64}),
        ("-no-lora", {"mode": "explora", "whole_blocks": ["L"], "rank": 0}),
        ("-lora-only", {"mode": "explora", "whole_blocks": [], "rank": 64}),
        ("-full", {"mode": "full", "objective": "dinov2"}),
        ("-scratch", {"mode": "scratch", "objective": "dinov2"}),
        ("-mae", {"mode": "explora", "whole_blocks": ["L"], "rank": 64, "decoder_rank": 8, "objective": "mae"}),
    ],
)
@pytest.mark.parametrize(("size", "model"), [("", "vit_large"), ("-vit-b", "vit_base")])
def test_they_train_what_the_paper_trains(
    geoexplora: Callable[..., Any], row: str, expected: dict[str, Any], size: str, model: str
) -> None:
    recipe = settings(geoexplora, f"pretrain/fmow-rgb{row}{size}")
    assert {name: recipe[name] for name in expected} == expected
    assert recipe["model"] == model


def test_the_reference_settings(geoexplora: Callable[..., Any]) -> None:
    """DESIGN's, from the authors' public scripts."""
    dinov2, mae = settings(geoexplora, "pretrain/fmow-rgb"), settings(geoexplora, "pretrain/fmow-rgb-mae")
    reference = {
        "patch_size": 14, "effective_batch_size": 1024, "lr": 1e-3, "freeze_last_epochs": 3, "prototypes": 65536,
        "head_layers": 3, "head_hidden": 2048, "head_bottleneck": 256, "separate_heads": False,
        "mask_probability": 0.5, "mask_range": [0.1, 0.5], "koleo_weight": 0.1, "image_size": 224,
        "global_scale": [0.32, 1.0], "local_crops": 8, "local_size": 98, "local_scale": [0.05, 0.32],
        "teacher_momentum": 0.992, "teacher_temperature_start": 0.04, "teacher_temperature": 0.07,
        "teacher_warmup_epochs": 30, "weight_decay": 0.04, "weight_decay_end": 0.4, "clip_grad": 3.0,
        "layer_decay": 0.9, "patch_embed_lr_scale": 0.2, "drop_path": 0.3,
    }  # fmt: skip
    assert {name: dinov2[name] for name in reference} == reference
    reference = {
        "patch_size": 16, "effective_batch_size": 1024, "lr": 4.5e-4, "epochs": 400, "warmup_epochs": 1,
        "weight_decay": 0, "mask_ratio": 0.75, "norm_pix_loss": True,
    }  # fmt: skip
    assert {name: mae[name] for name in reference} == reference


def test_what_a_recipe_leaves_open_is_its_datasets(geoexplora: Callable[..., Any]) -> None:
    base, variant = (settings(geoexplora, f"pretrain/fmow-rgb{row}") for row in ("", "-lora-only"))
    own = yaml.safe_load(recipe_file("pretrain/fmow-rgb-lora-only").read_text())
    assert {name for name in base if base[name] != variant[name]} <= own.keys()
