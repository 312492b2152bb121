"""What all tasks share: steps that a resumed run repeats, and AdamW with warm-up and cosine by optimizer step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torchgeo.tasks import BaseTask

from geoexplora.datamodules.sampling import generator
from geoexplora.errors import ConfigError
from geoexplora.tasks.optimization import cosine, warmup_cosine
from geoexplora.tasks.schedule import cut_warmup


class ScheduledTask(BaseTask):
    """Base of the tasks.

    Everything random in a training step depends on the seed, the batch's number and the rank only, so that a resumed
    run repeats an uninterrupted one. Hyper-parameters that are read here: ``seed``, ``lr``, ``min_lr``,
    ``warmup_steps``, ``total_steps``, ``weight_decay`` and ``weight_decay_end``.
    """

    betas = (0.9, 0.999)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of all schedules.

        Raises:
            ConfigError: if the training images do not fill a batch: Lightning would end well without a step.
        """
        steps = int(self.hparams["total_steps"] or self.trainer.estimated_stepping_batches)
        if steps == 0 and self.trainer.num_training_batches == 0:  # max_steps 0 is the user's own wish
            size = getattr(self.trainer.train_dataloader, "batch_size", None)
            raise ConfigError(
                f"there are fewer training images on a device than a batch{f' of {size}' if size else ''} takes",
                "Lower the data's batch_size, or train on more images.",
            )
        return steps

    def batch_seeds(self) -> tuple[int, int]:
        """What random numbers of a training step depend on besides the task's seed: batch and process."""
        return self.trainer.fit_loop.epoch_loop.total_batch_idx, self.global_rank

    def seed_batch(self) -> None:
        """Seed torch's global generator for this batch: stochastic depth and augmentations draw from it."""
        draws = generator(self.hparams["seed"], *self.batch_seeds(), 1)
        torch.manual_seed(int(torch.randint(2**62, (1,), generator=draws)))

    def on_train_start(self) -> None:
        """Set the rates by the schedule: a checkpoint brings back those of the shorter run that wrote it."""
        schedule: Any = self.lr_schedulers()
        for group, peak, factor in zip(
            schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True
        ):
            group["lr"] = peak * factor(schedule.last_epoch)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """A step with the weight decay that its schedule says."""
        start, end = self.hparams["weight_decay"], self.hparams.get("weight_decay_end")
        if end is not None:
            value = cosine(start, end, self.trainer.global_step / self.total_steps)
            for group in optimizer.param_groups:
                group["weight_decay"] = value if group["decays"] else 0.0
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)

    def adamw(self, groups: list[dict[str, Any]]) -> OptimizerLRScheduler:
        """AdamW with a cosine and warm-up by step (He et al. 2022); a warm-up longer than the run is cut.

        Args:
            groups: from ``parameter_groups``.

        Raises:
            ConfigError: if there is nothing to train on.
        """
        h = self.hparams
        optimizer = AdamW(groups, lr=h["lr"], betas=self.betas)
        steps = self.total_steps
        factor = warmup_cosine(steps, cut_warmup(h["warmup_steps"], steps), h["min_lr"] / h["lr"])
        schedule = LambdaLR(optimizer, [self.rate_factor(group["name"], factor) for group in groups])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def rate_factor(self, group: str, factor: Callable[[int], float]) -> Callable[[int], float]:
        """The learning rate's factor by step for a group of parameters; all alike unless a subclass knows better."""
        return factor
