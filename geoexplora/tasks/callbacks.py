"""What every training writes down while it runs, and the clock that times its steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from geoexplora.errors import RunError
from geoexplora.runs.metrics import Metrics
from geoexplora.tasks.features import feature_health
from geoexplora.tasks.health import FinitenessGuard, HealthWatch
from geoexplora.weights.write import not_finite

DIVERGED = (
    "Start anew with a lower --lr, more --warmup-steps or --clip-grad, or --precision 32. "
    "The last checkpoint is from before."
)


def check_finite(model: nn.Module) -> None:
    """Refuse weights that a checkpoint must not replace good ones by.

    Args:
        model: what is trained.

    Raises:
        RunError: if a trained weight is not finite.
    """
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    if bad := not_finite(trained):
        raise RunError(f"the training diverged: {len(bad)} tensors hold NaN or Inf, such as {bad[0]}", DIVERGED)


class StepClock:
    """Measures the time that steps take, data included, without that of probes and checkpoints."""

    def __init__(self) -> None:
        self._begin = time.perf_counter()
        self._pause: float | None = None

    def pause(self) -> None:
        """Stop counting."""
        self._pause = time.perf_counter()

    def go_on(self) -> None:
        """Count again."""
        if self._pause is not None:
            self._begin += time.perf_counter() - self._pause
            self._pause = None

    def lap(self) -> float:
        """Seconds counted since the last lap, or since the start."""
        now = time.perf_counter()
        seconds, self._begin = now - self._begin, now
        return seconds


class MetricsWriter(Callback):
    """Writes a row of metrics.csv every N optimizer steps, and after the first and the last one.

    The loss and its parts are those of the step (the mean over its batches and processes), so that the rows of a
    resumed run equal those of an uninterrupted one.

    Args:
        metrics: the run's metrics.
        every_n_steps: N.
        images_per_step: effective batch size.
        clock: paused where something else than steps takes time.
        watch: judges each row; None: nobody does.
        names: what to call the sample of an index.
    """

    def __init__(
        self,
        metrics: Metrics,
        every_n_steps: int,
        images_per_step: int,
        clock: StepClock,
        watch: HealthWatch | None,
        names: Callable[[int], str] = str,
    ) -> None:
        self.clock = clock
        self.metrics = metrics
        self.every_n_steps = every_n_steps
        self.images_per_step = images_per_step
        self.watch = watch
        self.names = names
        self._guard = FinitenessGuard()
        self._outputs: list[dict[str, Any]] = []
        self._norm = self._rate = self._decay = float("nan")
        self._step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._step = self._timed_from = trainer.global_step
        self.clock.lap()

    def _is_logged(self, step: int, trainer: Trainer) -> bool:
        return step % self.every_n_steps == 0 or step in {1, trainer.max_steps}

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Take the norm of the gradient, before it is clipped, and the rates, before they move on."""
        if self._is_logged(trainer.global_step + 1, trainer):
            self._rate = max(group["lr"] for group in optimizer.param_groups)
            self._decay = max(group["weight_decay"] for group in optimizer.param_groups)
            grads = [p.grad for p in pl_module.parameters() if p.grad is not None]
            self._norm = float(torch.nn.utils.get_total_norm(grads))

    def check(self, step: int) -> None:
        """Look at what has been collected of losses since the last time.

        Raises:
            RunError: if one was not finite; names the samples.
        """
        if problem := self._guard.verdict(self.names):
            raise RunError(f"the training diverged: by step {step}, {problem}", DIVERGED)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Collect the batches of a step, and write the step down.

        Raises:
            RunError: if the loss was not finite since the last row.
        """
        self._guard.note(outputs["value"], batch)
        self._outputs.append({name: outputs[name] for name in ("value", "parts", "features") if name in outputs})
        step = trainer.global_step
        if step == self._step:
            return
        self._step = step
        collected, self._outputs = self._outputs, []
        if not self._is_logged(step, trainer):
            return
        self.check(step)
        parts = {"loss": [one["value"] for one in collected]}
        parts |= {name: [one["parts"][name] for one in collected] for name in collected[0]["parts"]}
        means = torch.stack([torch.stack(values).float().mean().to(pl_module.device) for values in parts.values()])
        means = trainer.strategy.reduce(means, reduce_op="mean")
        if trainer.is_global_zero:
            rate = (step - self._timed_from) * self.images_per_step / self.clock.lap()
            self._timed_from = step
            row = {"step": step, **dict(zip(parts, means.tolist(), strict=True))}
            row |= {"lr": self._rate, "weight_decay": self._decay, "grad_norm": self._norm}
            features = torch.cat([one["features"] for one in collected if "features" in one] or [torch.empty(0)])
            row |= feature_health(features) if len(features) > 1 else {}
            self.metrics.append(row | {"images_per_second": rate})
            if self.watch is not None:
                self.watch(row)
        pl_module.log("loss", float(means[0]), prog_bar=True, rank_zero_only=True)
        pl_module.log("at_step", float(step), prog_bar=True, rank_zero_only=True)  # shown until the next row
