"""The steps of a ViT one by one, against timm's own forward pass and against loops."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from geoexplora.models.encoding import embed, transform

GROUPS = ((2, 0), (1, 3, 5), (4,))
SIZES = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 0}

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("vit_tiny_patch16_224", {}),
    "registers": ("vit_tiny_patch16_224", {"reg_tokens": 2, "no_embed_class": True, "init_values": 1.0}),
    "norm first": ("vit_tiny_patch16_224", {"pre_norm": True}),
    "groups": ("group_channel_vit_base", {"groups": GROUPS, "channel_width": 8}),
    "groups, registers": ("group_channel_vit_base", {"groups": GROUPS, "channel_width": 8, "reg_tokens": 3}),
}


def build(kind: str, **kwargs: Any) -> Any:
    name, settings = KINDS[kind]
    torch.manual_seed(0)
    model = timm.create_model(name, **(SIZES | {"dynamic_img_size": True} | settings | kwargs))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def images_for(encoder: Any, height: int = 16, width: int = 16) -> Tensor:
    return torch.randn(3, encoder.in_chans, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(16, 16), (8, 8), (24, 20)])
def test_equals_timms_features(kind: str, size: tuple[int, int]) -> None:
    encoder = build(kind)
    images = images_for(encoder, *size)
    tokens = embed(encoder, images)
    groups = getattr(encoder, "num_groups", 1)
    assert tokens.shape == (3, encoder.num_prefix_tokens + groups * size[0] * size[1] // 16, 32)
    assert transform(encoder, tokens).equal(encoder.forward_features(images))


@pytest.mark.parametrize("kind", KINDS)
def test_own_size_equals_the_model_of_fixed_size(kind: str) -> None:
    encoder, fixed = build(kind), build(kind, dynamic_img_size=False)
    fixed.load_state_dict(encoder.state_dict())
    images = images_for(encoder)
    mask, token = torch.rand(3, embed(fixed, images).shape[1] - fixed.num_prefix_tokens) < 0.4, torch.randn(1, 32)
    assert embed(encoder, images).equal(embed(fixed, images))
    assert embed(encoder, images, mask, token).equal(embed(fixed, images, mask, token))


def encodings(encoder: Any, grid: tuple[int, int]) -> Tensor:
    """What is added to the patch tokens (N, D)."""
    prefix = 0 if encoder.no_embed_class else encoder.num_prefix_tokens
    if not hasattr(encoder, "num_groups"):
        return resample_abs_pos_embed(encoder.pos_embed, grid, (4, 4), num_prefix_tokens=prefix)[0, prefix:]
    prefix = encoder.num_prefix_tokens
    position = resample_abs_pos_embed(encoder.pos_embed, grid, (4, 4), num_prefix_tokens=prefix)[0, prefix:]
    return torch.cat([
        torch.cat([row, channel])[None] for channel in encoder.channel_embed[0] for row in position
    ])  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(16, 16), (8, 12)])
def test_mask_tokens_against_a_loop(kind: str, size: tuple[int, int]) -> None:
    """A hidden token is the mask token with the encoding of its place; the others are as without a mask."""
    encoder = build(kind)
    images, token = images_for(encoder, *size), torch.randn(1, 32)
    grid = (size[0] // 4, size[1] // 4)
    prefix = encoder.num_prefix_tokens
    plain = embed(encoder, images)
    mask = torch.rand(3, plain.shape[1] - prefix, generator=torch.Generator().manual_seed(2)) < 0.4
    mask[1] = False
    mask[2] = True
    tokens = embed(encoder, images, mask, token)
    places = encodings(encoder, grid)
    assert len(places) == mask.shape[1]
    for sample in range(3):
        assert tokens[sample, :prefix].equal(plain[sample, :prefix])
        for place in range(mask.shape[1]):
            if mask[sample, place]:
                torch.testing.assert_close(tokens[sample, prefix + place], token[0] + places[place])
            else:
                assert tokens[sample, prefix + place].equal(plain[sample, prefix + place])


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_mask_changes_nothing_and_a_mask_needs_a_token(kind: str) -> None:
    encoder = build(kind)
    images = images_for(encoder)
    plain = embed(encoder, images)
    mask = torch.zeros(3, plain.shape[1] - encoder.num_prefix_tokens, dtype=torch.bool)
    token = torch.randn(1, 32, requires_grad=True)
    tokens = embed(encoder, images, mask, token)
    assert tokens.equal(plain)
    tokens.sum().backward()
    assert token.grad is not None
    assert (token.grad == 0).all()
    assert embed(encoder, images, ~mask).equal(plain)


def test_mask_token_takes_the_type_of_the_patches() -> None:
    encoder = build("plain").bfloat16()
    images = images_for(encoder).bfloat16()
    mask = torch.ones(3, 16, dtype=torch.bool)
    assert embed(encoder, images, mask, torch.randn(1, 32)).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["plain", "groups"])
def test_gradient_checkpointing(kind: str) -> None:
    encoder = build(kind).train()
    images = images_for(encoder)
    runs = []
    encoder.blocks[0].attn.register_forward_hook(lambda *_: runs.append(1))
    results = []
    for checkpointing in (False, True):
        encoder.set_grad_checkpointing(checkpointing)
        encoder.zero_grad()
        tokens = transform(encoder, embed(encoder, images))
        tokens.square().sum().backward()
        results.append([tokens.detach(), *(p.grad.clone() for p in encoder.parameters())])
    assert len(runs) == 3  # one and, run again in the backward pass, two
    assert all(a.equal(b) for a, b in zip(*results, strict=True))
    encoder.eval()
    transform(encoder, embed(encoder, images)).sum().backward()
    assert len(runs) == 4  # only training recomputes


@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_tokens(kind: str) -> None:
    """As a masked autoencoder drops tokens: each sample alone, with its tokens only, is the same."""
    encoder = build(kind)
    tokens = embed(encoder, images_for(encoder))[:, :7]
    together = transform(encoder, tokens)
    for sample in range(3):
        torch.testing.assert_close(transform(encoder, tokens[sample : sample + 1])[0], together[sample])
