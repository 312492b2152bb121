"""Turns a timm-style ViT into an ExPLoRA student: what is frozen, what carries LoRA, what is trained whole."""

from __future__ import annotations

from typing import Any, cast

import peft
from timm.layers import Attention
from torch import nn

from geoexplora.errors import ConfigError
from geoexplora.explora.attention import SplitAttention
from geoexplora.explora.config import ExploraConfig

NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)
EMBEDDINGS = ("patch_embed", "pos_embed", "channel_embed", "channel_cls_embed")
ADAPTER = "default"


def apply_explora(encoder: Any, config: ExploraConfig) -> None:
    """Freeze a ViT but for what ExPLoRA trains, and add LoRA, in place.

    The output does not change: LoRA starts at zero.

    Args:
        encoder: a timm-style ViT (``blocks``, ``cls_token``, ``patch_embed``), source weights loaded.
        config: what to train.

    Raises:
        ConfigError: if the model carries LoRA already, a whole block does not exist, the rank exceeds the width,
            LoRA was asked for but no block is left to carry it, or the attention cannot be split. The model is then
            unchanged.
    """
    _refuse_lora(encoder)
    depth = len(encoder.blocks)
    outside = [number for number in config.whole_blocks if not 1 <= number <= depth]
    if outside:
        raise ConfigError(f"whole block {outside[0]} is out of range: the model has {depth} blocks", "Count from 1.")
    others = [number for number in range(1, depth + 1) if number not in config.whole_blocks]
    if config.rank:
        if not others:
            raise ConfigError("every block is trained whole: none is left for LoRA", "Use --rank 0 or --mode full.")
        add_lora(encoder, config, others, config.rank)
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    for number in config.whole_blocks:
        encoder.blocks[number - 1].requires_grad_(True)
    if config.norms:
        unfreeze_norms(encoder)
    if config.class_token and encoder.cls_token is not None:
        encoder.cls_token.requires_grad_(True)
    if config.embeddings:
        for name, parameter in encoder.named_parameters():
            if name.split(".")[0] in EMBEDDINGS:
                parameter.requires_grad_(True)


def apply_explora_to_decoder(decoder: Any, config: ExploraConfig, pretrained: bool, new_bands: bool) -> None:
    """Freeze an MAE decoder but for what ExPLoRA trains, in place.

    Args:
        decoder: ``geoexplora.models.MAEDecoder``.
        config: gives the decoder's rank.
        pretrained: whether its weights come from the source. A decoder without source weights is trained whole: there
            is nothing to keep.
        new_bands: whether its output projections are new.

    Raises:
        ConfigError: if the decoder carries LoRA already, or the decoder's rank exceeds its width.
    """
    _refuse_lora(decoder)
    encodings = [decoder.pos_embed] if decoder.groups is None else [decoder.pos_embed, decoder.channel_embed]
    if not pretrained:
        decoder.requires_grad_(True)
        for encoding in encodings:
            encoding.requires_grad_(False)
        return
    if config.decoder_rank:
        add_lora(decoder, config, range(1, len(decoder.blocks) + 1), config.decoder_rank)
    for name, parameter in decoder.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    if config.norms:
        unfreeze_norms(decoder)
    if new_bands:
        decoder.pred.requires_grad_(True)


def add_lora(model: Any, config: ExploraConfig, numbers: Any, rank: int) -> None:
    """Split the attention of the numbered blocks (1-based) and give its targets LoRA, in place.

    Raises:
        ConfigError: if the model carries LoRA already, the rank exceeds its width, or its blocks have no attention
            that can be split. The model is then unchanged.
    """
    _refuse_lora(model)
    for number in numbers:
        attention = model.blocks[number - 1].attn
        if type(attention) is not Attention and not isinstance(attention, SplitAttention):
            raise ConfigError(f"cannot split {type(attention).__name__} in block {number}", "Use a plain timm ViT.")
        if rank > (width := attention.proj.in_features):
            raise ConfigError(f"LoRA rank {rank} exceeds the width {width}", f"Use at most {width}.")
    wanted = []
    for number in numbers:
        block = model.blocks[number - 1]
        if type(block.attn) is Attention:
            block.attn = SplitAttention.from_fused(block.attn)
        wanted += [f"blocks.{number - 1}.attn.{target}" for target in config.targets]
    lora = peft.LoraConfig(
        r=rank, lora_alpha=cast(int, config.alpha or rank), target_modules=wanted, lora_dropout=0.0, bias="none"
    )
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    peft.inject_adapter_in_model(lora, model, ADAPTER)
    # A target list with a wrong name passes peft silently.
    hit = [name for name, module in model.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
    if sorted(hit) != sorted(wanted):
        raise ConfigError(f"LoRA matched {len(hit)} of {len(wanted)} projections", f"Expected {wanted}.")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trainable or ".lora_" in name)
    # peft shortens long lists of targets (to "q_proj", ...), which would hit the whole blocks of a reloaded model too.
    model.peft_config[ADAPTER].target_modules = set(wanted)


def _refuse_lora(model: Any) -> None:
    if hasattr(model, "peft_config"):
        raise ConfigError("the model already carries LoRA", "Merge it first: geoexplora.explora.merge_lora(model).")


def unfreeze_norms(model: nn.Module) -> None:
    """Make all normalization layers trainable."""
    for module in model.modules():
        if isinstance(module, NORMS):
            module.requires_grad_(True)
