"""What a pre-training writes down and watches while it runs: metrics, health, a kNN probe."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, Subset

from geoexplora.datamodules.sampling import generator
from geoexplora.datamodules.tiles import TilesDataModule
from geoexplora.errors import RunError
from geoexplora.runs.metrics import Metrics, read_metrics
from geoexplora.tasks.exports import RunExport
from geoexplora.tasks.features import LabelledFeatures, extract_features, feature_health
from geoexplora.tasks.health import FinitenessGuard, HealthWatch
from geoexplora.tasks.probe.knn import knn_predict, usable_neighbours
from geoexplora.tasks.probe.rows import FeatureRows
from geoexplora.weights.write import not_finite

log = logging.getLogger(__name__)

PROBE_TRAIN, PROBE_TEST = 4_000, 1_000
"""At most so many labelled tiles to learn from and to test on in a kNN probe during training."""


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


class FirstFeatures(Callback):
    """Keeps how the source sees some images, before anything is trained; pictures compare with it.

    Args:
        export: the run folder's writer.
    """

    def __init__(self, export: RunExport) -> None:
        self.export = export

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep them, at the very start of a run."""
        if trainer.global_step == 0 and trainer.is_global_zero:
            self.export.before(pl_module)


class KNNProbe(Callback):
    """A kNN probe of the encoder before training and every N optimizer steps, with a warning if it falls.

    Continued pre-training can ruin features silently; labelled data of the dataset's own splits show it.

    Args:
        metrics: receives the column ``knn`` (accuracy).
        datamodule: with labelled splits ``train`` and ``val``.
        every_n_steps: N.
        clock: paused during a probe.
        k: neighbours.
    """

    def __init__(
        self, metrics: Metrics, datamodule: TilesDataModule, every_n_steps: int, clock: StepClock, k: int = 20
    ) -> None:
        self.clock = clock
        self.metrics = metrics
        self.datamodule = datamodule
        self.every_n_steps = every_n_steps
        self.k = k
        self._probed = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Probe the start; a resumed run was probed where it goes on."""
        self._probed = trainer.global_step
        if trainer.global_step == 0:
            self._probe(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Probe after every N-th optimizer step and after the last."""
        step = trainer.global_step
        if (step % self.every_n_steps == 0 or step == trainer.max_steps) and step != self._probed:
            self._probe(trainer, pl_module)

    def _probe(self, trainer: Trainer, task: Any) -> None:
        self._probed = trainer.global_step
        self.clock.pause()
        if trainer.is_global_zero:
            log.info("kNN probe at step %d ...", trainer.global_step)
            precision = torch.bfloat16 if trainer.precision == "bf16-mixed" else None
            train = self._features(task, "train", PROBE_TRAIN, precision)
            test = self._features(task, "val", PROBE_TEST, precision)
            accuracy = self._accuracy(train, test)
            self.metrics.append({"step": trainer.global_step, "knn": accuracy})
            start = next(float(row["knn"]) for row in read_metrics(self.metrics.path) if "knn" in row)
            log.info("kNN probe at step %d: %.4f (start %.4f)", trainer.global_step, accuracy, start)
            if accuracy < start - math.sqrt(start * (1 - start) / len(test.labels)):  # by more than a standard error
                log.warning(
                    "the kNN probe fell to %.4f at step %d, below the %.4f of the start: the features are getting "
                    "worse. Lower --lr, train fewer whole blocks, or with dinov2 lengthen --freeze-last-epochs.",
                    accuracy,
                    trainer.global_step,
                    start,
                )
        trainer.strategy.barrier()
        self.clock.go_on()

    def _accuracy(self, train: LabelledFeatures, test: LabelledFeatures) -> float:
        """As ``geoexplora probe`` measures it."""
        labels = np.concatenate([train.labels, test.labels])
        first, second = np.arange(len(train.labels)), np.arange(len(train.labels), len(labels))
        rows = FeatureRows([train.features, test.features])
        neighbours = usable_neighbours([self.k], len(first))
        predicted = knn_predict(rows, labels, first, second, neighbours, int(labels.max()) + 1)
        return float((predicted[0] == test.labels).mean())

    def _features(self, task: Any, split: str, most: int, precision: torch.dtype | None) -> LabelledFeatures:
        dataset = self.datamodule.eval_dataset(split)
        kept = torch.randperm(len(dataset), generator=generator(self.datamodule.seed))[:most].tolist()
        loader = DataLoader(Subset(dataset, kept), self.datamodule.batch_size, num_workers=self.datamodule.num_workers)
        check = partial(self.datamodule.check_unreadable, split=split)
        return extract_features(task.encoder, loader, task.pool, task.device, precision, check)
