"""Heads on pooled tokens: against slow loops, and what a frozen encoder costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

import geoexplora.models  # noqa: F401  registers the group-channel ViTs
from geoexplora.models.classifier import PooledClassifier, Pooling

GROUPS = ((2, 0), (1, 3, 5), (4,))
SIZES = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 0}


def plain(**more: Any) -> Any:
    return timm.create_model("vit_tiny_patch16_224", **SIZES, **more)


ENCODERS: dict[str, Callable[[], Any]] = {
    "plain": plain,
    "registers": lambda: plain(reg_tokens=3),
    "pooled norm": lambda: plain(global_pool="avg"),
    "groups": lambda: timm.create_model("group_channel_vit_base", groups=GROUPS, channel_width=8, **SIZES),
}


def made(kind: str) -> Any:
    torch.manual_seed(0)
    encoder = ENCODERS[kind]()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return encoder.eval()


def pooled_by_hand(encoder: Any, image: Tensor, pool: Pooling, kind: str) -> Tensor:
    """Token by token, of one image (C, S, S)."""
    tokens = list(encoder.forward_features(image[None])[0])
    patches = tokens[encoder.num_prefix_tokens :]
    groups = len(GROUPS) if kind == "groups" else 1
    each = len(patches) // groups
    means = []
    for group in range(groups):
        total = torch.zeros(32)
        for patch in patches[group * each : (group + 1) * each]:
            total = total + patch
        means.append(total / each)
    if kind == "pooled norm":
        means, tokens[0] = [encoder.fc_norm(means[0])], encoder.fc_norm(tokens[0])
    return torch.cat(([tokens[0]] if "cls" in pool else []) + (means if "mean" in pool else []))


@pytest.mark.parametrize("pool", ["cls", "mean", "cls+mean"])
@pytest.mark.parametrize("kind", ENCODERS)
@torch.no_grad()
def test_features_equal_a_slow_loop(kind: str, pool: Pooling) -> None:
    encoder = made(kind)
    model = PooledClassifier(encoder, 5, pool)
    images = torch.randn(3, 6 if kind == "groups" else 3, 16, 16)
    wanted = torch.stack([pooled_by_hand(encoder, image, pool, kind) for image in images])
    torch.testing.assert_close(model.features(images), wanted, rtol=1e-5, atol=1e-5)
    assert model.head.in_features == wanted.shape[1]
    scores = torch.stack([model.head.weight @ row + model.head.bias for row in wanted])
    torch.testing.assert_close(model(images), scores, rtol=1e-5, atol=1e-5)


def test_the_mean_of_a_plain_encoder_is_timms_own() -> None:
    for kind in ("plain", "registers", "pooled norm"):
        encoder = made(kind)
        images = torch.randn(2, 3, 16, 16)
        with torch.no_grad():
            tokens = encoder.forward_features(images)
            wanted = encoder.fc_norm(tokens[:, encoder.num_prefix_tokens :].mean(1))
            torch.testing.assert_close(PooledClassifier(encoder, 2, "mean").features(images), wanted)


@pytest.mark.parametrize("kind", ENCODERS)
def test_a_frozen_encoder_builds_no_graph(kind: str) -> None:
    encoder = made(kind).requires_grad_(False)
    model = PooledClassifier(encoder, 2, "mean")
    images = torch.randn(2, 6 if kind == "groups" else 3, 16, 16)
    features = model.features(images)
    assert features.grad_fn is None
    model(images).sum().backward()
    assert model.head.weight.grad is not None
    encoder.blocks[1].attn.proj.weight.requires_grad_(True)
    assert model.features(images).grad_fn is not None
    with torch.no_grad():
        assert model.features(images).grad_fn is None


@pytest.mark.parametrize("pool", ["cls", "mean", "cls+mean"])
@pytest.mark.parametrize("kind", ["plain", "registers", "pooled norm", "groups"])
def test_every_trainable_weight_gets_a_gradient(kind: str, pool: Pooling) -> None:
    """Distributed training fails otherwise."""
    encoder = made(kind).train()
    model = PooledClassifier(encoder, 2, pool)
    images = torch.randn(2, 6 if kind == "groups" else 3, 16, 16)
    model(images).square().sum().backward()
    assert not [name for name, weight in model.named_parameters() if weight.requires_grad and weight.grad is None]


def test_the_head_starts_small() -> None:
    head = PooledClassifier(made("plain"), 50, "cls").head
    assert not head.bias.any()
    assert 0.005 < float(head.weight.detach().std()) < 0.015
