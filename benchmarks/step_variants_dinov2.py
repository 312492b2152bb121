"""DINOv2 steps in fMoW-RGB geometry, for ``training_step.py``."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from random import Random
from typing import Any, ClassVar, NamedTuple

import timm
import torch
from step_measure import DEVICE, Variant
from torch import Tensor

from geoexplora.explora import ExploraConfig, apply_explora
from geoexplora.models.attention import use_fast_attention
from geoexplora.models.linear import use_fast_linears
from geoexplora.objectives.block_masking import block_masks
from geoexplora.objectives.dinov2 import GLOBAL_CROPS, DINOv2, HeadSizes

GLOBAL_SIZE, LOCAL_SIZE, LOCAL_CROPS, PATCH = 224, 98, 8, 14
HEADS = HeadSizes()
TEMPERATURE, MOMENTUM = 0.07, 0.992


class Crops(NamedTuple):
    """A batch as DINOv2 takes it: crops cut, masks drawn."""

    global_: Tensor
    local: Tensor
    mask: Tensor


@dataclass(frozen=True)
class DINOv2Variant(Variant):
    """Student and teacher; see ``training_step.py`` for the modes."""

    title: ClassVar[str] = "DINOv2; speed and memory against full of the same precision"
    modes: ClassVar[tuple[str, ...]] = ("full", "explora, copied", "explora")
    equal_modes: ClassVar[tuple[str, ...]] = ("explora, copied", "explora")

    @property
    def baseline(self) -> Variant:
        """Training everything, in the same precision."""
        return replace(self, mode="full")

    def build(
        self,
        model: str,
        device: torch.device = DEVICE,
        cpu_paths: bool = True,
        checkpointing: bool = False,
        **others: Any,
    ) -> DINOv2:
        """The model as this variant trains it.

        Args:
            model: a size that timm knows with DINOv2's layout.
            device: where it is to live.
            cpu_paths: let linear layers and attention take the package's paths for CPUs.
            checkpointing: recompute the student's blocks in the backward pass.
            others: further options of timm's model.
        """
        torch.manual_seed(0)
        # The released gammas are not near 0, as new ones are; with those no test of the loss would see the blocks.
        options = {"img_size": GLOBAL_SIZE, "dynamic_img_size": True, "num_classes": 0, "init_values": 1.0} | others
        encoder = timm.create_model(f"{model}_patch{PATCH}_dinov2", **options)
        if self.mode != "full":
            apply_explora(encoder, ExploraConfig((len(encoder.blocks),), rank=64))
        encoder.set_grad_checkpointing(checkpointing)
        # KoLeo knows no tensors without values; its product of a few class tokens is not worth counting.
        objective = DINOv2(encoder, HEADS, koleo_weight=0.0 if device.type == "meta" else 0.1)
        if self.mode == "explora, copied":
            objective.teacher = copy.deepcopy(objective.student).requires_grad_(False)
        objective.train().to(device)
        if cpu_paths:
            use_fast_linears(use_fast_attention(objective))
        return objective

    def inputs(self, batch: int, device: torch.device = DEVICE) -> Crops:
        """Crops and the masks of a batch; on meta the masks are real, as their numbers decide the sizes."""
        return Crops(
            torch.rand(GLOBAL_CROPS * batch, 3, GLOBAL_SIZE, GLOBAL_SIZE, device=device),
            torch.rand(LOCAL_CROPS * batch, 3, LOCAL_SIZE, LOCAL_SIZE, device=device),
            self.masks(batch),
        )

    def loss(self, model: DINOv2, inputs: Crops) -> Tensor:
        """The weighted sum of DINO's, iBOT's and KoLeo's losses."""
        with self.autocast():
            return model(*inputs, TEMPERATURE).loss

    def after_step(self, model: DINOv2) -> None:
        """The teacher follows."""
        model.update_teacher(MOMENTUM)

    def product_sizes(self, model: str, batch: int) -> list[tuple[int, int, int]]:
        """The MLPs of the encoder on global crops, and the heads' prototypes."""
        width = timm.create_model(f"{model}_patch{PATCH}_dinov2", depth=1).embed_dim
        tokens = GLOBAL_CROPS * batch * (1 + (GLOBAL_SIZE // PATCH) ** 2)
        scores = (self.rows(batch), HEADS.bottleneck, HEADS.prototypes)
        return [(tokens, width, 4 * width), (tokens, 4 * width, width), scores]

    def rows(self, batch: int) -> int:
        """Tokens that the student's head sees: class tokens and hidden ones."""
        return (GLOBAL_CROPS + LOCAL_CROPS) * batch + int(self.masks(batch).sum())

    def masks(self, batch: int) -> Tensor:
        """Hidden tokens of the global crops, the same each time."""
        side = GLOBAL_SIZE // PATCH
        return block_masks(GLOBAL_CROPS * batch, (side, side), 1, 0.5, (0.1, 0.5), Random(0))
