"""Fine-tuning steps: a classifier with all weights, or with LoRA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import timm
import torch
from step_measure import DEVICE, Variant
from torch import Tensor, nn
from torch.nn import functional as F

from geoexplora.explora.config import FinetuneConfig
from geoexplora.explora.finetuning import apply_finetuning
from geoexplora.models.attention import use_fast_attention
from geoexplora.models.classifier import PooledClassifier
from geoexplora.models.linear import use_fast_linears

CLASSES, SIZE, PATCH = 62, 224, 16
SMALL = "small"
"""A model of two narrow blocks, to see that the benchmark runs."""


class Batch(NamedTuple):
    """Images (B, 3, S, S) and labels (B,)."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class FinetuneVariant(Variant):
    """A classifier, its encoder trained whole or by LoRA."""

    title: ClassVar[str] = "Fine-tuning; speed and memory against full"
    modes: ClassVar[tuple[str, ...]] = ("full", "lora")

    @property
    def baseline(self) -> Variant:
        """All weights, in the same precision."""
        return FinetuneVariant("full", self.precision)

    def build(self, model: str, device: torch.device = DEVICE) -> nn.Module:
        """The model as this variant trains it."""
        torch.manual_seed(0)
        encoder = encoder_of(model)
        apply_finetuning(encoder, FinetuneConfig("lora", rank=8) if self.mode == "lora" else FinetuneConfig("full"))
        classifier = PooledClassifier(encoder, CLASSES).train().to(device)
        return use_fast_linears(use_fast_attention(classifier))

    def inputs(self, batch: int, device: torch.device = DEVICE) -> Batch:
        """Images and labels."""
        return Batch(torch.rand(batch, 3, SIZE, SIZE, device=device), torch.zeros(batch, device=device).long())

    def loss(self, model: nn.Module, inputs: Batch) -> Tensor:
        """Cross-entropy."""
        with self.autocast():
            outputs = model(inputs.images)
        return F.cross_entropy(outputs.float(), inputs.labels)

    def after_step(self, model: Any) -> None:
        """Nothing."""

    def product_sizes(self, model: str, batch: int) -> list[tuple[int, int, int]]:
        """The MLP."""
        tokens, width = batch * (1 + (SIZE // PATCH) ** 2), encoder_of(model).embed_dim
        return [(tokens, width, 4 * width), (tokens, 4 * width, width)]


def encoder_of(model: str) -> Any:
    """A model's encoder with random weights."""
    if model == SMALL:
        return timm.create_model("vit_tiny_patch16_224", num_classes=0, embed_dim=64, depth=2, num_heads=2)
    return timm.create_model(f"{model}_patch{PATCH}_{SIZE}", num_classes=0)
