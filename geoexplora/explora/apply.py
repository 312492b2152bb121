"""Turns a timm-style ViT into an ExPLoRA student: what is frozen, what carries LoRA, what is trained whole."""

from __future__ import annotations

from typing import Any

from torch import nn

from geoexplora.errors import ConfigError
from geoexplora.explora.config import ExploraConfig
from geoexplora.explora.injection import inject, lora_settings, refuse_adapters

NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)
EMBEDDINGS = ("patch_embed", "pos_embed", "channel_embed", "channel_cls_embed")


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
    refuse_adapters(encoder)
    depth = len(encoder.blocks)
    outside = [number for number in config.whole_blocks if not 1 <= number <= depth]
    if outside:
        raise ConfigError(f"whole block {outside[0]} is out of range: the model has {depth} blocks", "Count from 1.")
    others = [number for number in range(1, depth + 1) if number not in config.whole_blocks]
    if config.rank:
        if not others:
            raise ConfigError("every block is trained whole: none is left for LoRA", "Use --rank 0 or --mode full.")
        inject(encoder, lora_settings(config.rank, config.alpha), others, config.targets)
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
    refuse_adapters(decoder)
    encodings = [decoder.pos_embed] if decoder.groups is None else [decoder.pos_embed, decoder.channel_embed]
    if not pretrained:
        decoder.requires_grad_(True)
        for encoding in encodings:
            encoding.requires_grad_(False)
        return
    if config.decoder_rank:
        settings = lora_settings(config.decoder_rank, config.alpha)
        inject(decoder, settings, range(1, len(decoder.blocks) + 1), config.targets)
    for name, parameter in decoder.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    if config.norms:
        unfreeze_norms(decoder)
    if new_bands:
        decoder.pred.requires_grad_(True)


def unfreeze_norms(model: nn.Module) -> None:
    """Make all normalization layers trainable."""
    for module in model.modules():
        if isinstance(module, NORMS):
            module.requires_grad_(True)
