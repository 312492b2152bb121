from __future__ import annotations

import logging
import sys
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from geoexplora.runs.progress import PlainProgress, TerminalProgress, progress_callback


class Task(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch: torch.Tensor) -> torch.Tensor:
        loss = self.layer(batch.float()).square().mean()
        self.log("loss", 0.125, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(progress: pl.Callback, task: Task | None = None, **options: Any) -> None:
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[progress],
        **({"max_steps": 6} | options),
    )
    trainer.fit(task or Task(), DataLoader(torch.arange(12)[:, None], batch_size=2))


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "geoexplora.runs.progress"]


def test_plain_lines(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        train(PlainProgress("Pre-training", seconds=1000))
    first, last = lines(caplog)
    assert first.startswith("Pre-training: step 1 of 6")
    assert first.endswith(" left")
    assert last.startswith("Pre-training: step 6 of 6, loss 0.125, ")
    assert last.endswith("steps/s")


class SometimesLogged(Task):
    """Logs at steps 1 and 4 only, as the rows of the metrics come."""

    def training_step(self, batch: torch.Tensor) -> torch.Tensor:
        step = self.global_step + 1
        if step in {1, 4}:
            self.log("loss", float(step), prog_bar=True)
            self.log("at_step", float(step), prog_bar=True)
        return self.layer(batch.float()).square().mean()


def test_an_older_loss_says_of_which_step_it_is(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        train(PlainProgress(seconds=0), SometimesLogged())
    at_1, at_4 = "loss 1 at step 1", "loss 4 at step 4"
    assert [line.split(", ")[1] for line in lines(caplog)] == ["loss 1", at_1, at_1, "loss 4", at_4, at_4]


def test_bar_says_of_which_step_the_loss_is(capsys: pytest.CaptureFixture[str]) -> None:
    train(TerminalProgress(), SometimesLogged())
    assert "loss=4.000, at_step=4]" in capsys.readouterr().out


def test_lines_count_optimizer_steps(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        train(PlainProgress(seconds=0), max_steps=-1, max_epochs=1, accumulate_grad_batches=2)
    assert [line.split(",")[0] for line in lines(caplog)] == [f"Training: step {step} of 3" for step in (1, 2, 3)]


def test_disabled(caplog: pytest.LogCaptureFixture) -> None:
    progress = PlainProgress()
    progress.disable()
    with caplog.at_level(logging.INFO):
        train(progress)
    assert lines(caplog) == []


def test_terminal_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False)
    assert isinstance(progress_callback(), PlainProgress)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert isinstance(progress_callback("Probing"), TerminalProgress)


def test_bar(capsys: pytest.CaptureFixture[str]) -> None:
    train(TerminalProgress("Pre-training"))
    assert "Pre-training: 100%" in capsys.readouterr().out
