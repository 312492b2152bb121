"""Validation during fine-tuning: the best weights are kept, and training stops when nothing gets better."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from geoexplora.datamodules.tiles import TilesDataModule
from geoexplora.errors import RunError
from geoexplora.runs.metrics import Metrics
from geoexplora.tasks.callbacks import StepClock
from geoexplora.tasks.finetune.evaluation import evaluate
from geoexplora.tasks.finetune.task import FineTuneTask
from geoexplora.weights.atomic import atomic_path

log = logging.getLogger(__name__)


class Validation(Callback):
    """Evaluates on the validation split every N optimizer steps and after the last, and keeps the best weights.

    The first process evaluates, and the others wait. It runs before checkpoints are written, so that a resumed run
    has the same validations as an uninterrupted one.

    Args:
        datamodule: with a split ``val``.
        metrics: receives columns ``val_*``.
        best_file: where the best weights are kept.
        every_n_steps: N.
        monitor: the metric that decides, as in metrics.csv; ``val_loss`` too.
        mode: ``max`` or ``min``.
        patience: validations without a better value before training stops; None: it never does.
        clock: paused during a validation.
    """

    def __init__(
        self,
        datamodule: TilesDataModule,
        metrics: Metrics,
        best_file: Path,
        every_n_steps: int,
        monitor: str,
        mode: str,
        patience: int | None,
        clock: StepClock,
    ) -> None:
        self.datamodule = datamodule
        self.metrics = metrics
        self.best_file = best_file
        self.every_n_steps = every_n_steps
        self.monitor = monitor
        self.sign = 1.0 if mode == "max" else -1.0
        self.patience = patience
        self.clock = clock
        self.best_score: float | None = None
        self.best_step = 0
        self.waited = 0
        self._step = 0

    @property
    def has_stopped(self) -> bool:
        """Whether patience is at its end."""
        return self.patience is not None and self.waited >= self.patience

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on from."""
        return {"best_score": self.best_score, "best_step": self.best_step, "waited": self.waited}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self.best_score, self.best_step, self.waited = (
            state_dict[name] for name in ("best_score", "best_step", "waited")
        )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember where training starts."""
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Evaluate after every N-th optimizer step and after the last."""
        step = trainer.global_step
        if step != self._step and (step % self.every_n_steps == 0 or step == trainer.max_steps):
            self.clock.pause()
            self._validate(trainer, pl_module)
            self.clock.go_on()
        self._step = step

    def _validate(self, trainer: Trainer, task: Any) -> None:
        step = trainer.global_step
        state: dict[str, Any] = {}
        if trainer.is_global_zero:
            scores = self.evaluate(task, trainer.precision == "bf16-mixed")
            self.metrics.append({"step": step, **scores})
            self._judge(step, scores[self.monitor], task)
            state = self.state_dict()
        self.load_state_dict(trainer.strategy.broadcast(state))
        if self.has_stopped:
            if trainer.is_global_zero:
                log.info("no better %s in %d validations: training stops at step %d", self.monitor, self.waited, step)
            trainer.should_stop = True

    def evaluate(self, task: Any, bf16: bool) -> dict[str, float]:
        """Scores on the validation split, as metrics.csv names them."""
        check = partial(self.datamodule.check_unreadable, split="val")
        loader = self.datamodule.eval_dataloader("val")
        found = evaluate(task, loader, torch.bfloat16 if bf16 else None, check)
        return {f"val_{name}": value for name, value in found.overall().items()}

    def _judge(self, step: int, score: float, task: Any) -> None:
        better = self.best_score is None or self.sign * score > self.sign * self.best_score
        if better and math.isfinite(score):
            self.best_score, self.best_step, self.waited = score, step, 0
            save_best(self.best_file, task, step, score)
        else:
            self.waited += 1
        best = math.nan if self.best_score is None else self.best_score
        log.info("validation at step %d: %s %.4f, best %.4f", step, self.monitor, score, best)


def save_best(path: Path, task: FineTuneTask, step: int, score: float) -> None:
    """Keep what is trained, and the statistics of the head's norms.

    Args:
        path: the file to write, whole or not at all.
        task: the task.
        step: optimizer steps done.
        score: the monitored metric.

    Raises:
        RunError: if it cannot be written.
    """
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        torch.save({"tensors": _changing(task), "step": step, "score": score}, file)


def load_best(path: Path, task: FineTuneTask) -> int:
    """Put the best weights back, in place.

    Returns:
        The optimizer step that they are of.

    Raises:
        RunError: if the file is missing or not of this task.
    """
    try:
        stored: Mapping[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        tensors = stored["tensors"]
    except (OSError, RuntimeError, EOFError, ValueError, LookupError, TypeError, UnpicklingError) as problem:
        raise RunError(f"cannot read the best weights {path}: {problem}", "Resume the run, or start anew.") from problem
    if tensors.keys() != _changing(task).keys():
        raise RunError(f"{path} holds the weights of another task", "Start the run anew with another --output.")
    task.load_state_dict(tensors, strict=False)
    return int(stored["step"])


def _changing(task: FineTuneTask) -> dict[str, Tensor]:
    """What training changes of a model, by name."""
    frozen = {name for name, parameter in task.named_parameters() if not parameter.requires_grad}
    return {
        name: value for name, value in task.state_dict().items() if name.startswith("model.") and name not in frozen
    }
