"""``geoexplora finetune`` from the command line: every task and method, what a run leaves, and that it is right."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from geoexplora.runs.metrics import read_metrics
from geoexplora.tasks.finetune.exports import load_finetuned
from geoexplora.weights.load import load_encoder

from .conftest import run_command
from .finetuning_helpers import (
    BANDS,
    CLASSES,
    COUNTS,
    TASKS,
    Kind,
    finetune,
    made_up_datasets,
    make_up,
    write_made_up,
)

METHODS = ("linear", "lora", "adalora", "dora", "full")
LOW_RANK = {"lora", "adalora", "dora"}
MONITORS = {
    "class": "val_OverallAccuracy",
    "multilabel": "val_OverallF1Score",
    "mask": "val_AverageJaccardIndex",
    "value": "val_RMSE",
}


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    made_up_datasets(monkeypatch)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, Kind], Path]:
    """By sensor and kind of target. Read only."""
    root = tmp_path_factory.mktemp("made_up")
    return {
        (sensor, kind): write_made_up(root / sensor / kind, kind, sensor)
        for sensor in ("sentinel-2", "rgb")
        for kind in TASKS
    }


def dataset_of(sensor: str) -> str:
    return "made-up-rgb" if sensor == "rgb" else "made-up"


def outputs_of(run: Path, images: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return load_finetuned(run).model(images)


def picture(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"), dtype=float)


def the_same(one: Path, other: Path) -> None:
    first, second = load_file(one), load_file(other)
    assert first.keys() == second.keys()
    assert all(first[name].equal(second[name]) for name in first), one.name


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
    got = finetune(dataset_of(sensor), data[sensor, kind], run, *words)
    assert got.status == 0, got.err
    assert "warning" not in got.err.lower()
    assert "what is trained" in got.err

    there = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    expected = {
        "config.yaml", "run.json", "metrics.csv", "predictions.csv", "encoder.safetensors", "task_head.safetensors",
        "checkpoints/last.ckpt", "checkpoints/previous.ckpt", "checkpoints/best.pt", "plots/loss.png",
        "plots/predictions.png",
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


def test_the_config_repeats_the_run(
    data: dict[tuple[str, Kind], Path], explora_run: Path, tmp_path: Path, comparable: Any
) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    words = ("--init", explora_run, "--mixup", "0.5", "--class-weights", "balanced", "--seed", "3", "--patience", "7")
    assert finetune("made-up", data["sentinel-2", "class"], one, *words).status == 0
    got = run_command("finetune", "--config", one / "config.yaml", "--output", other)
    assert got.status == 0, got.err
    assert comparable(one) == comparable(other)
    for name in ("encoder.safetensors", "task_head.safetensors", "adapter/adapter_model.safetensors"):
        the_same(one / name, other / name)
    first, second = (yaml.safe_load((run / "config.yaml").read_text()) for run in (one, other))
    assert first | {"output": None} == second | {"output": None}
    assert (one / "predictions.csv").read_text() == (other / "predictions.csv").read_text()
    third = tmp_path / "third"
    assert finetune("made-up", data["sentinel-2", "class"], third, *words, "--seed", "4").status == 0
    assert comparable(third) != comparable(one)


def test_the_best_weights_are_kept(data: dict[tuple[str, Kind], Path], explora_run: Path, tmp_path: Path) -> None:
    """A learning rate that ruins the weights: the first validation is the best one."""
    run, short = tmp_path / "run", tmp_path / "short"
    root = data["sentinel-2", "value"]
    words = ("--init", explora_run, "--task", "regression", "--method", "full", "--drop-path", "0", "--lr", "20")
    got = finetune("made-up", root, run, *words, "--max-steps", "8", "--eval-every", "1")
    assert got.status == 0, got.err
    rows = read_metrics(run / "metrics.csv")
    scores = [row["val_RMSE"] for row in rows]
    best = scores.index(min(scores)) + 1
    record = json.loads((run / "run.json").read_text())
    assert record["best"]["step"] == best
    assert best < 8, "the last step is not the best; choose another learning rate for this test"
    assert torch.load(run / "checkpoints/best.pt", weights_only=True)["step"] == best

    # The same run cut off after that step has the same weights (its cosine is that of the long run).
    from geoexplora.tasks.finetune import validation

    seen = {}
    save = validation.save_best

    def note(path: Path, task: Any, step: int, score: float) -> None:
        seen[step] = {name: value.clone() for name, value in task.model.head.state_dict().items()}
        save(path, task, step, score)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validation, "save_best", note)
        assert finetune("made-up", root, short, *words, "--max-steps", "8", "--eval-every", "1").status == 0
    head = load_file(run / "task_head.safetensors")
    assert all(head[name].equal(value) for name, value in seen[best].items())
    with safe_open(run / "encoder.safetensors", "pt") as file:
        assert file.metadata()["step"] == str(best)


def test_early_stopping(data: dict[tuple[str, Kind], Path], explora_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ("--init", explora_run, "--method", "linear", "--lr", "1e-9", "--eval-every", "1", "--patience", "2")
    got = finetune("made-up", data["sentinel-2", "class"], run, *words, "--max-steps", "9")
    assert got.status == 0, got.err
    assert "training stops at step 3" in got.err
    assert [row["step"] for row in read_metrics(run / "metrics.csv")] == [1, 2, 3]
    record = json.loads((run / "run.json").read_text())
    assert (record["step"], record["best"]["step"]) == (3, 1)
    assert torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 3


def test_other_monitors(data: dict[tuple[str, Kind], Path], explora_run: Path, tmp_path: Path) -> None:
    for monitor, choose in (("val_loss", min), ("val_AverageRecall", max)):
        run = tmp_path / monitor
        words = ("--init", explora_run, "--method", "full", "--monitor", monitor, "--eval-every", "1")
        assert finetune("made-up", data["sentinel-2", "class"], run, *words).status == 0
        scores = [row[monitor] for row in read_metrics(run / "metrics.csv")]
        best = json.loads((run / "run.json").read_text())["best"]["step"]
        assert best == scores.index(choose(scores)) + 1


def test_accumulated_batches(data: dict[tuple[str, Kind], Path], explora_run: Path, tmp_path: Path) -> None:
    """Two batches of 2 in a step are a batch of 4."""
    runs = tmp_path / "whole", tmp_path / "halves"
    words = ("--init", explora_run, "--drop-path", "0", "--max-steps", "2", "--crop-scale", "1,1")
    root = data["sentinel-2", "class"]
    assert finetune("made-up", root, runs[0], *words).status == 0
    more = ("--batch-size", "2", "--effective-batch-size", "4")
    assert finetune("made-up", root, runs[1], *words, *more).status == 0
    one, other = (read_metrics(run / "metrics.csv") for run in runs)
    assert [row["step"] for row in one] == [row["step"] for row in other]
    for first, second in zip(one, other, strict=True):
        assert first["lr"] == second["lr"]
        assert first["loss"] == pytest.approx(second["loss"], rel=1e-4)
        assert first["grad_norm"] == pytest.approx(second["grad_norm"], rel=1e-3)


def test_options_that_save_memory_or_time(
    data: dict[tuple[str, Kind], Path], explora_run: Path, tmp_path: Path, comparable: Any
) -> None:
    root, words = data["sentinel-2", "class"], ("--init", explora_run, "--drop-path", "0.3", "--max-steps", "2")
    plain, recomputed, halved = (tmp_path / name for name in ("plain", "recomputed", "halved"))
    assert finetune("made-up", root, plain, *words).status == 0
    assert finetune("made-up", root, recomputed, *words, "--grad-checkpointing", "true").status == 0
    one, other = comparable(plain), comparable(recomputed)
    for first, second in zip(one, other, strict=True):
        assert first["loss"] == pytest.approx(second["loss"], rel=1e-5)
    assert finetune("made-up", root, halved, *words, "--precision", "bf16").status == 0
    assert comparable(halved)[0]["loss"] == pytest.approx(one[0]["loss"], rel=0.05)


def test_other_bands_than_the_encoder_knows(
    data: dict[tuple[str, Kind], Path], photo_run: Path, explora_run: Path, tmp_path: Path
) -> None:
    """RGB weights on ten bands; and fewer bands of the encoder's own, normalized as it learned them."""
    many = ("--bands", ",".join(BANDS["sentinel-2"]), "--groups", "B2,B3,B4,B8;B5,B6,B7,B8A;B11,B12")
    few = ("--bands", "R,G", "--allow-band-mismatch", "true")
    for sensor, more in (("sentinel-2", many), ("rgb", few)):
        words = ("--init", photo_run, "--method", "full", "--max-steps", "1", *more)
        got = finetune(dataset_of(sensor), data[sensor, "class"], tmp_path / sensor, *words)
        assert got.status == 0, got.err
        _, spec = load_encoder(tmp_path / sensor)
        assert (spec.sensor, list(spec.bands)) == (sensor, more[1].split(","))
    _, source = load_encoder(photo_run)
    for name in ("mean", "std"):
        assert list(spec.normalization[name]) == list(source.normalization[name])[:2]
    words = ("--init", explora_run, "--bands", "B2,B3,B4", "--groups", "B2,B3,B4", "--allow-band-mismatch", "true")
    got = finetune("made-up", data["sentinel-2", "class"], tmp_path / "refused", *words)
    assert got.status == 2, "other channel groups than those of the weights cannot take them over"
    assert "has channel groups B2,B3,B4,B8;B5,B6,B7,B8A;B11,B12, the model has B2,B3,B4" in got.err


