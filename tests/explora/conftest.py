"""Tiny ViTs with every tensor random, so that no part can be left out or mixed up unseen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from geoexplora.models import MAEDecoder, MaskedAutoencoder
from geoexplora.objectives.mae import mae_loss
from geoexplora.objectives.masking import mask_from_noise

WIDTH, DEPTH, IMAGE, PATCH = 32, 4, 16, 4
GROUPS = ((2, 0), (1, 3, 5), (4,))
SIZES = {
    "img_size": IMAGE,
    "patch_size": PATCH,
    "embed_dim": WIDTH,
    "depth": DEPTH,
    "num_heads": 4,
    "num_classes": 0,
}
PLAIN = "vit_tiny_patch16_224"


def randomize(model: Any, seed: int = 0) -> Any:
    """Add noise to every tensor; LayerScale's gammas become 1, so that no block is switched off."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gamma"):
                parameter.fill_(1.0)
            else:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(0.1 * noise.to(parameter.dtype))
    return model


def fill_lora(model: Any, seed: int = 1) -> Any:
    """Give LoRA weights that change the output, as after training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(0.3 * noise.to(parameter.dtype))
    return model


def plain_encoder(**kwargs: Any) -> Any:
    torch.manual_seed(0)
    return randomize(timm.create_model(PLAIN, **(SIZES | {"init_values": 1e-5} | kwargs)))


def group_encoder(**kwargs: Any) -> Any:
    torch.manual_seed(0)
    return randomize(timm.create_model("group_channel_vit_base", groups=GROUPS, channel_width=8, **(SIZES | kwargs)))


ENCODERS: dict[str, Callable[..., Any]] = {"plain": plain_encoder, "groups": group_encoder}


@pytest.fixture(params=list(ENCODERS))
def encoder(request: pytest.FixtureRequest) -> Any:
    """A plain and a group-channel ViT of 4 blocks, in training mode."""
    return ENCODERS[request.param]()


def images_for(encoder: Any, batch: int = 2, seed: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    dtype = next(encoder.parameters()).dtype
    return torch.randn(batch, encoder.in_chans, IMAGE, IMAGE, generator=generator, dtype=torch.float64).to(dtype)


def decoder_for(encoder: Any, width: int = 24, depth: int = 2) -> MAEDecoder:
    groups = getattr(encoder.patch_embed, "groups", None)
    torch.manual_seed(2)
    decoder = MAEDecoder(
        WIDTH, encoder.patch_embed.grid_size, PATCH, groups, encoder.in_chans, width, depth, heads=2, channel_width=8
    )
    return randomize(decoder)


def loss_of(encoder: Any, decoder: MAEDecoder) -> Tensor:
    """The pre-training loss of one fixed batch."""
    images = images_for(encoder)
    groups = len(decoder.group_sizes)
    noise = torch.rand(2, groups * decoder.positions, generator=torch.Generator().manual_seed(4))
    mask = mask_from_noise(noise, 0.5, groups)
    output = MaskedAutoencoder(encoder, decoder)(images, mask.keep)
    return mae_loss(output.pred, images, mask.removed, decoder.channel_order, decoder.group_sizes)


def trainable(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}
