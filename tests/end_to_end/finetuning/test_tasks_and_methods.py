"""``geoexplora finetune`` from the command line: every task and method, what a run leaves, and that it is right."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from geoexplora.runs.metrics import read_metrics
from geoexplora.tasks.finetune.exports import load_finetuned
from geoexplora.weights.load import load_encoder

from .helpers import (
    BANDS,
    CLASSES,
    COUNTS,
    TASKS,
    Kind,
    dataset_of,
    finetune,
    make_up,
)

METHODS = ("linear", "lora", "adalora", "dora", "full")
LOW_RANK = {"lora", "adalora", "dora"}
MONITORS = {
    "class": "val_OverallAccuracy",
    "multilabel": "val_OverallF1Score",
    "mask": "val_AverageJaccardIndex",
    "value": "val_RMSE",
}


def outputs_of(run: Path, images: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return load_finetuned(run).model(images)


def picture(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"), dtype=float)


# All methods for classes, and of each other task two; group-channel and plain encoders in turn.
COMBINATIONS: list[tuple[Kind, str, str, tuple[str, ...]]] = [
    *(("class", method, "sentinel-2", ()) for method in METHODS),
    ("class", "lora", "rgb", ("--pool", "cls+mean", "--label-smoothing", "0.1", "--mixup", "0.8", "--cutmix", "1")),
    ("class", "full", "rgb", ("--layer-decay", "0.7", "--random-erasing", "0.3", "--class-weights", "balanced")),
    ("multilabel", "lora", "sentinel-2", ("--mixup", "0.8")),
    ("multilabel", "full", "rgb", ()),
    ("mask", "lora", "sentinel-2", ("--head", "linear", "--group-features", "concat")),
    ("mask", "linear", "rgb", ("--head", "upernet", "--head-width", "16", "--class-weights", "balanced")),
    ("mask", "adalora", "rgb", ("--head", "dpt", "--head-width", "16", "--loss", "dice")),
    ("value", "lora", "sentinel-2", ()),
    ("value", "dora", "rgb", ("--loss", "mae")),
]


@pytest.mark.parametrize(
    ("kind", "method", "sensor", "more"), COMBINATIONS, ids=["-".join(one[:3]) for one in COMBINATIONS]
)
def test_a_run_is_complete(
    data: dict[tuple[str, Kind], Path],
    explora_run: Path,
    photo_run: Path,
    tmp_path: Path,
    kind: Kind,
    method: str,
    sensor: str,
    more: tuple[str, ...],
) -> None:
    init, run = photo_run if sensor == "rgb" else explora_run, tmp_path / "run"
    words = ("--init", init, "--task", TASKS[kind], "--method", method, *more)
    words += ("--rank", "8") * (method in {"linear", "full"})  # the default: of another one a warning says it is idle
    got = finetune(dataset_of(sensor), data[sensor, kind], run, *words)
    assert got.status == 0, got.err
    assert "warning" not in got.err.lower()
    assert "what is trained" in got.err

    there = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    expected = {
        "config.yaml", "run.json", "metrics.csv", "predictions.csv", "encoder.safetensors", "task_head.safetensors",
        "checkpoints/last.ckpt", "checkpoints/previous.ckpt", "plots/loss.png", "plots/predictions.png",
    }  # fmt: skip
    assert expected <= there
    assert ("plots/confusion.png" in there) == (kind in {"class", "mask"})
    assert ("adapter/adapter_model.safetensors" in there) == (method in LOW_RANK)
    for path in (run / "plots").glob("*.png"):
        assert picture(path).std() > 5, path.name
    assert not [name for name in there if ".tmp" in name or ".failure" in name]

    rows = read_metrics(run / "metrics.csv")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(np.isfinite(row["loss"]) for row in rows)
    evaluated = [row for row in rows if "val_loss" in row]
    assert [row["step"] for row in evaluated] == [2, 4]
    assert not [name for row in rows for name in row if "Classwise" in name]

    record = json.loads((run / "run.json").read_text())
    assert (record["command"], record["step"]) == ("finetune", 4)
    assert record["bands"] == list(BANDS[sensor])
    assert record["source"]["sha256"]
    assert record["best"]["split"] == "test"
    scores = [row[MONITORS[kind]] for row in evaluated]
    choose = min if kind == "value" else max
    assert record["best"]["step"] == evaluated[scores.index(choose(scores))]["step"]
    assert f"checkpoints/best-{record['best']['step']}.pt" in there
    trained = sum(part["trainable"] for part in record["parameters"])
    head = sum(tensor.numel() for tensor in load_file(run / "task_head.safetensors").values())
    assert (trained > head) == (method != "linear")
    for name, value in record["best"]["metrics"].items():
        if "Classwise" not in name:
            assert f"{name} " in got.out
            assert f"{value:.4f}" in got.out

    with (run / "predictions.csv").open(newline="") as file:
        listed = list(csv.DictReader(file))
    assert len(listed) == COUNTS["test"]
    assert "test_0.tif" in listed[0]["file"]


def test_learning(data: dict[tuple[str, Kind], Path], explora_run: Path, tmp_path: Path) -> None:
    """Brightness tells the class: a few steps must do."""
    for kind, method in (("class", "lora"), ("value", "full")):
        run = tmp_path / kind
        words = ("--init", explora_run, "--task", TASKS[kind], "--method", method, "--max-steps", "40", "--eval-every",
                 "40", "--drop-path", "0", "--crop-scale", "0.8,1", "--clip-grad", "1", "--lr", "0.1",
                 "--warmup-steps", "4")  # fmt: skip
        got = finetune("made-up", data["sentinel-2", kind], run, *words)
        assert got.status == 0, got.err
        scores = json.loads((run / "run.json").read_text())["best"]["metrics"]
        if kind == "value":
            assert scores["test_RMSE"] < 15, "the values' own standard deviation is 41"
        else:
            assert scores["test_OverallAccuracy"] > 0.8


@pytest.mark.parametrize("method", ["lora", "dora", "adalora", "full", "linear"])
def test_the_task_is_the_source_with_both_deltas(
    data: dict[tuple[str, Kind], Path], explora_run: Path, tmp_path: Path, method: str
) -> None:
    """W_task = W_S + Delta_T + Delta_task, from the two runs' own files."""
    run = tmp_path / "run"
    words = ("--init", explora_run, "--method", method, "--alpha", "6", "--drop-path", "0")
    words = words if method not in {"full", "linear"} else (*words[:4], "--drop-path", "0")
    assert finetune("made-up", data["sentinel-2", "class"], run, *words).status == 0
    before, after = (load_file(path / "encoder.safetensors") for path in (explora_run, run))
    assert before.keys() == after.keys()
    changed = {name for name in before if not before[name].equal(after[name])}
    if method == "linear":
        assert not changed
        return
    if method == "full":
        assert any("mlp" in name for name in changed)
        return
    assert changed == {name for name in before if name.endswith("attn.qkv.weight")}
    width = before["cls_token"].shape[-1]
    for name in changed:
        query, key, value = (after[name] - before[name]).split(width)
        assert not key.any(), "K is not adapted"
        assert query.any()
        assert value.any()
    if method != "lora":
        return
    adapter = load_file(run / "adapter/adapter_model.safetensors")
    for name in changed:
        parts = []
        for projection in ("q_proj", "k_proj", "v_proj"):
            found = {
                side: tensor
                for key, tensor in adapter.items()
                for side in ("lora_A", "lora_B")
                if f"{name.removesuffix('qkv.weight')}{projection}.{side}" in key
            }
            parts.append(
                found["lora_B"] @ found["lora_A"] * 6 / 2 if found else torch.zeros(width, width)  # alpha / rank
            )
        torch.testing.assert_close(after[name], before[name] + torch.cat(parts), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "sensor", "method"),
    [
        ("class", "sentinel-2", "lora"),
        ("class", "rgb", "dora"),
        ("multilabel", "sentinel-2", "adalora"),
        ("mask", "sentinel-2", "lora"),
        ("value", "rgb", "full"),
    ],
)
def test_what_is_read_back_predicts_the_same(
    data: dict[tuple[str, Kind], Path],
    explora_run: Path,
    photo_run: Path,
    tmp_path: Path,
    kind: Kind,
    sensor: str,
    method: str,
) -> None:
    """predictions.csv was written by the trained task itself; its images are cropped here by hand: they need not be."""
    run, init = tmp_path / "run", photo_run if sensor == "rgb" else explora_run
    more = ("--head", "linear", "--pool", "mean")[: 2 if kind == "mask" else 0]
    words = ("--init", init, "--task", TASKS[kind], "--method", method, *more)
    assert finetune(dataset_of(sensor), data[sensor, kind], run, *words).status == 0
    task = load_finetuned(run)
    assert not task.training
    assert not [name for name, parameter in task.named_parameters() if "lora" in name]

    from geoexplora.tasks.finetune.evaluation import evaluate
    from geoexplora.tasks.opening import open_data
    from geoexplora.tasks.torchgeo_data import Normalization

    class Options:
        dataset, root = dataset_of(sensor), data[sensor, kind]
        batch_size, num_workers, years, missing, max_unreadable, seed = 4, 0, (2000, 2020), "error", 0.1, 0

    datamodule = open_data(
        Options, None, bands=task.spec.bands, image_size=task.spec.image_size,
        normalization=Normalization.from_dict(task.spec.normalization), antialias=task.spec.antialias,
    )  # fmt: skip
    found = evaluate(task, datamodule.eval_dataloader("test"))
    stored = json.loads((run / "run.json").read_text())["best"]["metrics"]
    assert {f"test_{name}" for name in found.metrics} == stored.keys()
    for name, value in found.metrics.items():
        assert value == pytest.approx(stored[f"test_{name}"], rel=1e-4, abs=1e-5), name
    if kind == "class":
        assert task.hparams["labels"] == list(CLASSES)
        with (run / "predictions.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert [row["prediction"] for row in rows] == [CLASSES[at] for at in found.predicted.argmax(1)]
        assert [float(row["probability"]) for row in rows] == pytest.approx(found.predicted.max(1), abs=1e-3)
        assert [row["label"] for row in rows] == [CLASSES[at] for at in make_up("class", COUNTS["test"])[1]]


def test_an_rgb_encoder_loads_into_stock_timm(
    data: dict[tuple[str, Kind], Path], photo_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert finetune("made-up-rgb", data["rgb", "class"], run, "--init", photo_run).status == 0
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=128, depth=8, num_heads=4, num_classes=0
    )
    model.load_state_dict(load_file(run / "encoder.safetensors"), strict=True)
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    encoder, _ = load_encoder(run)
    with torch.inference_mode():
        torch.testing.assert_close(model.eval().forward_features(images), encoder.forward_features(images))
