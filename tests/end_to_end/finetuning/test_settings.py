"""Settings of ``geoexplora finetune``: what they change of a run, and that the same ones repeat it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

from geoexplora.runs.metrics import read_metrics
from geoexplora.weights.load import load_encoder

from ..conftest import run_command
from .helpers import (
    BANDS,
    COUNTS,
    Kind,
    dataset_of,
    finetune,
    make_up,
    write_made_up,
)


def the_same(one: Path, other: Path) -> None:
    first, second = load_file(one), load_file(other)
    assert first.keys() == second.keys()
    assert all(first[name].equal(second[name]) for name in first), one.name


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
    assert torch.load(run / f"checkpoints/best-{best}.pt", weights_only=True)["step"] == best

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
    assert got.status == 2, "shares of classes are no classes"
    assert f"--mixup makes shares of classes, which --loss {loss} does not take" in got.err
