"""Parameter groups and the learning-rate schedule."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

from torch import nn

from geoexplora.explora.table import norm_parameters, part_of

_SLOW_PARTS = {"whole blocks", "norms"}
_EMBEDDINGS = {"patch embedding", "position encoding", "channel encoding"}


def parameter_groups(
    encoder: Any,
    head: nn.Module,
    whole_blocks: tuple[int, ...],
    lr: float,
    slow_scale: float,
    weight_decay: float,
    head_loaded: bool = True,
    *,
    layer_decay: float = 1.0,
    patch_embed_scale: float = 1.0,
    new_embeddings: bool = True,
) -> list[dict[str, Any]]:
    """Sort the trainable parameters into AdamW's groups.

    Weights that go on from the source (whole blocks and norms) take ``slow_scale`` times the learning rate of what
    starts anew (LoRA, embeddings of new bands, the head's new parts). Vectors, tokens and encodings have no weight
    decay; the lengths of prototypes have, as in DINOv2.

    Args:
        encoder: the ViT.
        head: the objective's head.
        whole_blocks: 1-based numbers of the blocks trained whole.
        lr: learning rate of what starts anew.
        slow_scale: relative learning rate of whole blocks and norms.
        weight_decay: of matrices and kernels.
        head_loaded: whether the head's norms go on from the source too.
        layer_decay: what goes on from the source takes this factor once for each layer above it (BEiT, arXiv
            2106.08254, section 3.2): 1 for the final norm, the factor for block L, its square for block L - 1, ...
        patch_embed_scale: a further factor for patch embeddings that go on from the source (DINOv2).
        new_embeddings: whether patch embeddings and encodings start anew: both factors then pass them by.

    Returns:
        Groups with ``params``, ``lr``, ``weight_decay``, ``decays`` and ``name`` (starting with ``prototypes`` for
        the last layer of projection heads); empty ones are left out.
    """
    groups: dict[tuple[str, float, bool], list[nn.Parameter]] = {}
    encoder_norms, head_norms = norm_parameters(encoder), norm_parameters(head)
    for name, parameter in encoder.named_parameters():
        if parameter.requires_grad:
            part = part_of(name, encoder_norms, whole_blocks)
            slow = part in _SLOW_PARTS
            scale = slow_scale if slow else 1.0
            if part != "LoRA" and not (new_embeddings and part in _EMBEDDINGS):
                scale *= layer_decay ** _layers_above(name, len(encoder.blocks))
                scale *= patch_embed_scale if part == "patch embedding" else 1.0
            groups.setdefault(("whole" if slow else "new", scale, _decays(name, parameter)), []).append(parameter)
    for name, parameter in head.named_parameters():
        if parameter.requires_grad:
            slow = head_loaded and name in head_norms
            kind = "whole" if slow else "prototypes" if ".prototypes." in name else "new"
            key = (kind, slow_scale if slow else 1.0, _decays(name, parameter))
            groups.setdefault(key, []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": lr * scale,
            "weight_decay": weight_decay if decays else 0.0,
            "decays": decays,
            "name": f"{kind}{'' if decays else ' no decay'}",
        }
        for (kind, scale, decays), parameters in groups.items()
    ]


def _decays(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim > 1 and not name.endswith(("_token", "pos_embed", "channel_embed"))


def _layers_above(name: str, depth: int) -> int:
    """Layers from a parameter to the output: 0 for the final norm, 1 for the last block, depth + 1 for embeddings."""
    block = re.match(r"blocks\.(\d+)\.", name)
    if block:
        return depth - int(block[1])
    return 0 if name.startswith(("norm.", "fc_norm.")) else depth + 1


def cosine(start: float, end: float, progress: float) -> float:
    """A value that goes from ``start`` to ``end`` along half a cosine while ``progress`` goes from 0 to 1."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


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
        return cosine(1.0, floor, progress)

    return factor
