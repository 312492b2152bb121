"""Initial weights of masked autoencoders (He et al. 2022, arXiv 2111.06377, appendix A.1)."""

from __future__ import annotations

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from geoexplora.models.embeddings import sincos_2d


def initialize_linears(model: nn.Module) -> None:
    """Xavier-uniform linears and patch projections (each seen as one linear), zero biases, unit norms, in place."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            module.reset_parameters()


@torch.no_grad()
def initialize_plain_encoder(encoder: VisionTransformer) -> None:
    """Initialize a stock timm ViT as MAE does: Xavier-uniform linears and a sin-cos position encoding, in place."""
    initialize_linears(encoder)
    nn.init.normal_(encoder.cls_token, std=0.02)
    rows = encoder.pos_embed.shape[1] - encoder.patch_embed.num_patches  # none for registers, nor for what stands there
    encoder.pos_embed.copy_(sincos_2d(encoder.embed_dim, encoder.patch_embed.grid_size, rows))
