"""How long a training takes, in optimizer steps."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

log = logging.getLogger(__name__)


def cut_warmup(warmup: int, steps: int) -> int:
    """The steps of a warm-up that leave one of all ``steps`` at the full learning rate, with a warning if fewer."""
    least = max(0, steps - 1)
    if warmup > least:
        log.warning("the warm-up of %d steps is cut to %d: there are only %d steps", warmup, least, steps)
    return min(warmup, least)


@dataclass(frozen=True)
class Schedule:
    """How long a training takes.

    Attributes:
        steps: optimizer steps.
        accumulate: batches on each device in a step.
        images_per_step: effective batch size.
        warmup_steps: steps with a rising learning rate.
        steps_per_epoch: passes over the training images, in steps.
    """

    steps: int
    accumulate: int
    images_per_step: int
    warmup_steps: int
    steps_per_epoch: float = 1.0

    @classmethod
    def of(cls, options: Any, images: int) -> Schedule:
        """The schedule that the options ask for.

        An effective batch larger than the dataset is lowered to it, with a warning.

        Args:
            options: batch sizes, devices, epochs or steps.
            images: number of training images.
        """
        parallel = options.batch_size * options.devices * options.num_nodes
        wanted = options.effective_batch_size or parallel
        accumulate = max(1, min(wanted, images) // parallel)
        images_per_step = accumulate * parallel
        if images_per_step < wanted:
            log.warning(
                "the effective batch size is lowered from %d to %d: there are only %d training images",
                wanted,
                images_per_step,
                images,
            )
        steps = options.max_steps or max(1, math.ceil((options.epochs or 0) * images / images_per_step))
        warmup = options.warmup_steps
        if warmup is None:
            warmup = round(options.warmup_epochs * images / images_per_step)
        return cls(steps, accumulate, images_per_step, cut_warmup(warmup, steps), images / images_per_step)

    def in_steps(self, epochs: float, steps: int | None) -> int:
        """A length in optimizer steps: that in steps where it is given, or else that in epochs."""
        return round(epochs * self.steps_per_epoch) if steps is None else steps
