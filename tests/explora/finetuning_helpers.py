"""What the tests of fine-tuning share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from geoexplora.explora import FinetuneConfig, FineTuning

from .conftest import group_encoder, images_for, plain_encoder

KINDS: dict[str, Callable[[], Any]] = {
    "plain": lambda: plain_encoder(init_values=None),
    "LayerScale": plain_encoder,
    "groups": group_encoder,
}
STEPS = 16
CONFIGS = [
    FinetuneConfig("linear"),
    FinetuneConfig("lora", 3, alpha=5.0),
    FinetuneConfig("adalora", 4, alpha=6.0, total_steps=STEPS),
    FinetuneConfig("dora", 3, alpha=5.0),
    FinetuneConfig("full"),
]
ADAPTERS = CONFIGS[1:4]


def optimizer_for(encoder: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in encoder.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.05)


def train(encoder: Any, tuning: FineTuning, optimizer: torch.optim.Optimizer, steps: Iterable[int]) -> None:
    """Take the numbered steps, each on a batch of its own."""
    for step in steps:
        optimizer.zero_grad()
        loss = encoder(images_for(encoder, seed=step)).square().mean()
        penalty = tuning.regularization()
        (loss if penalty is None else loss + penalty).backward()
        optimizer.step()
        tuning.after_step(step)
