"""Fine-tuning for one vector of outputs an image: classes, several labels, or values, with TorchGeo's metrics.

Shapes: B batch, C bands, S image side, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torchgeo.tasks import RegressionMixin

from geoexplora.errors import ConfigError
from geoexplora.models.classifier import PooledClassifier, Pooling
from geoexplora.tasks.finetune.class_task import ClassTask
from geoexplora.tasks.finetune.task import FineTuneTask
from geoexplora.transforms.mixing import BatchMixing


class ExPLoRAClassification(ClassTask):
    """Fine-tune an encoder to classify images, with the words and metrics of TorchGeo's ``Classification``.

    Batches hold ``image`` (B, C, S, S), normalized, and ``label``, (B,) class indices or (B, K) of 0-1.

    Args:
        task: ``multiclass``: one class an image; ``multilabel``: any number.
        num_classes: K, for ``multiclass``.
        num_labels: K, for ``multilabel``.
        labels: names of the classes.
        pool: see ``PooledClassifier``; None: as the encoder's description says.
        loss: ``ce``, ``bce``, ``jaccard`` or ``focal``; None: cross-entropy, binary for ``multilabel``.
        class_weights: weight of each class in ``ce``.
        pos_weight: weight of the positive examples of each label in ``bce``.
        ignore_index: class that neither loss nor metrics count.
        label_smoothing: share of the target spread over all classes, in ``ce``.
        mixup: alpha of mixup; 0: none.
        cutmix: alpha of cutmix; 0: none.
        kwargs: as for ``FineTuneTask``.
    """

    monitor = "val_OverallAccuracy"

    def __init__(
        self,
        *,
        task: Literal["multiclass", "multilabel"] = "multiclass",
        num_classes: int | None = None,
        num_labels: int | None = None,
        labels: list[str] | None = None,
        pool: Pooling | None = None,
        loss: Literal["ce", "bce", "jaccard", "focal"] | None = None,
        class_weights: Sequence[float] | None = None,
        pos_weight: Sequence[float] | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if task == "multilabel":
            self.monitor = "val_OverallF1Score"

    def setup(self, stage: str) -> None:
        """Compare the number of classes with the datamodule's, then as in ``DataTask``.

        Raises:
            ConfigError: if the data have more classes, or do not give what the task takes.
        """
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        dataset = getattr(datamodule, "train_dataset", None)
        known = getattr(datamodule, "classes", None) or getattr(dataset, "classes", None) or ()
        if len(known) > self.count:
            raise ConfigError(
                f"{self.count_name} is {self.count}, but the data have {len(known)} classes",
                f"Set {self.count_name} to {len(known)}.",
            )
        super().setup(stage)

    def build_model(self, encoder: Any) -> PooledClassifier:
        """A linear head on pooled tokens."""
        h = self.hparams
        self.mix = BatchMixing(self.count, h["mixup"], h["cutmix"])
        return PooledClassifier(encoder, self.count, self.pool)

    def configure_losses(self) -> None:
        """TorchGeo's, chosen by the kind of labels."""
        h = self.hparams
        h["loss"] = h["loss"] or ("bce" if self.is_multilabel else "ce")
        if h["pos_weight"] is not None:
            h["pos_weight"] = torch.tensor(h["pos_weight"])
        super().configure_losses()
        h["pos_weight"] = None if h["pos_weight"] is None else h["pos_weight"].tolist()

    def augment(self, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Random erasing, then mixup or cutmix."""
        return self.mix(self.erase(images), target)

    def compare(self, output: Tensor, target: Tensor) -> Tensor:
        """The loss."""
        if self.is_multilabel and self.hparams["loss"] == "bce":
            target = target.to(output.dtype)
        return self.criterion(output.float(), target)

    def predicted(self, output: Tensor) -> Tensor:
        """Probabilities (B, K)."""
        return output.float().sigmoid() if self.is_multilabel else output.float().softmax(1)


class ExPLoRARegression(RegressionMixin, FineTuneTask):
    """Fine-tune an encoder to tell a value of an image, with the words and metrics of TorchGeo's ``Regression``.

    Batches hold ``image`` (B, C, S, S), normalized, and ``label`` (B,) or (B, K).

    Args:
        num_outputs: K.
        labels: names of the values.
        pool: see ``PooledClassifier``; None: as the encoder's description says.
        loss: ``mse`` or ``mae``.
        target_mean: subtracted from the values before they are compared with the outputs.
        target_std: they are then divided by it: heads start near 0, values may lie anywhere.
        kwargs: as for ``FineTuneTask``.
    """

    monitor = "val_RMSE"
    on_train_epoch_end = FineTuneTask.on_train_epoch_end
    mode = "min"

    def __init__(
        self,
        *,
        num_outputs: int = 1,
        labels: list[str] | None = None,
        pool: Pooling | None = None,
        loss: Literal["mse", "mae"] = "mse",
        target_mean: float = 0.0,
        target_std: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)

    def build_model(self, encoder: Any) -> PooledClassifier:
        """A linear head on pooled tokens."""
        return PooledClassifier(encoder, self.hparams["num_outputs"], self.pool)

    def compare(self, output: Tensor, target: Tensor) -> Tensor:
        """The loss of standardized values."""
        h = self.hparams
        wanted = (target.float().view(len(output), -1) - h["target_mean"]) / h["target_std"]
        return self.criterion(output.float(), wanted)

    def predicted(self, output: Tensor) -> Tensor:
        """The values, (B,) or (B, K), in the units of the labels."""
        values = output.float() * self.hparams["target_std"] + self.hparams["target_mean"]
        return values.squeeze(1) if values.shape[1] == 1 else values
