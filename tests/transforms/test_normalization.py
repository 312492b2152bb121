"""Normalizations against their definitions."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from geoexplora.bands import FMOW_SENTINEL_BANDS, FMOW_SENTINEL_STATISTICS
from geoexplora.errors import ConfigError
from geoexplora.transforms.normalization import METHODS, Normalization

STATISTICS = FMOW_SENTINEL_STATISTICS.select(FMOW_SENTINEL_BANDS)


@pytest.fixture
def image() -> torch.Tensor:
    return torch.rand(10, 7, 5, generator=torch.Generator().manual_seed(0)) * 5000


def slow(method: str, image: torch.Tensor) -> np.ndarray:
    """Band by band in float64, from the definitions."""
    out = np.empty(image.shape)
    for channel, (mean, std) in enumerate(zip(STATISTICS.mean, STATISTICS.std, strict=True)):
        values = image[channel].double().numpy()
        if method == "standardize":
            out[channel] = (values - mean) / std
            continue
        low, high = mean - 2 * std, mean + 2 * std
        share = (np.clip(values, low, high) - low) / (high - low)
        out[channel] = (share * 255).astype(np.uint8) / 255 if method == "clip-uint8" else share
    return out


@pytest.mark.parametrize("method", METHODS)
def test_equals_its_definition(method: str, image: torch.Tensor) -> None:
    normalized = Normalization.from_statistics(method, STATISTICS)(image)
    assert normalized.dtype == torch.float32
    np.testing.assert_allclose(normalized.numpy(), slow(method, image), rtol=1e-5, atol=1e-6)


def test_reference_truncates_instead_of_rounding(image: torch.Tensor) -> None:
    levels = Normalization.from_statistics("clip-uint8", STATISTICS)(image) * 255
    shares = Normalization.from_statistics("clip-float", STATISTICS)(image) * 255
    assert torch.equal(levels, levels.round())
    assert (shares - levels >= -1e-3).all()
    assert (shares - levels).max() > 0.9


@pytest.mark.parametrize("method", METHODS)
def test_inverse_restores_what_was_not_clipped(method: str) -> None:
    normalization = Normalization.from_statistics(method, STATISTICS)
    mean = torch.tensor(STATISTICS.mean)[:, None, None].expand(10, 2, 2)
    restored = normalization.inverse(normalization(mean))
    # One of 255 levels spans four standard deviations.
    step = 4 * torch.tensor(STATISTICS.std)[:, None, None] / 255
    assert ((restored - mean).abs() <= (step if method == "clip-uint8" else 0.01)).all()


@pytest.mark.parametrize("dtype", [torch.uint16, torch.int16, torch.float64])
def test_any_type_and_any_leading_dimensions(dtype: torch.dtype, image: torch.Tensor) -> None:
    normalization = Normalization.from_statistics("clip-uint8", STATISTICS)
    whole = image.floor()
    assert torch.equal(normalization(whole.to(dtype)), normalization(whole))
    assert torch.equal(normalization(whole[None, None])[0, 0], normalization(whole))


def test_leaves_its_input_alone(image: torch.Tensor) -> None:
    before = image.clone()
    Normalization.from_statistics("clip-uint8", STATISTICS)(image)
    assert torch.equal(image, before)


def test_survives_json() -> None:
    normalization = Normalization.from_statistics("clip-float", STATISTICS)
    assert Normalization.from_dict(json.loads(json.dumps(normalization.to_dict()))) == normalization


def test_errors_name_the_remedy(image: torch.Tensor) -> None:
    with pytest.raises(ConfigError, match="Did you mean clip-uint8"):
        Normalization.from_statistics("clip-uint", STATISTICS)
    with pytest.raises(ConfigError, match="1 means and 2 deviations"):
        Normalization("standardize", ("R", "G"), (0.0,), (1.0, 1.0))
    with pytest.raises(ConfigError, match="deviation of G is not positive"):
        Normalization("standardize", ("R", "G"), (0.0, 0.0), (1.0, 0.0))
    with pytest.raises(ConfigError, match="normalization of 10 bands"):
        Normalization.from_statistics("standardize", STATISTICS)(image[:3])
    with pytest.raises(ConfigError, match="stored normalization"):
        Normalization.from_dict({"method": "standardize"})
