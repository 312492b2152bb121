"""The best weights: what is kept, put back, and when training stops."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from geoexplora.errors import RunError
from geoexplora.runs.metrics import Metrics
from geoexplora.tasks import ExPLoRAClassification, ExPLoRASegmentation
from geoexplora.tasks.callbacks import StepClock
from geoexplora.tasks.finetune.validation import Validation, load_best, save_best
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
    metrics = Metrics(tmp_path / "metrics.csv")
    return Validation(datamodule, metrics, tmp_path / "best.pt", 1, "val_X", mode, patience, StepClock())


@pytest.mark.parametrize(
    ("mode", "scores", "best", "stopped"),
    [
        ("max", [0.1, 0.3, 0.2, 0.25], 2, True),
        ("max", [0.1, 0.1, 0.2, 0.1], 3, False),
        ("min", [5.0, 4.0, 4.5, 3.0], 4, False),
        ("min", [-1.0, -1.0, -1.0], 1, True),
        ("max", [0.0, float("nan"), float("nan")], 1, True),
        ("max", [float("nan"), 0.0, 0.1], 3, False),
    ],
)
def test_judgement(tmp_path: Path, mode: str, scores: list[float], best: int, stopped: bool) -> None:
    validation, task = validation_of(tmp_path, mode), task_of(method="linear")
    for step, score in enumerate(scores, start=1):
        validation._judge(step, score, task)
    assert validation.best_step == best
    assert validation.has_stopped == stopped
    assert torch.load(tmp_path / "best.pt", weights_only=True)["step"] == best
    other = validation_of(tmp_path, mode)
    other.load_state_dict(validation.state_dict())
    assert other.state_dict() == validation.state_dict()
    assert other.has_stopped == stopped
    assert not validation_of(tmp_path, patience=None).has_stopped


def test_a_score_of_zero_is_a_score(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "geoexplora"):
        validation_of(tmp_path)._judge(1, 0.0, task_of(method="linear"))
    assert "nan" not in caplog.text
    assert "best 0.0000" in caplog.text
