"""Pictures of right and wrong predictions of a fine-tuned model.

Shapes: N images, K classes, S image side.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from geoexplora.datamodules.tiles import TilesDataModule
from geoexplora.runs.confusion import plot_confusion
from geoexplora.runs.folder import RunFolder
from geoexplora.runs.predictions import plot_class_predictions, plot_mask_predictions, plot_value_predictions
from geoexplora.tasks.features import evaluating
from geoexplora.tasks.finetune.evaluation import Evaluation
from geoexplora.tasks.finetune.task import FineTuneTask

SHOWN = 6
"""Right and as many wrong predictions in a picture of classes."""

MASKS = 4
"""Images in a picture of masks."""


def draw_predictions(
    folder: RunFolder, task: FineTuneTask, datamodule: TilesDataModule, split: str, found: Evaluation
) -> None:
    """Draw what a model got right and wrong.

    Of classes the surest right and the surest wrong predictions of each, and the confusion matrix; of masks images
    from the best to the worst; of values all of them, and the images of the largest errors.

    Args:
        folder: the run folder.
        task: the task.
        datamodule: gives the images.
        split: where the predictions are of.
        found: the predictions.

    Raises:
        RunError: if a picture cannot be written.
    """
    if not len(found.index):
        return
    classes: Sequence[str] = task.hparams.get("labels") or ()
    if found.confusion is not None:
        total = found.confusion.sum()  # 0 where no pixel has a label
        accuracy = f": accuracy {found.confusion.trace() / total:.4f}" if total else ""
        counted = "pixels" if task.target_key == "mask" else "samples"
        plot_confusion(folder.confusion_plot, found.confusion, classes, f"{split} split{accuracy}", counted=counted)
    if task.target_key == "mask":
        _draw_masks(folder, task, datamodule, split, found, classes)
    elif task.hparams.get("task") in {"multiclass", "multilabel"}:
        _draw_classes(folder, task, datamodule, split, found, classes)
    else:
        truth, told = found.truth.reshape(len(found.index), -1)[:, 0], found.predicted.reshape(len(found.index), -1)
        worst = np.abs(told[:, 0] - truth).argsort(kind="stable")[::-1][:SHOWN]
        plot_value_predictions(
            folder.predictions_plot, truth, told[:, 0], "value",
            images=_images(datamodule, split, found.index[worst]), positions=worst.tolist(),
            bands=datamodule.bands, sensor=datamodule.sensor,
        )  # fmt: skip


def _images(datamodule: TilesDataModule, split: str, index: np.ndarray) -> Tensor:
    """(N, C, S, S), in the sensor's units."""
    view = datamodule.eval_dataset(split)
    return datamodule.normalization.inverse(torch.stack([view[int(at)]["image"] for at in index]))


def _draw_classes(
    folder: RunFolder,
    task: FineTuneTask,
    datamodule: TilesDataModule,
    split: str,
    found: Evaluation,
    classes: Sequence[str],
) -> None:
    if task.hparams["task"] == "multiclass":
        told = found.predicted.argmax(1)
        right, sure = told == found.truth, found.predicted.max(1)
        kinds = found.truth
        names = [[classes[int(at)] for at in values] for values in (found.truth, told)]
    else:
        chosen = found.predicted >= 0.5
        right = (chosen == found.truth.astype(bool)).all(1)
        sure = np.where(chosen, found.predicted, 1 - found.predicted).min(1)
        names = [[_listed(row, classes) for row in values] for values in (found.truth.astype(bool), chosen)]
        kinds = np.unique(found.truth, axis=0, return_inverse=True)[1].ravel()
    order = (-sure).argsort(kind="stable")
    shown = np.concatenate([_of_all_kinds(order[part[order]], kinds)[:SHOWN] for part in (right, ~right)])
    truth, predicted = ([values[at] for at in shown] for values in names)
    plot_class_predictions(
        folder.predictions_plot, _images(datamodule, split, found.index[shown]), truth, predicted,
        sure[shown].tolist(), datamodule.bands, datamodule.sensor,
    )  # fmt: skip


def _of_all_kinds(order: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    """The first of each kind, then the second of each, ...: else one common class would fill the picture."""
    seen: dict[int, int] = {}
    ranks = []
    for kind in kinds[order].tolist():
        ranks.append(seen.get(kind, 0))
        seen[kind] = ranks[-1] + 1
    return order[np.argsort(ranks, kind="stable")]


def _listed(chosen: np.ndarray, classes: Sequence[str]) -> str:
    return ", ".join(classes[int(at)] for at in np.flatnonzero(chosen)) or "none"


def _draw_masks(
    folder: RunFolder,
    task: FineTuneTask,
    datamodule: TilesDataModule,
    split: str,
    found: Evaluation,
    classes: Sequence[str],
) -> None:
    labelled = np.flatnonzero(np.isfinite(found.predicted))
    if not len(labelled):
        return
    order = labelled[(-found.predicted[labelled]).argsort(kind="stable")]
    shown = found.index[order[np.linspace(0, len(order) - 1, min(MASKS, len(order))).round().astype(int)]]
    view = datamodule.eval_dataset(split)
    samples = [view[int(at)] for at in shown]
    images = torch.stack([sample["image"] for sample in samples])
    with evaluating(task):
        told = task.model(images.to(task.device)).argmax(1).cpu()
    plot_mask_predictions(
        folder.predictions_plot, datamodule.normalization.inverse(images),
        torch.stack([sample["mask"] for sample in samples]), told, classes, task.hparams["ignore_index"],
        datamodule.bands, datamodule.sensor,
    )  # fmt: skip
