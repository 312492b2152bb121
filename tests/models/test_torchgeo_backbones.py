"""Registered models are TorchGeo's ``model=`` and ``backbone=`` by their names.

``test_registration`` shows that importing the package is enough for that, before or after timm and TorchGeo.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader
from torchgeo.tasks import Classification, SemanticSegmentation

import geoexplora  # noqa: F401 -- all that a user of TorchGeo adds
from geoexplora.errors import WeightsError

SIZES = "w64_d4_h4"
NAMES = {
    "RGB": (f"plain_vit_tiny.s32_p16_c3_{SIZES}", 3),
    "RGB, registers": (f"plain_vit_tiny.s32_p16_c3_{SIZES}_ls_r2", 3),
    "ten bands": (f"plain_vit_tiny.s32_p16_c10_{SIZES}", 10),
    "ten bands in groups": (f"group_channel_vit_tiny.s32_p16_g0-1-2-6_g3-4-5-7_g8-9_{SIZES}_e16", 10),
    "ten bands in groups, pooled norm": (f"group_channel_vit_tiny.s32_p16_g0-1-2-6_g3-4-5-7_g8-9_{SIZES}_e16_avg", 10),
}


def batch_of(channels: int, key: str) -> DataLoader[dict[str, Tensor]]:
    """A batch of four; masks hold classes 0 to 2 and 255, which is none."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(4, channels, 32, 32, generator=generator)
    labels = torch.randint(3, (4, 32, 32), generator=generator)
    labels[:, :4] = 255
    targets = labels if key == "mask" else torch.tensor([0, 1, 2, 0])
    samples = [{"image": image, key: target} for image, target in zip(images, targets, strict=True)]
    return DataLoader(samples, batch_size=4)  # type: ignore[arg-type]


def train(task: Any, loader: DataLoader[dict[str, Tensor]]) -> dict[str, bool]:
    """One step and a validation; which parameters it changed."""
    before = {name: value.detach().clone() for name, value in task.model.named_parameters()}
    trainer = Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(task, loader, loader)
    assert trainer.global_step == 1
    assert trainer.callback_metrics["val_loss"].isfinite()
    return {name: not value.equal(before[name]) for name, value in task.model.named_parameters()}


def part(name: str) -> str:
    return name.removeprefix("encoder.model.").split(".")[0]


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("freeze_backbone", [False, True])
def test_classification(kind: str, freeze_backbone: bool) -> None:
    name, channels = NAMES[kind]
    torch.manual_seed(0)
    task: Any = Classification(model=name, in_channels=channels, num_classes=3, freeze_backbone=freeze_backbone)
    loader = batch_of(channels, "label")
    assert task(next(iter(loader))["image"]).shape == (4, 3)
    changed = train(task, loader)
    assert {name for name, moved in changed.items() if moved} == (
        {"head.weight", "head.bias"} if freeze_backbone else changed.keys()
    )


@pytest.mark.parametrize(
    ("kind", "freeze_backbone"), [*((kind, False) for kind in NAMES), ("RGB", True), ("ten bands in groups", True)]
)
def test_segmentation(kind: str, freeze_backbone: bool) -> None:
    """All that the output depends on is trained; DPT takes features before the final norm."""
    name, channels = NAMES[kind]
    torch.manual_seed(0)
    task: Any = SemanticSegmentation(
        model="dpt", backbone=f"tu-{name}", in_channels=channels, num_classes=3, ignore_index=255,
        freeze_backbone=freeze_backbone,
    )  # fmt: skip
    loader = batch_of(channels, "mask")
    assert task(next(iter(loader))["image"]).shape == (4, 3, 32, 32)
    changed = train(task, loader)
    still = {name for name, moved in changed.items() if not moved}
    if freeze_backbone:
        assert still == {name for name in changed if name.startswith("encoder.")}
    else:
        assert {part(name) for name in still} == {"fc_norm" if "pooled" in kind else "norm"}


def test_the_wrong_number_of_bands() -> None:
    name, _ = NAMES["ten bands"]
    for build in (
        lambda: Classification(model=name, in_channels=3, num_classes=3),
        lambda: SemanticSegmentation(model="dpt", backbone=f"tu-{name}", in_channels=3, num_classes=3),
    ):
        with pytest.raises(WeightsError, match=r"takes 10 bands, not 3\nGive in_channels=10 to TorchGeo's tasks"):
            build()
