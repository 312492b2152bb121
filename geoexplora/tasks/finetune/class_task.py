"""What tasks share whose targets are classes, of images or of pixels: their number, and a cross-entropy without NaN.

Shapes: B batch, K classes, ... sides of a mask, if any.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchgeo.tasks import ClassificationMixin

from geoexplora.datamodules.tiles import TilesDataModule
from geoexplora.errors import ConfigError
from geoexplora.tasks.finetune.task import FineTuneTask


class ClassTask(ClassificationMixin, FineTuneTask):
    """Base of the tasks with classes: TorchGeo's losses and metrics, and targets that are known to be classes.

    Hyper-parameters read here: ``task``, ``num_classes``, ``num_labels``, ``ignore_index``, ``loss``,
    ``class_weights`` and ``label_smoothing``.
    """

    on_train_epoch_end = FineTuneTask.on_train_epoch_end

    @property
    def is_multilabel(self) -> bool:
        """Whether an image has any number of labels."""
        return bool(self.hparams["task"] == "multilabel")

    @property
    def count(self) -> int:
        """K."""
        return int(self.hparams[self.count_name] or 0)

    @property
    def count_name(self) -> str:
        """The hyper-parameter that K is given by."""
        return "num_labels" if self.is_multilabel else "num_classes"

    def configure_models(self) -> None:
        """Build the model, if it can be known already.

        Raises:
            ConfigError: if the number of classes is not given, or less than 2.
        """
        if self.count < 2:
            raise ConfigError(
                f"the task needs two classes or more, but {self.count_name} is {self.hparams[self.count_name]}",
                f"Set {self.count_name} to the number of the data's classes.",
            )
        super().configure_models()

    def configure_losses(self) -> None:
        """TorchGeo's, but for cross-entropy."""
        h = self.hparams
        if h["loss"] == "ce":
            self.criterion = CrossEntropy(h["class_weights"], h["ignore_index"], h["label_smoothing"])
        else:
            super().configure_losses()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Check the targets of the first epoch, not of all: where the loader has not, it waits for the device."""
        super().on_train_batch_start(batch, batch_idx)
        if self.trainer.current_epoch == 0:
            self._check(batch)

    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Check the targets."""
        self._check(batch)

    def on_test_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Check the targets."""
        self._check(batch)

    def _check(self, batch: Any) -> None:
        if self.is_multilabel or not self._loader_checks():
            self.check_target(batch[self.target_key])

    def _loader_checks(self) -> bool:
        """Whether the loader has checked the targets against these classes as it read them, naming the file."""
        datamodule = getattr(self.trainer, "datamodule", None)
        if not isinstance(datamodule, TilesDataModule):
            return False
        known = datamodule.num_classes or len(datamodule.classes)
        ignores_alike = datamodule.ignore_index in {None, self.hparams["ignore_index"]}
        return 0 < known <= self.count and (self.target_key != "mask" or ignores_alike)

    def check_target(self, target: Tensor) -> None:
        """Refuse targets that no output stands for: on a GPU they would end as an assertion of the device.

        Args:
            target: (B, ...) class indices, or (B, K) of 0-1 with several labels.

        Raises:
            ConfigError: if one is out of range, or there are not K labels.
        """
        if self.is_multilabel:
            if target.shape[1:] != (self.count,):
                raise ConfigError(
                    f"an image has the labels {tuple(target.shape[1:])}, but num_labels is {self.count}",
                    "Set num_labels to the number of the data's labels.",
                )
            return
        ignored = self.hparams["ignore_index"]
        counted = target if ignored is None else target[target != ignored]
        low, high = (int(value) for value in counted.aminmax()) if counted.numel() else (0, 0)
        if low < 0 or high >= self.count:
            raise ConfigError(
                f"a {self.target_key} holds {low if low < 0 else high}, which is none of the {self.count} classes "
                f"0 to {self.count - 1}",
                "Set num_classes to the number of the data's classes; and ignore_index to a value that is no class.",
            )


class CrossEntropy(nn.CrossEntropyLoss):
    """torch's, but 0, with gradients of 0, where that is NaN: if all targets of a batch are ignored or of weight 0.

    Args:
        class_weights: of the K classes; None: all alike.
        ignore_index: target that does not count; None: all count.
        label_smoothing: share of the target spread over all classes.
    """

    def __init__(self, class_weights: Any, ignore_index: int | None, label_smoothing: float) -> None:
        weight = None if class_weights is None else torch.as_tensor(class_weights, dtype=torch.float32)
        ignored = -1000 if ignore_index is None else ignore_index  # as in TorchGeo
        super().__init__(weight, ignore_index=ignored, label_smoothing=label_smoothing)

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """The mean by the targets' weights.

        Args:
            output: (B, K, ...), before the softmax.
            target: (B, ...), class indices; or (B, K, ...), shares of the classes.

        Returns:
            A scalar.
        """
        if target.is_floating_point():  # its mean is over the batch, whatever the weights
            return super().forward(output, target)
        total = F.cross_entropy(
            output, target, self.weight, ignore_index=self.ignore_index, reduction="sum",
            label_smoothing=self.label_smoothing,
        )  # fmt: skip
        counted = target != self.ignore_index
        weights = counted if self.weight is None else self.weight[target.where(counted, 0)] * counted
        weight = weights.sum().to(total.dtype)
        return total / weight.where(weight > 0, math.inf)
