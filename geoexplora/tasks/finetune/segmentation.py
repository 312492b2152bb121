"""Fine-tuning for a class of every pixel, with TorchGeo's losses and metrics.

Shapes: B batch, C bands, S image side, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchgeo.tasks import ClassificationMixin

from geoexplora.errors import ConfigError, DataError
from geoexplora.models.segmentation import SegmentationModel
from geoexplora.tasks.finetune.task import FineTuneTask


class ExPLoRASegmentation(ClassificationMixin, FineTuneTask):
    """Fine-tune an encoder to segment images, with the words and metrics of TorchGeo's ``SemanticSegmentation``.

    Batches hold ``image`` (B, C, S, S), normalized, and ``mask`` (B, S, S), class indices.

    Args:
        num_classes: K.
        labels: names of the classes.
        head: see ``SegmentationModel``.
        levels: 1-based numbers of the blocks whose features the head takes; None: from the depth.
        group_features: ``mean`` over the channel groups of a position, or ``concat``.
        width: of the head.
        loss: ``ce``, ``jaccard``, ``focal`` or ``dice``.
        class_weights: weight of each class in ``ce``.
        ignore_index: mask value that neither loss nor metrics count.
        label_smoothing: share of the target spread over all classes, in ``ce``.
        kwargs: as for ``FineTuneTask``.
    """

    target_key = "mask"
    monitor = "val_AverageJaccardIndex"
    on_train_epoch_end = FineTuneTask.on_train_epoch_end

    def __init__(
        self,
        *,
        num_classes: int,
        labels: list[str] | None = None,
        head: Literal["linear", "upernet", "dpt"] = "upernet",
        levels: Sequence[int] | None = None,
        group_features: Literal["mean", "concat"] = "mean",
        width: int = 256,
        loss: Literal["ce", "jaccard", "focal", "dice"] = "ce",
        class_weights: Sequence[float] | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.labelled = False

    def build_model(self, encoder: Any) -> nn.Module:
        """The segmentation model; ``task`` and ``num_labels`` are what TorchGeo's mixin reads."""
        h = self.hparams
        h.update({"task": "multiclass", "num_labels": None})
        model = SegmentationModel(
            encoder, h["num_classes"], head=h["head"], levels=h["levels"], group_features=h["group_features"],
            width=h["width"],
        )  # fmt: skip
        if h["method"] == "adalora" and model.levels[-1] < self.spec.depth:
            raise ConfigError(
                f"with levels up to {model.levels[-1]} of {self.spec.depth} blocks, AdaLoRA lacks gradients above",
                "Take the last block among the levels (L), or another method.",
            )
        return model

    def configure_losses(self) -> None:
        """TorchGeo's, with the smoothing of labels."""
        super().configure_losses()
        if isinstance(self.criterion, torch.nn.CrossEntropyLoss):
            self.criterion.label_smoothing = self.hparams["label_smoothing"]

    def compare(self, output: Tensor, target: Tensor) -> Tensor:
        """The loss; 0 where no pixel of the batch has a label, which would be NaN."""
        ignored = self.hparams["ignore_index"]
        if ignored is not None and bool((target == ignored).all()):
            return output.sum() * 0.0
        self.labelled |= self.training
        if self.hparams["loss"] == "jaccard" and ignored is not None:  # smp's counts all pixels, of the whole batch
            counted = target != ignored
            output, target = output.permute(1, 0, 2, 3)[:, counted][None, :, :, None], target[counted][None, :, None]
        return self.criterion(output.float(), target)

    def on_validation_start(self) -> None:
        """Refuse to go on where no training mask of an epoch held a class.

        Raises:
            DataError: if so.
        """
        trainer = self.trainer
        if trainer.state.fn == "fit" and not trainer.sanity_checking and not self.labelled:
            raise DataError(
                f"the training masks hold nothing but the ignored value {self.hparams['ignore_index']}",
                "Check --ignore-index and the masks.",
            )

    def predicted(self, output: Tensor) -> Tensor:
        """Probabilities (B, K, S, S)."""
        return output.float().softmax(1)
