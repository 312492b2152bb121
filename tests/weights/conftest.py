from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from geoexplora.bands import (
    FMOW_SENTINEL_BANDS,
    FMOW_SENTINEL_GROUPS,
    FMOW_SENTINEL_STATISTICS,
    IMAGENET_STATISTICS,
    Statistics,
)
from geoexplora.models.decoder import MAEDecoder
from geoexplora.weights.spec import EncoderSpec


def normalization(statistics: Statistics, method: str) -> dict[str, Any]:
    return {
        "method": method,
        "bands": list(statistics.bands),
        "mean": list(statistics.mean),
        "std": list(statistics.std),
    }


@pytest.fixture
def rgb_spec() -> EncoderSpec:
    return EncoderSpec.of(
        "vit_pico",
        image_size=64,
        patch_size=16,
        sensor="rgb",
        bands=("R", "G", "B"),
        normalization=normalization(IMAGENET_STATISTICS, "standardize"),
    )


@pytest.fixture
def group_spec() -> EncoderSpec:
    return EncoderSpec.of(
        "vit_pico",
        image_size=48,
        patch_size=8,
        sensor="sentinel-2",
        bands=FMOW_SENTINEL_BANDS,
        groups=FMOW_SENTINEL_GROUPS,
        normalization=normalization(FMOW_SENTINEL_STATISTICS.select(FMOW_SENTINEL_BANDS), "clip-uint8"),
    )


def plain_vit(image_size: int = 64, seed: int = 0, **overrides: Any) -> Any:
    """A stock timm ViT of vit_pico's sizes with every weight random, so that no two parts can be mixed up."""
    sizes = {"img_size": image_size, "embed_dim": 128, "depth": 8, "num_heads": 4, "num_classes": 0}
    model = timm.create_model("vit_tiny_patch16_224", **(sizes | overrides)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(torch.randn(value.shape, generator=generator) * 0.05)
    return model


def meta_mae(decoder: bool, image_size: int = 64) -> dict[str, Any]:
    """A file of Meta's: encoder and, if asked for, decoder tensors under ``model``, in Meta's names."""
    state: dict[str, Tensor] = dict(plain_vit(image_size).state_dict())
    if decoder:
        torch.manual_seed(1)
        grid = image_size // 16
        parts = MAEDecoder(128, (grid, grid), 16, None, 3, width=64, depth=2, heads=4).state_dict()
        state |= {name if name == "mask_token" else f"decoder_{name}": value for name, value in parts.items()}
    return {"model": state}


@pytest.fixture
def file_size_limit() -> Callable[[int], AbstractContextManager[None]]:
    """Makes the operating system refuse to write more than so many bytes to a file, as a full disk or quota does."""

    @contextmanager
    def limit(size: int) -> Iterator[None]:
        old = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)

    return limit
