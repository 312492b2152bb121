"""Progress of a training: a bar on a terminal, plain log lines otherwise."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, TQDMProgressBar

log = logging.getLogger(__name__)


def progress_callback(description: str = "Training", seconds: float = 10.0) -> ProgressBar:
    """The progress callback that suits where the output goes.

    Leave the trainer's ``enable_progress_bar`` as it is: Lightning then takes this one instead of its own. Both kinds
    show what the task logs with ``prog_bar=True``, on rank zero only. ``at_step`` there is the step that the values are
    of, which are not logged at each one.

    Args:
        description: what is going on.
        seconds: least time between two plain lines.
    """
    return TerminalProgress(description) if sys.stdout.isatty() else PlainProgress(description, seconds)


class TerminalProgress(TQDMProgressBar):
    """Lightning's bar with a description of the work instead of an epoch's number, since training goes by steps.

    Args:
        description: what is going on.
    """

    def __init__(self, description: str = "Training") -> None:
        super().__init__(leave=True)
        self.description = description

    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        """Name the work."""
        super().on_train_epoch_start(trainer)
        self.train_progress_bar.set_description(self.description)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """What stands behind the bar."""
        metrics = _shown(super().get_metrics(trainer, pl_module))
        if "at_step" in metrics:
            metrics["at_step"] = f"{metrics['at_step']:.0f}"
        return metrics


class PlainProgress(ProgressBar):
    """Log lines such as ``Training: step 120 of 1000, loss 0.412 at step 100, 3.1 steps/s, 4:44 left``.

    The first step, the last one, and in between one line every so many seconds.

    Args:
        description: what is going on.
        seconds: least time between two lines.
    """

    def __init__(self, description: str = "Training", seconds: float = 10.0) -> None:
        super().__init__()
        self.description = description
        self.seconds = seconds
        self._enabled = True
        self._start_step = 0
        self._start_time = 0.0
        self._last_step = 0
        self._last_time = 0.0

    def disable(self) -> None:
        """Say nothing from now on; Lightning calls it on other ranks than zero."""
        self._enabled = False

    def enable(self) -> None:
        """Speak again."""
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._start_step = self._last_step = trainer.global_step
        self._start_time = self._last_time = time.monotonic()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Log a line if it is time."""
        step, now = trainer.global_step, time.monotonic()
        if not self._enabled or step == self._last_step:
            return
        total = _total_steps(trainer)
        first = self._last_step == self._start_step
        if first or step == total or now - self._last_time >= self.seconds:
            log.info(self._line(step, total, now, self.get_metrics(trainer, pl_module)))
            self._last_step, self._last_time = step, now

    def _line(self, step: int, total: int | None, now: float, metrics: dict[str, Any]) -> str:
        parts = [f"{self.description}: step {step}" + (f" of {total}" if total else "")]
        metrics = _shown(metrics)
        at = round(metrics.pop("at_step", step))
        when = f" at step {at}" if at != step else ""
        parts += [f"{name} {_short(value)}{when}" for name, value in metrics.items()]
        rate = (step - self._start_step) / max(now - self._start_time, 1e-9)
        parts.append(f"{rate:.3g} steps/s")
        if total and total > step:
            parts.append(f"{_duration((total - step) / rate)} left")
        return ", ".join(parts)


def _shown(metrics: dict[str, Any]) -> dict[str, Any]:
    """Without the number of Lightning's log folder."""
    return {name: value for name, value in metrics.items() if name != "v_num"}


def _total_steps(trainer: Trainer) -> int | None:
    total = trainer.max_steps if trainer.max_steps > 0 else trainer.estimated_stepping_batches
    return int(total) if total != float("inf") else None


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
