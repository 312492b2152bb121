"""Parameter groups and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import nn

from geoexplora.explora.table import norm_parameters, part_of

_SLOW_PARTS = {"whole blocks", "norms"}


def parameter_groups(
    encoder: nn.Module,
    decoder: nn.Module,
    whole_blocks: tuple[int, ...],
    lr: float,
    slow_scale: float,
    weight_decay: float,
    decoder_loaded: bool = True,
) -> list[dict[str, Any]]:
    """Sort the trainable parameters into AdamW's groups.

    Weights that go on from the source (whole blocks and norms) take ``slow_scale`` times the learning rate of what
    starts anew (LoRA, embeddings, the decoder's new parts). Vectors, tokens and encodings have no weight decay.

    Args:
        encoder: the ViT.
        decoder: the objective's head.
        whole_blocks: 1-based numbers of the blocks trained whole.
        lr: learning rate of what starts anew.
        slow_scale: relative learning rate of whole blocks and norms.
        weight_decay: of matrices and kernels.
        decoder_loaded: whether the decoder's norms go on from the source too.

    Returns:
        Groups with ``params``, ``lr``, ``weight_decay`` and ``name``; empty ones are left out.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    encoder_norms, decoder_norms = norm_parameters(encoder), norm_parameters(decoder)
    for module in (encoder, decoder):
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            if module is encoder:
                slow = part_of(name, encoder_norms, whole_blocks) in _SLOW_PARTS
            else:
                slow = decoder_loaded and name in decoder_norms
            decays = parameter.ndim > 1 and not name.endswith(("_token", "pos_embed", "channel_embed"))
            groups.setdefault((slow, decays), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": lr * (slow_scale if slow else 1.0),
            "weight_decay": weight_decay if decays else 0.0,
            "name": f"{'whole' if slow else 'new'}{'' if decays else ' no decay'}",
        }
        for (slow, decays), parameters in groups.items()
    ]


def warmup_cosine(total_steps: int, warmup_steps: int, floor: float) -> Callable[[int], float]:
    """A factor of the learning rate for each step: linear from 0 to 1, then a cosine down to ``floor``.

    Args:
        total_steps: number of optimizer steps.
        warmup_steps: number of them with a rising rate.
        floor: the factor at the end.
    """

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    return factor