def test_random_weights(data: dict[tuple[str, Kind], Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ("--model", "vit_pico", "--image-size", "16", "--patch-size", "8", "--method", "full")
    got = finetune("made-up", data["sentinel-2", "class"], run, *words)
    assert got.status == 0, got.err
    assert json.loads((run / "run.json").read_text())["source"] is None
    again = tmp_path / "again"
    assert finetune("made-up", data["sentinel-2", "class"], again, "--init", run).status == 0, "a run can be a source"


def test_another_image_size(data: dict[tuple[str, Kind], Path], explora_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    got = finetune("made-up", data["sentinel-2", "class"], run, "--init", explora_run, "--image-size", "24")
    assert got.status == 0, got.err
    encoder, spec = load_encoder(run)
    assert spec.image_size == 24
    assert encoder.forward_features(torch.zeros(1, 10, 24, 24)).shape[1] == 1 + 3 * 9


def test_the_bundled_sample(explora_run: Path, tmp_path: Path) -> None:
    """Masks of land use with unlabelled pixels, and classes, without a root."""
    words = ("--dataset", "sample", "--init", explora_run, "--tile-size", "32", "--max-steps", "1", "--batch-size", "8",
             "--accelerator", "cpu", "--num-workers", "0")  # fmt: skip
    for task in ("classification", "segmentation"):
        more = ("--task", task, *(("--head", "linear", "--tile-size", "64") if task == "segmentation" else ()))
        got = run_command("finetune", *words, *more, "--output", tmp_path / task)
        assert got.status == 0, got.err
        record = json.loads((tmp_path / task / "run.json").read_text())
        assert record["classes"] == ["farm", "forest", "meadow", "residential", "water"]


@pytest.mark.parametrize("loss", ["jaccard", "focal", "dice"])
def test_losses_with_an_ignored_value(explora_run: Path, tmp_path: Path, loss: str) -> None:
    targets = {
        split: np.where(np.random.default_rng(0).random((count, 16, 16)) < 0.3, 255, make_up("mask", count)[1])
        for split, count in COUNTS.items()
    }
    root = write_made_up(tmp_path / "data", "mask", targets=targets)
    words = ("--init", explora_run, "--task", "segmentation", "--head", "linear", "--ignore-index", "255")
    got = finetune("made-up", root, tmp_path / "run", *words, "--loss", loss)
    assert got.status == 0, got.err


@pytest.mark.parametrize("loss", ["jaccard", "focal"])
def test_other_losses_of_classes(
    data: dict[tuple[str, Kind], Path], explora_run: Path, tmp_path: Path, loss: str
) -> None:
    got = finetune("made-up", data["sentinel-2", "class"], tmp_path / "run", "--init", explora_run, "--loss", loss)
    assert got.status == 0, got.err
    got = finetune(
        "made-up", data["sentinel-2", "class"], tmp_path / "mixed", "--init", explora_run, "--loss", loss,
        "--mixup", "0.5",
    )  # fmt: skip
    assert "Traceback" not in got.err
    assert got.status in {0, 2}, "mixed labels: it works, or the combination is refused"
