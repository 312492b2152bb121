from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from geoexplora.bands import FMOW_SENTINEL_GROUPS, RGB, SENTINEL2
from geoexplora.errors import ConfigError, WeightsError
from geoexplora.weights.convert import (
    BAND_POLICIES,
    convert_bands,
    resample_kernel,
    resample_positions,
    rgb_to_groups,
)


@pytest.fixture
def kernel() -> torch.Tensor:
    return torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def bands(*names: str) -> list[object]:
    return [SENTINEL2.band(name) for name in names]


def test_rgb_goes_by_name_not_by_position(kernel: torch.Tensor) -> None:
    red, green, blue = kernel.unbind(1)
    mean = kernel.mean(1)
    first, second, third = rgb_to_groups(kernel, SENTINEL2, FMOW_SENTINEL_GROUPS)
    expected = torch.stack([blue, green, red, mean], 1) * 3 / 4
    torch.testing.assert_close(first, expected)
    torch.testing.assert_close(second, torch.stack([mean] * 4, 1) * 3 / 4)
    torch.testing.assert_close(third, torch.stack([mean] * 2, 1) * 3 / 2)


def test_nearest_wavelength(kernel: torch.Tensor) -> None:
    converted = convert_bands(kernel, RGB.bands, bands("B1", "B3", "B5", "B12"), "nearest-wavelength") * 4 / 3
    for index, source in enumerate((2, 1, 0, 0)):
        torch.testing.assert_close(converted[:, index], kernel[:, source])


def test_mean(kernel: torch.Tensor) -> None:
    converted = convert_bands(kernel, RGB.bands, bands("B4", "B8"), "mean")
    torch.testing.assert_close(converted, (kernel.mean(1, keepdim=True) * 1.5).expand(-1, 2, -1, -1))


@pytest.mark.parametrize("policy", ["rgb-by-name", "mean"])
@pytest.mark.parametrize("group", [("B2", "B3", "B4", "B8"), ("B11", "B12"), ("B8",), SENTINEL2.band_names])
def test_grey_pictures_are_embedded_as_by_the_source(kernel: torch.Tensor, policy: str, group: tuple[str, ...]) -> None:
    picture = torch.randn(2, 1, 8, 8)
    converted = convert_bands(kernel, RGB.bands, bands(*group), policy)
    torch.testing.assert_close(
        F.conv2d(picture.expand(-1, len(group), -1, -1), converted),
        F.conv2d(picture.expand(-1, 3, -1, -1), kernel),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize("policy", sorted(BAND_POLICIES))
def test_no_band_is_filled_with_zeros(kernel: torch.Tensor, policy: str) -> None:
    for converted in rgb_to_groups(kernel, SENTINEL2, FMOW_SENTINEL_GROUPS, policy=policy):
        assert (converted.flatten(2).norm(dim=(0, 2)) > 0).all()


def test_random_is_seeded_and_independent_of_the_source(kernel: torch.Tensor) -> None:
    def draw(seed: int, source: torch.Tensor) -> torch.Tensor:
        return convert_bands(
            source, RGB.bands, bands("B4", "B8"), "random", generator=torch.Generator().manual_seed(seed)
        )

    assert draw(1, kernel).equal(draw(1, kernel * 2))
    assert not draw(1, kernel).equal(draw(2, kernel))
    bound = (6 / (2 * 64 + 16)) ** 0.5
    assert bound * 0.9 < draw(1, kernel).abs().max() <= bound


def test_same_bands_stay_the_same(kernel: torch.Tensor) -> None:
    torch.testing.assert_close(convert_bands(kernel, RGB.bands, RGB.bands, "rgb-by-name"), kernel)


def test_refuses(kernel: torch.Tensor) -> None:
    with pytest.raises(ConfigError, match="Did you mean nearest-wavelength"):
        convert_bands(kernel, RGB.bands, bands("B4"), "nearest-wavelenght")
    with pytest.raises(WeightsError, match="3 bands R, G, B"):
        convert_bands(kernel[:, :2], RGB.bands, bands("B4"), "mean")
    with pytest.raises(ConfigError, match="a channel group is empty"):
        rgb_to_groups(kernel, SENTINEL2, [["B4"], []])


def test_pseudo_inverse_keeps_the_response(kernel: torch.Tensor) -> None:
    """FlexiViT: enlarging kernel and image alike leaves the response as it is."""
    image = torch.randn(4, 3, 8, 8)
    larger = F.interpolate(image, size=(16, 16), mode="bicubic", antialias=True)
    torch.testing.assert_close(
        F.conv2d(larger, resample_kernel(kernel, 16)), F.conv2d(image, kernel), rtol=1e-3, atol=1e-3
    )


def test_resampling_to_the_same_size_is_exact(kernel: torch.Tensor) -> None:
    assert resample_kernel(kernel, 8).equal(kernel)
    encoding = torch.randn(1, 17, 8)
    assert resample_positions(encoding, (4, 4), (4, 4)).equal(encoding)


def test_positions_keep_the_class_token() -> None:
    rows = torch.linspace(0, 1, 4).repeat_interleave(4)
    encoding = torch.cat([torch.tensor([7.0]), rows]).reshape(1, 17, 1)
    resampled = resample_positions(encoding, (4, 4), (6, 6))
    assert resampled.shape == (1, 37, 1)
    assert resampled[0, 0, 0] == 7
    grid = resampled[0, 1:, 0].reshape(6, 6)
    torch.testing.assert_close(grid, grid[:, :1].expand(-1, 6))
    assert (grid[:, 0].diff() > 0).all()
