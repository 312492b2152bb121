"""Puts peft's adapters on projections of a ViT, in place, and refuses what peft would do silently."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import peft
from peft.tuners.lora import LoraLayer
from timm.layers import Attention

from geoexplora.errors import ConfigError
from geoexplora.explora.attention import SplitAttention

ADAPTER = "default"


def lora_settings(rank: int, alpha: float | None, *, use_dora: bool = False) -> peft.LoraConfig:
    """LoRA of that rank as peft describes it; its update is scaled by alpha / rank, by 1 where alpha is ``None``."""
    alpha = rank if alpha is None else alpha
    return peft.LoraConfig(r=rank, lora_alpha=cast(int, alpha), lora_dropout=0.0, bias="none", use_dora=use_dora)


def inject(model: Any, settings: peft.LoraConfig, numbers: Sequence[int], targets: Sequence[str]) -> Any:
    """Split the attention of the numbered blocks and put adapters on its targets, in place.

    The adapters are trained; what else is trained stays as it is.

    Args:
        model: a ViT or MAE decoder.
        settings: peft's LoRA, DoRA or AdaLoRA, without targets.
        numbers: 1-based numbers of the blocks.
        targets: which of q_proj, k_proj and v_proj.

    Returns:
        peft's tuner of the model, such as ``peft.LoraModel``; only AdaLoRA needs it, for its rank allocator.

    Raises:
        ConfigError: if the model carries adapters already, the rank exceeds its width, or its blocks have no attention
            that can be split. The model is then unchanged.
    """
    refuse_adapters(model)
    for number in numbers:
        _check_attention(model.blocks[number - 1].attn, number, settings)
    wanted = [f"blocks.{number - 1}.attn.{target}" for number in numbers for target in targets]
    for number in numbers:
        block = model.blocks[number - 1]
        if type(block.attn) is Attention:
            block.attn = SplitAttention.from_fused(block.attn)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    settings.target_modules = wanted
    # As peft.inject_adapter_in_model does, which drops the tuner.
    tuner = (peft.AdaLoraModel if isinstance(settings, peft.AdaLoraConfig) else peft.LoraModel)(
        model, settings, ADAPTER
    )
    # A target list with a wrong name passes peft silently.
    hit = [name for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    if sorted(hit) != sorted(wanted):
        raise ConfigError(f"LoRA matched {len(hit)} of {len(wanted)} projections", f"Expected {wanted}.")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trainable or ".lora_" in name)
    # peft shortens long lists of targets (to "q_proj", ...), which would hit the whole blocks of a reloaded model too.
    model.peft_config[ADAPTER].target_modules = set(wanted)
    return tuner


def refuse_adapters(model: Any) -> None:
    """Refuse a model that carries adapters: injecting again would silently zero what they learned.

    Raises:
        ConfigError: if it does.
    """
    if hasattr(model, "peft_config"):
        raise ConfigError("the model already carries LoRA", "Merge it first: geoexplora.explora.merge_lora(model).")


def _check_attention(attention: Any, number: int, settings: peft.LoraConfig) -> None:
    if type(attention) is not Attention and not isinstance(attention, SplitAttention):
        raise ConfigError(f"cannot split {type(attention).__name__} in block {number}", "Use a plain timm ViT.")
    if getattr(attention, "gate", None) is not None:  # older timm knows no gate
        raise ConfigError(f"cannot split the gated attention in block {number}", "Use a plain timm ViT.")
    rank = settings.init_r if isinstance(settings, peft.AdaLoraConfig) else settings.r
    if rank > (width := attention.proj.in_features):
        raise ConfigError(
            f"LoRA rank {rank} exceeds the width {width}",
            f"Use at most {width}; AdaLoRA starts with 1.5 times the rank that it is asked for.",
        )
