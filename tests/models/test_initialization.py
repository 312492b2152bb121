from __future__ import annotations

import math

import timm
import torch

from geoexplora.models import MAEDecoder
from geoexplora.models.embeddings import sincos_2d
from geoexplora.models.initialization import initialize_plain_encoder


def test_plain_encoder() -> None:
    torch.manual_seed(0)
    encoder = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=0
    )
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.fill_(7.0)
    initialize_plain_encoder(encoder)
    assert encoder.pos_embed.equal(sincos_2d(32, (4, 4), 1))
    assert 0.01 < encoder.cls_token.std() < 0.03
    for name, parameter in encoder.named_parameters():
        if "norm" in name:
            assert (parameter == float(name.endswith("weight"))).all(), name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif name.endswith("weight"):  # a patch projection counts as one matrix
            limit = math.sqrt(6 / (parameter.shape[0] + parameter[0].numel()))
            assert 0.9 * limit < parameter.abs().max() <= limit, name


def test_decoder() -> None:
    torch.manual_seed(0)
    decoder = MAEDecoder(32, (4, 4), 8, None, 3, width=64, depth=1, heads=2)
    assert 0.01 < decoder.mask_token.std() < 0.03
    assert (decoder.pred.bias == 0).all()
    assert decoder.pos_embed.equal(sincos_2d(64, (4, 4), 1))
    assert not decoder.pos_embed.requires_grad
