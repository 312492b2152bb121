"""A fine-tuning that was killed and resumed equals one that was not; so do several processes among each other."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from geoexplora.runs.metrics import read_metrics
from geoexplora.tasks.finetune.exports import load_finetuned
from geoexplora.tasks.finetune.task import FineTuneTask
from geoexplora.weights.load import load_encoder

from ..conftest import run_command
from .helpers import FINE, finetune, write_made_up

LONG = ("--max-steps", "6", "--mixup", "0.4")
FORKED = ("--strategy", "ddp_fork", "--devices", "2")


def assert_equal(run: Path, reference: Path, comparable: Callable[[Path], Any]) -> None:
    assert comparable(run) == comparable(reference)
    names = [name for name in ("encoder.safetensors", "task_head.safetensors", "adapter/trained.safetensors",
                               "adapter/adapter_model.safetensors") if (reference / name).exists()]  # fmt: skip
    assert len(names) >= 2
    for name in names:
        one, other = load_file(run / name), load_file(reference / name)
        assert one.keys() == other.keys()
        assert all(one[key].equal(other[key]) for key in one), name
    assert (run / "predictions.csv").read_text() == (reference / "predictions.csv").read_text()
    first, second = (json.loads((path / "run.json").read_text()) for path in (run, reference))
    assert first["best"] == second["best"]
    assert first["source"] == second["source"]


def killed_when(process: Any, ready: Callable[[], bool], seconds: float = 60.0) -> bool:
    """Kill a process without warning once something is there; whether it was still running."""
    deadline = time.monotonic() + seconds
    while process.is_alive() and not ready() and time.monotonic() < deadline:
        time.sleep(0.002)
    running = bool(process.is_alive())
    process.kill()
    process.join()
    return running


@pytest.mark.parametrize("method", ["linear", "lora", "adalora", "full"])
def test_killed_after_a_checkpoint(
    start: Any, classes: Path, explora_run: Path, tmp_path: Path, comparable: Any, method: str
) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    words = ("--init", explora_run, "--method", method, *LONG)
    first = ("finetune", "--dataset", "made-up", "--root", classes, "--output", run, *FINE, *words)
    assert killed_when(start([str(word) for word in first]), (run / "checkpoints/previous.ckpt").exists)
    assert torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"] < 6
    assert finetune("made-up", classes, whole, *words).status == 0
    got = run_command("finetune", "--resume", run)
    assert got.status == 0, got.err
    assert "going on with" in got.err
    assert_equal(run, whole, comparable)


def test_killed_between_a_better_validation_and_its_checkpoint(
    classes: Path, explora_run: Path, tmp_path: Path, comparable: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best weights are then newer than last.ckpt; validations of a resumed run come again."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    words = ("--init", explora_run, *LONG, "--eval-every", "1", "--checkpoint-every", "2", "--patience", "9")
    assert finetune("made-up", classes, whole, *words).status == 0

    from geoexplora.tasks.finetune import validation

    save = validation.save_best

    def save_and_die(path: Path, task: Any, step: int, score: float) -> None:
        save(path, task, step, score)
        if task.trainer.global_step >= 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(validation, "save_best", save_and_die)
        got = finetune("made-up", classes, run, *words)
    assert got.status == 130, "some validation after step 2 is a better one"
    got = run_command("finetune", "--resume", run)
    assert got.status == 0, got.err
    assert_equal(run, whole, comparable)


def scored(patch: pytest.MonkeyPatch, scores: dict[int, float], dies: int | None = None) -> None:
    """Validations find these scores by step; a run dies right after the validation of a step."""
    from geoexplora.tasks.finetune.validation import Validation

    judge = Validation._judge

    def evaluate(self: Any, task: Any, bf16: bool) -> dict[str, float]:
        return {self.monitor: scores[task.trainer.global_step]}

    def judge_and_die(self: Any, step: int, *args: Any, **more: Any) -> None:
        judge(self, step, *args, **more)
        if step == dies:
            raise KeyboardInterrupt

    patch.setattr(Validation, "evaluate", evaluate)
    patch.setattr(Validation, "_judge", judge_and_die)


def names_in(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_a_better_validation_that_does_not_come_again(
    classes: Path, explora_run: Path, tmp_path: Path, comparable: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before its checkpoint, on a device that does not repeat to the bit: the best weights are those before."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    words = ("--init", explora_run, *LONG, "--eval-every", "1", "--checkpoint-every", "2")
    scores = {1: 0.1, 2: 0.5, 3: 0.3, 4: 0.3, 5: 0.3, 6: 0.3}
    with monkeypatch.context() as patch:
        scored(patch, scores)
        assert finetune("made-up", classes, whole, *words).status == 0
    assert names_in(whole) == ["best-2.pt", "last.ckpt", "previous.ckpt"]
    with monkeypatch.context() as patch:
        scored(patch, scores | {3: 0.9}, dies=3)
        assert finetune("made-up", classes, run, *words).status == 130
    assert torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 2
    assert names_in(run) == ["best-2.pt", "best-3.pt", "last.ckpt"]
    with monkeypatch.context() as patch:
        scored(patch, scores)
        got = run_command("finetune", "--resume", run)
    assert got.status == 0, got.err
    assert "best weights, of step 2" in got.err
    assert names_in(run) == names_in(whole)
    assert_equal(run, whole, comparable)


def test_a_damaged_last_checkpoint(
    classes: Path, explora_run: Path, tmp_path: Path, comparable: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one before it finds the best weights of then."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    words = ("--init", explora_run, *LONG, "--eval-every", "1", "--checkpoint-every", "2")
    scores = {1: 0.1, 2: 0.5, 3: 0.6, 4: 0.7, 5: 0.3, 6: 0.8}
    scored(monkeypatch, scores)
    assert finetune("made-up", classes, run, *words).status == 0
    assert names_in(run) == ["best-4.pt", "best-6.pt", "last.ckpt", "previous.ckpt"]
    scores[6] = 0.2
    assert finetune("made-up", classes, whole, *words).status == 0
    (run / "checkpoints/last.ckpt").write_bytes(b"PK")
    got = run_command("finetune", "--resume", run)
    assert got.status == 0, got.err
    assert "last.ckpt is damaged" in got.err
    assert_equal(run, whole, comparable)


def test_the_source_may_be_gone(classes: Path, explora_run: Path, tmp_path: Path, comparable: Any) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    source = shutil.copytree(explora_run, tmp_path / "source")
    assert finetune("made-up", classes, whole, "--init", source).status == 0
    shutil.copytree(whole, run)
    (run / "checkpoints/previous.ckpt").replace(run / "checkpoints/last.ckpt")
    shutil.rmtree(source)
    got = run_command("finetune", "--resume", run)
    assert got.status == 0, got.err
    assert_equal(run, whole, comparable)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run_that_stopped_early(
    classes: Path, explora_run: Path, tmp_path: Path, comparable: Any, method: str
) -> None:
    """Nothing is left to do; above all nothing is spoiled."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    words = ("--init", explora_run, "--method", method, "--lr", "1e-9", "--eval-every", "1", "--patience", "1")
    got = finetune("made-up", classes, whole, *words, "--max-steps", "9")
    assert got.status == 0, got.err
    assert "training stops at step 2" in got.err
    shutil.copytree(whole, run)
    got = run_command("finetune", "--resume", run)
    assert got.status == 0, got.err
    assert_equal(run, whole, comparable)
    one, other = (load_finetuned(path) for path in (run, whole))
    images = torch.randn(2, 10, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert one.model(images).equal(other.model(images))


def test_a_complete_run_stays_as_it_is(classes: Path, explora_run: Path, tmp_path: Path, comparable: Any) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert finetune("made-up", classes, whole, "--init", explora_run, "--max-steps", "2").status == 0
    shutil.copytree(whole, run)
    for name in ("predictions.csv", "plots/predictions.png", "encoder.safetensors"):
        (run / name).unlink()  # as if killed right after the last checkpoint
    got = run_command("finetune", "--resume", run)
    assert got.status == 0, got.err
    assert_equal(run, whole, comparable)
    assert (run / "plots/predictions.png").exists()


def test_a_longer_run(classes: Path, explora_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert finetune("made-up", classes, run, "--init", explora_run, "--max-steps", "2").status == 0
    got = run_command("finetune", "--resume", run, "--max-steps", "4")
    assert got.status == 0, got.err
    assert [row["step"] for row in read_metrics(run / "metrics.csv")] == [1, 2, 3, 4]
    got = run_command("finetune", "--resume", run, "--method", "full")
    assert got.status == 2
    assert "--method full differs from the run's lora" in got.err


def test_other_data(classes: Path, explora_run: Path, tmp_path: Path) -> None:
    run, own = tmp_path / "run", shutil.copytree(classes, tmp_path / "own")
    assert finetune("made-up", own, run, "--init", explora_run, "--max-steps", "2").status == 0
    before = (run / "metrics.csv").read_text()
    shutil.copy(own / "val.npz", own / "train.npz")
    got = run_command("finetune", "--resume", run, "--max-steps", "4")
    assert got.status == 2
    assert "the training data have changed since this run was started: 12 images then, 6 now" in got.err
    assert (run / "metrics.csv").read_text() == before


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], list[dict[str, torch.Tensor]]]:
    """Makes each process write its weights at the end of training; reads them."""

    def write(self: Any) -> None:
        torch.save(dict(self.state_dict()), tmp_path / f"rank{self.global_rank}.pt")

    monkeypatch.setattr(FineTuneTask, "on_train_end", write, raising=False)
    return lambda: [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_two_processes(
    classes: Path, explora_run: Path, tmp_path: Path, comparable: Any, ranks: Any, method: str
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    words = ("--init", explora_run, "--method", method, "--batch-size", "2", *FORKED)
    words += ("--rank", "8") * (method == "full")  # the default: of another one a warning says it is idle
    got = finetune("made-up", classes, whole, *words)
    assert got.status == 0, got.err
    assert "warning" not in got.err
    first, second = ranks()
    assert first.keys() == second.keys()
    assert all(first[name].equal(second[name]) for name in first)
    record = json.loads((whole / "run.json").read_text())
    assert record["step"] == 4
    if record["best"]["step"] == 4:
        head = load_file(whole / "task_head.safetensors")
        assert all(head[name].equal(first[f"model.head.{name}"]) for name in head)
    encoder, spec = load_encoder(whole)
    assert spec.image_size == 16
    assert encoder.norm.weight.isfinite().all()

    shutil.copytree(whole, run)
    (run / "checkpoints/previous.ckpt").replace(run / "checkpoints/last.ckpt")
    got = run_command("finetune", "--resume", run)
    assert got.status == 0, got.err
    assert_equal(run, whole, comparable)


def test_two_processes_stop_early_together(classes: Path, explora_run: Path, tmp_path: Path) -> None:
    words = ("--init", explora_run, "--method", "linear", "--lr", "1e-9", "--eval-every", "1", "--patience", "1")
    got = finetune("made-up", classes, tmp_path / "run", *words, "--batch-size", "2", "--max-steps", "9", *FORKED)
    assert got.status == 0, got.err
    assert [row["step"] for row in read_metrics(tmp_path / "run/metrics.csv")] == [1, 2]


def test_segmentation_by_two_processes(explora_run: Path, tmp_path: Path) -> None:
    """No trainable weight may be unused, whatever levels the head takes."""
    classes = write_made_up(tmp_path / "data", "mask")
    words = ("--task", "segmentation", "--method", "full", "--levels", "2,5", "--head", "upernet", "--head-width", "8")
    words = ("--init", explora_run, *words, "--max-steps", "2", "--batch-size", "2", *FORKED)
    got = finetune("made-up", classes, tmp_path / "run", *words)
    assert got.status == 0, got.err
