"""What a pre-training looks at while it runs: pictures of features, a kNN probe."""

from __future__ import annotations

import logging
import math
from functools import partial
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader, Subset

from geoexplora.datamodules.sampling import generator
from geoexplora.datamodules.tiles import TilesDataModule
from geoexplora.runs.metrics import Metrics, read_metrics
from geoexplora.tasks.callbacks import StepClock
from geoexplora.tasks.features import LabelledFeatures, extract_features
from geoexplora.tasks.pretrain.exports import RunExport
from geoexplora.tasks.probe.knn import knn_predict, usable_neighbours
from geoexplora.tasks.probe.rows import FeatureRows

log = logging.getLogger(__name__)

PROBE_TRAIN, PROBE_TEST = 4_000, 1_000
"""At most so many labelled tiles to learn from and to test on in a kNN probe during training."""


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
