"""What the fine-tuning tasks share: the encoder, the method, the optimizer, and steps that skip what has no label."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics import MetricCollection

from geoexplora.errors import ConfigError
from geoexplora.explora import PartCount, parameter_table
from geoexplora.explora.finetuning import FinetuneConfig, FineTuning, Method, apply_finetuning
from geoexplora.models.attention import use_fast_attention
from geoexplora.models.classifier import Pooling
from geoexplora.models.encoding import set_drop_path
from geoexplora.models.linear import use_fast_linears
from geoexplora.tasks.data_task import DataTask
from geoexplora.tasks.encoders import fit_encoder
from geoexplora.tasks.features import evaluating
from geoexplora.tasks.optimization import parameter_groups
from geoexplora.tasks.scheduled_task import ScheduledTask
from geoexplora.transforms.mixing import random_erasing
from geoexplora.transforms.normalization import Normalization
from geoexplora.weights.contract import Allowed
from geoexplora.weights.files import read_weights
from geoexplora.weights.load import build_encoder
from geoexplora.weights.spec import EncoderSpec


@dataclass(frozen=True)
class Step:
    """What a model made of a batch.

    Attributes:
        output: (B, K) or (B, K, S, S), before any softmax.
        target: what it is compared with.
        loss: scalar.
        features: (B, F) pooled features where the model has them.
        index: (B,), of the samples in their dataset; None where the batch does not tell.
    """

    output: Tensor
    target: Tensor
    loss: Tensor
    features: Tensor | None
    index: Tensor | None


class FineTuneTask(DataTask, ScheduledTask):
    """Base of the fine-tuning tasks: W_task = W_S + Delta_T + Delta_task (ExPLoRA, arXiv 2406.10973, section 4).

    The encoder's weights are merged before the method is applied, so that Delta_task comes on top of them.

    The input is what the encoder was trained with, unless ``bands`` or ``groups`` ask for another one: the encoder is
    then built for these, and takes over the weights as a pre-training does.

    Args:
        init: encoder to fine-tune: what ``geoexplora.weights.read_weights`` takes.
        encoder: an encoder in its stead, with ``spec``.
        spec: ``EncoderSpec.to_metadata()`` of ``encoder``; alone it builds an encoder of random weights, which a
            checkpoint replaces.
        sensor: name of the sensor that ``bands`` belong to.
        bands: input bands by name; none: the encoder's.
        groups: channel groups by band names; None: the encoder's.
        normalization: ``Normalization.to_dict()`` of ``bands``; None: the encoder's, or that of the datamodule.
        image_size: S in pixels; None: the encoder's.
        band_init: how patch embeddings of bands that the encoder does not know start.
        allow_normalization_mismatch: go on where weights of this package were trained with another normalization.
        allow_band_mismatch: go on where weights of this package were trained on other bands of the same sensor.
        method: ``linear`` trains the head alone; ``lora``, ``adalora`` and ``dora`` also low-rank updates of Q and V
            in all blocks; ``full`` everything.
        rank: of the low-rank updates.
        alpha: their scale is alpha / rank; None means alpha = rank.
        drop_path: rate of stochastic depth in the last block, rising evenly from 0 in the first.
        layer_decay: see ``parameter_groups``; for method ``full``.
        random_erasing: share of training images that lose a box.
        lr: peak learning rate.
        min_lr: learning rate at the end.
        warmup_steps: optimizer steps with a rising learning rate.
        total_steps: optimizer steps of the cosine; None asks the trainer.
        weight_decay: AdamW's.
        seed: of new weights, stochastic depth and augmentation.
        grad_checkpointing: recompute the encoder's activations in the backward pass.

    Raises:
        ConfigError: for settings that do not fit each other.
        WeightsError: if ``init`` cannot be used.
    """

    ignore = ("encoder",)
    target_key = "label"
    """Where a batch holds what outputs are compared with."""
    mode = "max"
    fine_tuning: FineTuning

    def __init__(
        self,
        *,
        init: str | None = None,
        encoder: nn.Module | None = None,
        spec: dict[str, str] | None = None,
        sensor: str = "sentinel-2",
        bands: Sequence[str] = (),
        groups: Sequence[Sequence[str]] | None = None,
        normalization: dict[str, Any] | None = None,
        image_size: int | None = None,
        band_init: str = "rgb-by-name",
        allow_normalization_mismatch: bool = False,
        allow_band_mismatch: bool = False,
        method: Method = "lora",
        rank: int = 8,
        alpha: float | None = None,
        drop_path: float = 0.0,
        layer_decay: float = 1.0,
        random_erasing: float = 0.0,
        lr: float = 1e-3,
        min_lr: float = 0.0,
        warmup_steps: int = 0,
        total_steps: int | None = None,
        weight_decay: float = 0.0,
        seed: int = 0,
        grad_checkpointing: bool = False,
    ) -> None:
        self._given = (encoder,)  # a module may not be an attribute yet
        self.extra_state: dict[str, Any] = {}
        super().__init__()

    # What a subclass writes.

    @abstractmethod
    def build_model(self, encoder: Any) -> nn.Module:
        """The model around an encoder; it has the attributes ``encoder`` and ``head``."""

    @abstractmethod
    def compare(self, output: Tensor, target: Tensor) -> Tensor:
        """The loss, a scalar."""

    def predicted(self, output: Tensor) -> Tensor:
        """What a user reads: class probabilities, or the values themselves."""
        return output

    def augment(self, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Augment a training batch as a whole."""
        return self.erase(images), target

    # The model.

    def configure_models(self) -> None:
        """Build the model, unless the data or the length of the training must be known first."""
        h = self.hparams
        own = self._given[0] is not None or h["spec"] or (h["init"] is not None and not h["bands"] and not h["groups"])
        if (own or h["normalization"]) and (h["method"] != "adalora" or h["total_steps"]):
            self.build_models()

    def build_models(self) -> None:
        """Build the model, and freeze what the method does not train."""
        h = self.hparams
        encoder, self.spec = self._encoder()
        h["spec"] = self.spec.to_metadata()
        if h["method"] == "adalora":  # a checkpoint is to load without a trainer that tells
            h["total_steps"] = self.total_steps
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(h["seed"])
            self.fine_tuning = apply_finetuning(
                encoder, FinetuneConfig(h["method"], h["rank"], h["alpha"], total_steps=h["total_steps"])
            )
            if h["drop_path"] and h["method"] != "linear":  # features of a frozen encoder do not vary
                set_drop_path(encoder, h["drop_path"], rising=True)
            encoder.set_grad_checkpointing(h["grad_checkpointing"])
            torch.manual_seed(h["seed"])  # the same head whatever the method
            model = self.build_model(encoder)
        self.model = use_fast_linears(use_fast_attention(model))
        self.erase = random_erasing(h["random_erasing"])
        self.train()  # encoders come in evaluation mode, and Lightning leaves the mode as it is

    def _encoder(self) -> tuple[Any, EncoderSpec]:
        h, (given,) = self.hparams, self._given
        self._given = (None,)
        if given is not None:
            return given, EncoderSpec.from_metadata(h["spec"])
        if h["spec"]:
            spec = EncoderSpec.from_metadata(h["spec"])
            return build_encoder(spec), spec
        fitted = fit_encoder(
            read_weights(h["init"]),
            sensor=h["sensor"],
            bands=h["bands"],
            groups=h["groups"],
            normalization=h["normalization"],
            image_size=h["image_size"],
            band_init=h["band_init"],
            allowed=Allowed(h["allow_normalization_mismatch"], h["allow_band_mismatch"]),
            seed=h["seed"],
        )
        return fitted.encoder, fitted.spec

    @property
    def encoder(self) -> Any:
        """The encoder."""
        return self.model.encoder

    @property
    def pool(self) -> Pooling:
        """Features that a head for whole images takes: those asked for, or the encoder's usual ones."""
        return self.hparams["pool"] or ("cls" if self.spec.pool == "cls" else "mean")

    def parameter_table(self) -> list[PartCount]:
        """What is trained, by part."""
        return parameter_table(self.encoder, self.fine_tuning.whole_blocks, head=self.model.head)

    def new_metrics(self) -> MetricCollection:
        """TorchGeo's metrics, empty, under their own names."""
        test_metrics: Any = self.test_metrics
        metrics: MetricCollection = test_metrics.clone()
        metrics.prefix = None
        metrics.reset()
        return metrics

    def train(self, mode: bool = True) -> FineTuneTask:
        """Training mode; an encoder that is frozen as a whole stays as it is in evaluation."""
        super().train(mode)
        if self.hparams["method"] == "linear" and hasattr(self, "spec"):
            self.encoder.eval()
        return self

    # Use.

    def predict(self, images: Tensor) -> Tensor:
        """What the model says of images as the sensor gives them; in evaluation mode, without gradients.

        Args:
            images: (B, C, S, S), bands ``spec.bands`` in this order, in the sensor's units, of any real type; S is
                ``spec.image_size``. Of a segmentation (B, C, H, W): H and W are S, up to a patch that is not full.

        Returns:
            Class probabilities (B, K) or (B, K, H, W), or values (B,) or (B, K), on the task's device.

        Raises:
            ConfigError: if bands or size are others, or the weights do not tell how images are normalized.
        """
        side, shape = self.spec.image_size, tuple(images.shape)
        if len(shape) != 4:
            raise ConfigError(f"images of shape {shape} are no batch", "Give them as (B, C, H, W).")
        if self.target_key != "mask" and shape[2:] != (side, side):
            raise ConfigError(
                f"images of {shape[2]} x {shape[3]} px do not fit a model for {side} x {side} px",
                "Resize or crop them to task.spec.image_size.",
            )
        if not self.spec.normalization:
            raise ConfigError(
                "the weights do not tell how images are normalized",
                "Normalize them yourself, and take task.predicted(task.model(images)).",
            )
        normalized = Normalization.from_dict(self.spec.normalization)(images.to(self.device))
        with evaluating(self):
            return self.predicted(self.model(normalized))

    # A step.

    def run_step(self, batch: Any, training: bool) -> Step | None:
        """Compare the model's outputs with the targets; None if no sample of the batch counts."""
        images, target, index = batch["image"], batch[self.target_key], batch.get("index")
        if not training and "unreadable" in batch:  # in training another sample stands in; here it would count twice
            real = batch["unreadable"] < 0
            if not bool(real.any()):
                return None
            images, target = images[real.to(images.device)], target[real.to(target.device)]
            index = None if index is None else index[real]
        if training:
            images, target = self.augment(images, target)
        features = self.model.features(images) if hasattr(self.model, "features") else None
        output = self.model(images) if features is None else self.model.head(features)
        return Step(output, target, self.compare(output, target), features, index)

    def _evaluate(self, batch: Any, split: str, metrics: Any) -> None:
        step = self.run_step(batch, training=False)
        if step is not None:
            metrics.update(self.predicted(step.output), step.target)
            self.log(f"{split}_loss", step.loss, batch_size=len(step.output), sync_dist=True)

    # Lightning's hooks, in its order; besides, DataTask has setup and teardown, ScheduledTask on_train_start.

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW, with a learning rate by layer for method ``full``; cosine with warm-up by step."""
        h = self.hparams
        groups = parameter_groups(
            self.encoder,
            nn.ModuleDict({"head": self.model.head}),
            self.fine_tuning.whole_blocks,
            h["lr"],
            1.0,
            h["weight_decay"],
            head_loaded=False,
            layer_decay=h["layer_decay"],
            new_embeddings=False,
        )
        return self.adamw(groups)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed stochastic depth and augmentation, so that a resumed run draws what an uninterrupted one would have."""
        self.seed_batch()

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """One forward pass; ``loss``, and for the callbacks ``value``, ``parts`` and ``features``."""
        step = self.run_step(self.adapted(batch), training=True)
        assert step is not None  # every sample counts in training
        penalty = self.fine_tuning.regularization()
        loss = step.loss if penalty is None else step.loss + penalty
        self.log("train_loss", step.loss.detach(), batch_size=len(step.output))
        outputs: dict[str, Any] = {"loss": loss, "value": loss.detach(), "parts": {}}
        return outputs if step.features is None else outputs | {"features": step.features.detach()}

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """A step, and AdaLoRA's budget while the gradients are there."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.fine_tuning.after_step(self.trainer.global_step + 1)  # Lightning counts the step when this returns

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Loss and metrics of a validation batch."""
        self._evaluate(self.adapted(batch), "val", self.val_metrics)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Loss and metrics of a test batch."""
        self._evaluate(self.adapted(batch), "test", self.test_metrics)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """What the model says: class probabilities (B, K) or (B, K, S, S), or values (B,)."""
        return self.predicted(self.model(self.adapted(batch)["image"]))

    def on_train_epoch_end(self) -> None:
        """Nothing to sum up: training metrics on augmented, mixed images would say little."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what the method remembers between steps, and what the command wants to find again."""
        checkpoint |= {"fine_tuning": self.fine_tuning.state_dict(), **self.extra_state}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take it up again."""
        self.fine_tuning.load_state_dict(checkpoint["fine_tuning"])
