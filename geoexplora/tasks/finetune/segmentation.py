"""Fine-tuning for a class of every pixel, with TorchGeo's losses and metrics.

Shapes: B batch, C bands, S image side, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

from lightning.fabric.utilities.data import sized_len
from torch import Tensor, nn

from geoexplora.datamodules.tiles import TilesDataModule
from geoexplora.errors import ConfigError, DataError
from geoexplora.models.segmentation import SegmentationModel
from geoexplora.tasks.finetune.class_task import ClassTask


class ExPLoRASegmentation(ClassTask):
    """Fine-tune an encoder to segment images, with the words and metrics of TorchGeo's ``SemanticSegmentation``.

    Batches hold ``image`` (B, C, S, S), normalized, and ``mask`` (B, S, S), class indices.

    Args:
        num_classes: K.
        task: ``multiclass``; TorchGeo's word, which has no other meaning here.
        num_labels: TorchGeo's; of no use with ``multiclass``.
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

    def __init__(
        self,
        *,
        num_classes: int,
        task: Literal["multiclass"] = "multiclass",
        num_labels: int | None = None,
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
        self._labelled: Tensor | bool = False
        self._batches = 0  # of the first pass over the training images, in this process

    def build_model(self, encoder: Any) -> nn.Module:
        """The segmentation model."""
        h = self.hparams
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

    def compare(self, output: Tensor, target: Tensor) -> Tensor:
        """The loss; 0 where no pixel of the batch has a label."""
        ignored, loss = self.hparams["ignore_index"], self.hparams["loss"]
        if ignored is not None and loss in {"focal", "jaccard"}:  # these pick the labelled pixels: none would be NaN
            counted = target != ignored
            if not bool(counted.any()):
                return output.sum() * 0.0
            if loss == "jaccard":  # smp's counts all pixels, of the whole batch
                output = output.permute(1, 0, 2, 3)[:, counted][None, :, :, None]
                target = target[counted][None, :, None]
        return self.criterion(output.float(), target)

    def predicted(self, output: Tensor) -> Tensor:
        """Probabilities (B, K, S, S)."""
        return output.float().softmax(1)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Take note of labelled pixels during the first pass over the training images, and judge at its end.

        Batches are counted, not images: all processes, which are to judge at once, have as many.

        Raises:
            DataError: if no process has met a labelled pixel.
        """
        super().on_train_batch_start(batch, batch_idx)
        ignored = self.hparams["ignore_index"]
        if ignored is None or self._batches >= (length := self._pass_length()):
            return
        self._labelled = (batch["mask"] != ignored).any() | self._labelled  # without waiting for the device
        self._batches += 1
        if self._batches == length and not self._is_labelled():
            raise DataError(
                f"the training masks hold nothing but the ignored value {ignored}",
                "Check ignore_index (--ignore-index) and the masks.",
            )

    def _pass_length(self) -> float:
        """Batches of each process in a pass over the training images; infinite where the loader does not tell."""
        trainer: Any = self.trainer
        if isinstance(trainer.datamodule, TilesDataModule):  # its loader may be as long as all of the training
            images = len(trainer.datamodule.training_source)
            return math.ceil(images / (trainer.datamodule.batch_size * trainer.world_size))
        length = sized_len(trainer.train_dataloader)
        return math.inf if length is None else length

    def _is_labelled(self) -> bool:
        """Whether a labelled pixel was met so far; to be asked by all processes at once."""
        return bool(self.trainer.strategy.reduce_boolean_decision(bool(self._labelled), all=False))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what was met of the first pass, too."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["masks"] = {"batches": self._batches, "labelled": self._batches > 0 and self._is_labelled()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take it up again."""
        super().on_load_checkpoint(checkpoint)
        self._batches, self._labelled = checkpoint["masks"]["batches"], checkpoint["masks"]["labelled"]
