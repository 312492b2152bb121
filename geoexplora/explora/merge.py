"""Gives a plain ViT back: LoRA merged into its projections, queries, keys and values fused."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from geoexplora.explora.attention import SplitAttention


def merge_lora(model: Any) -> Any:
    """Merge LoRA, DoRA or AdaLoRA and fuse the projections, in place.

    Args:
        model: a ViT or MAE decoder after ``apply_explora`` or ``apply_finetuning``; one without LoRA is
            returned as it is.

    Returns:
        The same object, with stock timm attention and without a trace of peft.

    Raises:
        FloatingPointError: if a merged weight is not finite.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=False)
            base: Any = module.get_base_layer()
            if not torch.isfinite(base.weight).all():
                raise FloatingPointError(f"{name} is not finite after merging")
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, base)
    for block in model.blocks:
        if isinstance(block.attn, SplitAttention):
            block.attn = block.attn.to_fused()
    if hasattr(model, "peft_config"):
        del model.peft_config
    return model


def merged_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The plain state dict of a ViT that goes on training: merged copies, nothing changed in place.

    Args:
        model: a ViT or MAE decoder, with or without LoRA.

    Returns:
        Stock names and detached tensors on the CPU.
    """
    merged = merge_lora(copy.deepcopy(model))
    return {name: tensor.detach().cpu() for name, tensor in merged.state_dict().items()}
