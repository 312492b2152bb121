"""The best weights: what is kept, put back, and when training stops."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from geoexplora.errors import RunError
from geoexplora.runs.folder import RunFolder
from geoexplora.runs.metrics import Metrics
from geoexplora.tasks import ExPLoRAClassification, ExPLoRASegmentation
from geoexplora.tasks.callbacks import StepClock
from geoexplora.tasks.finetune.best import best_weights, load_best, remove_outdated, save_best
from geoexplora.tasks.finetune.validation import Validation
from geoexplora.weights.load import build_encoder
from geoexplora.weights.spec import EncoderSpec

NORMALIZATION = {"method": "standardize", "bands": ["R", "G", "B"], "mean": [0.0] * 3, "std": [1.0] * 3}


def task_of(task_class: Any = ExPLoRAClassification, **more: Any) -> Any:
    torch.manual_seed(0)
    spec = EncoderSpec.of(
        "vit_pico", image_size=16, patch_size=8, sensor="rgb", bands=("R", "G", "B"), normalization=NORMALIZATION
    )
    return task_class(encoder=build_encoder(spec), spec=spec.to_metadata(), num_classes=3, **more)


def moved(task: Any) -> None:
    """What a training changes: trainable weights, and statistics of norms."""
    with torch.no_grad():
        for parameter in task.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
        for buffer in task.model.head.buffers():
            if buffer.is_floating_point():
                buffer.add_(1.0)


@pytest.mark.parametrize("method", ["linear", "lora", "adalora", "dora", "full"])
def test_weights_come_back(tmp_path: Path, method: Any) -> None:
    task = task_of(method=method, rank=2, total_steps=9)
    moved(task)
    kept = {name: value.clone() for name, value in task.state_dict().items()}
    save_best(tmp_path / "best.pt", task, 7, 0.5)
    moved(task)
    assert any(not value.equal(kept[name]) for name, value in task.state_dict().items())
    assert load_best(tmp_path / "best.pt", task) == 7
    assert all(value.equal(kept[name]) for name, value in task.state_dict().items())


def test_statistics_of_norms_come_back(tmp_path: Path) -> None:
    task = task_of(ExPLoRASegmentation, head="linear")
    task.model.head.add_module("norm", torch.nn.BatchNorm2d(3))
    kept = {name: value.clone() for name, value in task.model.head.named_buffers()}
    save_best(tmp_path / "best.pt", task, 1, 0.5)
    moved(task)
    load_best(tmp_path / "best.pt", task)
    assert all(value.equal(kept[name]) for name, value in task.model.head.named_buffers())


def test_only_what_is_trained_is_kept(tmp_path: Path) -> None:
    task = task_of(rank=2)
    save_best(tmp_path / "best.pt", task, 1, 0.5)
    stored = torch.load(tmp_path / "best.pt", weights_only=True)["tensors"]
    trained = {name for name, weight in task.named_parameters() if weight.requires_grad}
    assert set(stored) == trained


def test_weights_of_another_task_or_none(tmp_path: Path) -> None:
    save_best(tmp_path / "best.pt", task_of(rank=2), 1, 0.5)
    with pytest.raises(RunError, match="another task"):
        load_best(tmp_path / "best.pt", task_of(method="full"))
    with pytest.raises(RunError, match="cannot read the best weights"):
        load_best(tmp_path / "none.pt", task_of())
    (tmp_path / "broken.pt").write_bytes(b"broken")
    with pytest.raises(RunError, match="cannot read the best weights"):
        load_best(tmp_path / "broken.pt", task_of())


def validation_of(tmp_path: Path, mode: str = "max", patience: int | None = 2) -> Validation:
    datamodule: Any = SimpleNamespace()
    metrics, best_file = Metrics(tmp_path / "metrics.csv"), RunFolder(tmp_path).best_file
    return Validation(datamodule, metrics, best_file, 1, "val_X", mode, patience, StepClock())


@pytest.mark.parametrize(
    ("mode", "scores", "best", "stopped"),
    [
        ("max", [0.1, 0.3, 0.2, 0.25], 2, True),
        ("max", [0.1, 0.1, 0.2, 0.1], 3, False),
        ("min", [5.0, 4.0, 4.5, 3.0], 4, False),
        ("min", [-1.0, -1.0, -1.0], 1, True),
    ],
)
def test_judgement(tmp_path: Path, mode: str, scores: list[float], best: int, stopped: bool) -> None:
    validation, task = validation_of(tmp_path, mode), task_of(method="linear")
    for step, score in enumerate(scores, start=1):
        validation._judge(step, score, task, is_last=False)
    assert validation.best_step == best
    assert validation.has_stopped == stopped
    assert torch.load(tmp_path / f"checkpoints/best-{best}.pt", weights_only=True)["step"] == best
    other = validation_of(tmp_path, mode)
    other.load_state_dict(validation.state_dict())
    assert other.state_dict() == validation.state_dict()
    assert other.has_stopped == stopped
    assert not validation_of(tmp_path, patience=None).has_stopped


def test_a_score_of_zero_is_a_score(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "geoexplora"):
        validation_of(tmp_path)._judge(1, 0.0, task_of(method="linear"), is_last=False)
    assert "nan" not in caplog.text
    assert "best 0.0000" in caplog.text


@pytest.mark.parametrize("score", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("mode", ["max", "min"])
def test_a_score_that_is_none(tmp_path: Path, score: float, mode: str) -> None:
    """At once: a run must not learn for days what nothing can be chosen by."""
    validation, task = validation_of(tmp_path, mode), task_of(method="linear")
    with pytest.raises(RunError, match=r"val_X is -?(nan|inf) at the validation of step 1") as problem:
        validation._judge(1, score, task, is_last=False)
    assert "take another --monitor" in str(problem.value)
    validation._judge(1, 0.5, task, is_last=False)
    with pytest.raises(RunError, match="at the validation of step 2"):
        validation._judge(2, score, task, is_last=True)
    with torch.no_grad():
        task.model.head.weight.fill_(float("nan"))
    with pytest.raises(RunError, match="the training diverged"):
        validation._judge(3, score, task, is_last=False)


def stepped(task: Any, step: int) -> None:
    """AdaLoRA's budget after a step."""
    for parameter in task.encoder.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn_like(parameter)
    task.fine_tuning.after_step(step)


