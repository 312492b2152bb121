"""How well a fine-tuned model does on a split: metrics, and what pictures and lists of predictions need.

Shapes: N images, K classes, S image side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassConfusionMatrix

from geoexplora.errors import DataError
from geoexplora.tasks.features import evaluating
from geoexplora.tasks.finetune.task import FineTuneTask

Array = NDArray[Any]


@dataclass(frozen=True)
class Evaluation:
    """What a model did on a split.

    Attributes:
        metrics: value of each metric by TorchGeo's name (``OverallAccuracy``, ...), and ``loss``.
        index: (N,), of the images in their dataset.
        truth: (N,) classes or values, or (N, K) labels; empty for masks.
        predicted: (N, K) probabilities or values, or (N,) values; for masks (N,) the share of labelled pixels that
            are right, NaN where there are none.
        confusion: (K, K) counts of images or pixels, truth by prediction; None where a sample has no single class.
    """

    metrics: dict[str, float]
    index: Array
    truth: Array
    predicted: Array
    confusion: Array | None

    def overall(self) -> dict[str, float]:
        """The metrics without those of single classes."""
        return {name: value for name, value in self.metrics.items() if not name.startswith("Classwise")}


def evaluate(
    task: FineTuneTask,
    batches: Iterable[Any],
    autocast: torch.dtype | None = None,
    check: Callable[[Any], None] | None = None,
) -> Evaluation:
    """Run a model over a split, in this process alone.

    Args:
        task: the task; its mode is put back afterwards.
        batches: of a datamodule of this package, without augmentation.
        autocast: compute in this type where safe.
        check: called with every batch first, such as the datamodule's ``check_unreadable``.

    Raises:
        DataError: from ``check``, and if no image can be read.
    """
    metrics = _alone(task.new_metrics().to(task.device))
    masks = task.target_key == "mask"
    counts: Any = None
    if masks or task.hparams.get("task") == "multiclass":
        counts = MulticlassConfusionMatrix(task.hparams["num_classes"], ignore_index=task.hparams["ignore_index"])
        counts = _alone(counts.to(task.device))
    index, truth, predicted, losses, weights = [], [], [], 0.0, 0
    device = task.device.type
    with evaluating(task), torch.autocast(device, autocast, enabled=autocast is not None):
        for batch in batches:
            if check is not None:
                check(batch)
            moved = {name: value.to(task.device) if name in _MOVED else value for name, value in batch.items()}
            step = task.run_step(moved, training=False)
            if step is None:
                continue
            told = task.predicted(step.output)
            metrics.update(told, step.target)
            if counts is not None:
                counts.update(told, step.target)
            weight = _counted(step.target, task.hparams["ignore_index"]) if masks else len(told)
            losses, weights = losses + float(step.loss) * weight, weights + weight
            index.append(torch.arange(len(told)) if step.index is None else step.index)
            if not masks:
                truth.append(step.target.cpu())
            predicted.append((_right(told, step.target, task.hparams["ignore_index"]) if masks else told).cpu())
    if not index:
        raise DataError("none of the images to evaluate on can be read", "Copy or unpack their files again.")
    found = {name: float(value) for name, value in metrics.compute().items()}
    return Evaluation(
        found | {"loss": losses / weights if weights else math.nan},
        _joined(index),
        _joined(truth),
        _joined(predicted),
        None if counts is None else counts.compute().cpu().numpy(),
    )


def _alone[Module: nn.Module](metrics: Module) -> Module:
    """Metrics that do not wait for other processes: these take no part."""
    for module in metrics.modules():
        if isinstance(module, Metric):
            module.distributed_available_fn = _not_distributed
    return metrics


def _not_distributed() -> bool:
    return False


_MOVED = ("image", "label", "mask")


def _counted(mask: Tensor, ignored: int | None) -> int:
    """Number of labelled pixels."""
    return mask.numel() if ignored is None else int((mask != ignored).sum())


def _right(probabilities: Tensor, mask: Tensor, ignored: int | None) -> Tensor:
    """(N,): share of the labelled pixels that are right."""
    counted = torch.ones_like(mask, dtype=torch.bool) if ignored is None else mask != ignored
    right = (probabilities.argmax(1) == mask) & counted
    return right.flatten(1).sum(1) / counted.flatten(1).sum(1)


def _joined(parts: list[Tensor]) -> Array:
    return torch.cat(parts).numpy() if parts else np.empty(0)
