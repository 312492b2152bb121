from __future__ import annotations

import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from geoexplora.runs.folder import RunFolder
from geoexplora.tasks.trainer import make_trainer


class Task(pl.LightningModule):
    """Notes what SIGTERM would do during the training."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.handlers: list[Any] = []

    def training_step(self, batch: torch.Tensor) -> torch.Tensor:
        self.handlers.append(signal.getsignal(signal.SIGTERM))
        return self.layer(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


OPTIONS = SimpleNamespace(accelerator="cpu", devices=1, num_nodes=1, strategy="auto", precision="32", clip_grad=None)


def handler(*_: Any) -> None: ...


@pytest.mark.parametrize("own", [signal.SIG_DFL, handler])
def test_sigterm_does_in_training_what_it_did_before(tmp_path: Path, own: Any) -> None:
    """Lightning's handler would let it end with exit status 0."""
    task = Task()
    schedule: Any = SimpleNamespace(steps=2, accumulate=1)
    trainer = make_trainer(OPTIONS, schedule, RunFolder(tmp_path), [])
    before = signal.signal(signal.SIGTERM, own)
    try:
        trainer.fit(task, DataLoader(list(torch.zeros(4, 1)), batch_size=2))  # type: ignore[arg-type]
        assert [*task.handlers, signal.getsignal(signal.SIGTERM)] == [own] * 3
    finally:
        signal.signal(signal.SIGTERM, before)
