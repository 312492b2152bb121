"""The folder of a fine-tuning is complete after every checkpoint, wherever validations fall."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from geoexplora.runs.metrics import read_metrics
from geoexplora.tasks.finetune import finetuning
from geoexplora.tasks.finetune.exports import load_finetuned

from ..conftest import run_command
from .helpers import finetune

EXPORTED = ("encoder.safetensors", "task_head.safetensors", "adapter/adapter_model.safetensors")


def killed_after_checkpoint(step: int, classes: Path, run: Path, *words: object) -> dict[str, torch.Tensor]:
    """A run that ends without warning as soon as a checkpoint is complete; the weights that were trained then."""
    update, weights = finetuning._update, {}

    def update_and_die(folder: Any, at: int, monitor: str) -> None:
        update(folder, at, monitor)
        if at == step:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetuning, "_update", update_and_die)
        assert finetune("made-up", classes, run, *words).status == 130
    checkpoint = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == step
    weights.update(checkpoint["state_dict"])
    return weights


def steps_in(run: Path) -> set[str]:
    """What the exported files say of themselves."""
    found = set()
    for name in EXPORTED[:2]:
        with safe_open(run / name, "pt") as file:
            found.add(file.metadata()["step"])
    return found


def assert_head(run: Path, weights: dict[str, torch.Tensor]) -> None:
    head = load_file(run / "task_head.safetensors")
    assert head
    assert all(value.equal(weights[f"model.head.{name}"]) for name, value in head.items())


@pytest.mark.parametrize("method", ["lora", "adalora", "full"])
def test_the_best_weights_between_validations(
    classes: Path, explora_run: Path, tmp_path: Path, comparable: Any, method: str
) -> None:
    """Validated at step 2 only (AdaLoRA: at 4), saved at 3 and 6: the files are those of the validation."""
    every, dies = (4, 6) if method == "adalora" else (2, 3)
    words = ("--init", explora_run, "--method", method, "--max-steps", "8", "--eval-every", every,
             "--checkpoint-every", "3", "--lr", "0.05")  # fmt: skip
    run, whole = tmp_path / "run", tmp_path / "whole"
    current = killed_after_checkpoint(dies, classes, run, *words)
    assert all((run / name).exists() for name in EXPORTED if method != "full" or "adapter" not in name)
    best = torch.load(run / f"checkpoints/best-{every}.pt", weights_only=True)
    assert best["step"] == every
    assert steps_in(run) == {str(every)}
    assert_head(run, best["tensors"])
    assert any(not value.equal(current[name]) for name, value in best["tensors"].items()), "training had gone on"
    task = load_finetuned(run)
    assert task.model(torch.zeros(1, 10, 16, 16)).isfinite().all()

    assert finetune("made-up", classes, whole, *words).status == 0
    assert run_command("finetune", "--resume", run).status == 0
    assert comparable(run) == comparable(whole)
    for name in EXPORTED:
        if (whole / name).exists():
            one, other = load_file(run / name), load_file(whole / name)
            assert all(one[key].equal(other[key]) for key in one | other), name


def test_exporting_leaves_training_alone(classes: Path, explora_run: Path, tmp_path: Path, comparable: Any) -> None:
    """Other weights are swapped in and out at some checkpoints; the steps afterwards are the same to the bit."""
    words = ("--init", explora_run, "--max-steps", "7", "--eval-every", "2")
    often, once = tmp_path / "often", tmp_path / "once"
    assert finetune("made-up", classes, often, *words, "--checkpoint-every", "3").status == 0
    assert finetune("made-up", classes, once, *words, "--checkpoint-every", "99").status == 0
    assert comparable(often) == comparable(once)
    states = [torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"] for run in (often, once)]
    assert all(value.equal(states[1][name]) for name, value in states[0].items())


def test_before_the_first_validation(classes: Path, explora_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ("--init", explora_run, "--max-steps", "6", "--eval-every", "5", "--checkpoint-every", "1")
    current = killed_after_checkpoint(2, classes, run, *words)
    assert all((run / name).exists() for name in EXPORTED)
    assert not list(run.glob("checkpoints/best*"))
    assert steps_in(run) == {"2"}
    assert_head(run, current)
    got = run_command("finetune", "--resume", run)
    assert got.status == 0, got.err
    assert [row["step"] for row in read_metrics(run / "metrics.csv") if "val_loss" in row] == [5, 6]
