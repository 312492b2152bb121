"""Validation during fine-tuning: the best weights are kept, and training stops when nothing gets better."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from geoexplora.datamodules.tiles import TilesDataModule
from geoexplora.errors import RunError
from geoexplora.runs.metrics import Metrics
from geoexplora.tasks.callbacks import StepClock, check_finite
from geoexplora.tasks.finetune.best import save_best
from geoexplora.tasks.finetune.evaluation import evaluate

log = logging.getLogger(__name__)


class Validation(Callback):
    """Evaluates on the validation split every N optimizer steps and after the last, and keeps the best weights.

    The first process evaluates, and the others wait. It runs before checkpoints are written, so that a resumed run
    has the same validations as an uninterrupted one.

    Of AdaLoRA only the weights from when its ranks have fallen to the average that was asked for, and of any method
    those of the last step, can be the best.

    Args:
        datamodule: with a split ``val``.
        metrics: receives columns ``val_*``.
        best_file: where the best weights are kept, by their step.
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
        best_file: Callable[[int], Path],
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
        self._has_told_ranks = False

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
            self._judge(step, scores[self.monitor], task, is_last=step == trainer.max_steps)
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

    def _judge(self, step: int, score: float, task: Any, *, is_last: bool) -> None:
        """Keep the weights if they are the best.

        Raises:
            RunError: if the score is not finite: the weights cannot be compared by it.
        """
        if not math.isfinite(score):
            check_finite(task.model)
            raise RunError(
                f"{self.monitor} is {score:g} at the validation of step {step}: no best weights can be chosen by it",
                "Check that the validation split has labels beside the ignored value, or take another --monitor; if the"
                " loss is too large to be told, start anew with a lower --lr.",
            )
        if not is_last and not task.fine_tuning.has_final_ranks:
            if not self._has_told_ranks:
                rank = task.fine_tuning.config.rank
                log.info("the best weights are chosen as soon as AdaLoRA's ranks have fallen to %d on average", rank)
                self._has_told_ranks = True
        elif self.best_score is None or self.sign * score > self.sign * self.best_score:
            self.best_score, self.best_step, self.waited = score, step, 0
            save_best(self.best_file(step), task, step, score)
        else:
            self.waited += 1
        best = "none yet" if self.best_score is None else f"{self.best_score:.4f}"
        log.info("validation at step %d: %s %.4f, best %s", step, self.monitor, score, best)