def test_ranks_fall_before_weights_can_be_the_best(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    task, validation = task_of(method="adalora", rank=2, total_steps=8), validation_of(tmp_path, patience=2)
    with caplog.at_level(logging.INFO, "geoexplora"):
        for step, score in enumerate([0.9, 0.8, 0.7, 0.5, 0.4, 0.6], start=1):
            stepped(task, step)
            validation._judge(step, score, task, is_last=False)
            assert (validation.best_step == 0) == (step < 4), "ranks fall during the first half"
            ranks = task.fine_tuning.ranks()
            assert validation.best_step == 0 or sum(ranks.values()) == 2 * len(ranks)
    assert (validation.best_step, validation.best_score, validation.waited) == (6, 0.6, 0)
    assert caplog.text.count("as soon as AdaLoRA's ranks have fallen to 2 on average") == 1
    assert "validation at step 3: val_X 0.7000, best none yet" in caplog.text


def test_the_last_weights_count_whatever_their_ranks(tmp_path: Path) -> None:
    """A run of a single step has no time for ranks to fall."""
    task, validation = task_of(method="adalora", rank=2, total_steps=1), validation_of(tmp_path)
    stepped(task, 1)
    validation._judge(1, 0.5, task, is_last=True)
    assert load_best(tmp_path / "checkpoints/best-1.pt", task) == 1


@pytest.mark.parametrize("method", ["lora", "adalora", "full"])
def test_best_weights_for_a_while(tmp_path: Path, method: Any) -> None:
    task = task_of(method=method, rank=2, total_steps=9)
    best = {name: value.clone() for name, value in task.state_dict().items()}
    save_best(tmp_path / "best.pt", task, 3, 0.5)
    moved(task)
    current = {name: value.clone() for name, value in task.state_dict().items()}
    with best_weights(tmp_path / "best.pt", task) as step:
        assert step == 3
        assert all(value.equal(best[name]) for name, value in task.state_dict().items())
    assert all(value.equal(current[name]) for name, value in task.state_dict().items())
    assert any(not value.equal(best[name]) for name, value in current.items())
    with pytest.raises(ZeroDivisionError), best_weights(tmp_path / "best.pt", task):
        raise ZeroDivisionError
    assert all(value.equal(current[name]) for name, value in task.state_dict().items())


def test_what_no_checkpoint_knows_is_removed(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.checkpoints.mkdir()

    def left() -> list[str]:
        return sorted(path.name for path in folder.checkpoints.iterdir() if path.suffix == ".pt")

    for step in (2, 4, 6, 8):
        folder.best_file(step).write_bytes(b"weights")
    for path, step in ((folder.last_checkpoint, 6), (folder.previous_checkpoint, 4)):
        torch.save({"callbacks": {"Validation": {"best_step": step}}}, path)
    remove_outdated(folder, "Validation")
    assert left() == ["best-4.pt", "best-6.pt"]
    folder.previous_checkpoint.unlink()
    whole = folder.last_checkpoint.read_bytes()
    folder.last_checkpoint.write_bytes(whole[: len(whole) // 2])
    remove_outdated(folder, "Validation")
    assert left() == ["best-4.pt", "best-6.pt"], "what a damaged checkpoint knows is not removed"
    folder.last_checkpoint.write_bytes(whole)
    remove_outdated(folder, "Validation")
    assert left() == ["best-6.pt"]
