"""Resampling of boxes against cropping first and PyTorch's kernels, and against a loop over pixels."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from geoexplora.transforms.resampling import Boxes, resample

B, G, C = 2, 3, 2


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def whole_boxes(side: int, seed: int) -> tuple[torch.Tensor, Boxes]:
    """Boxes of whole pixels: (4, B, G) integers, and the same as shares."""
    draws = random(seed)
    height, width = torch.randint(1, side + 1, (2, B, G), generator=draws)
    top, left = ((torch.rand(B, G, generator=draws) * (side - part + 1)).long() for part in (height, width))
    pixels = torch.stack((top, left, height, width))
    return pixels, Boxes(*(pixels.double() / side), torch.rand(B, G, generator=draws) < 0.5)


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("size", [1, 2, 7, 24, 60])
@pytest.mark.parametrize("side", [1, 2, 3, 5, 13, 48])
def test_whole_boxes_equal_cropping_first(side: int, size: int, antialias: bool) -> None:
    for seed in range(3):
        images = torch.rand(B, C, side, side, generator=random(seed))
        pixels, boxes = whole_boxes(side, seed + 10)
        found = resample(images, boxes, size, antialias).view(G, B, C, size, size)
        for image in range(B):
            for box in range(G):
                top, left, height, width = pixels[:, image, box].tolist()
                crop = images[image : image + 1, :, top : top + height, left : left + width]
                expected = functional.interpolate(crop, (size, size), mode="bicubic", antialias=antialias)[0]
                if boxes.flip[image, box]:
                    expected = expected.flip(-1)
                torch.testing.assert_close(found[box, image], expected, rtol=0, atol=1e-5)


def kernel(x: float, a: float) -> float:
    x = abs(x)
    if x < 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def slow_axis(values: np.ndarray, start: float, length: float, size: int, antialias: bool) -> np.ndarray:
    """Resample the last axis, output pixel by output pixel, in float64."""
    side = values.shape[-1]
    first, last = math.floor(start * side), math.ceil((start + length) * side) - 1
    out = np.zeros((*values.shape[:-1], size))
    scale = length * side / size
    for i in range(size):
        centre = start * side + (i + 0.5) * scale
        if antialias:
            weights = {j: kernel((j + 0.5 - centre) / max(scale, 1), -0.5) for j in range(first, last + 1)}
            total = sum(weights.values())
            for j, weight in weights.items():
                out[..., i] += values[..., j] * weight / total
        else:
            for j in range(first - 3, last + 4):
                out[..., i] += values[..., min(max(j, first), last)] * kernel(j + 0.5 - centre, -0.75)
    return out


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("size", [3, 11])
@pytest.mark.parametrize("side", [2, 9, 40])
def test_boxes_between_pixels_equal_a_loop(side: int, size: int, antialias: bool) -> None:
    draws = random(side)
    images = torch.rand(B, C, side, side, generator=draws)
    lengths = 0.03 + 0.97 * torch.rand(2, B, G, generator=draws, dtype=torch.float64)
    starts = (1 - lengths) * torch.rand(2, B, G, generator=draws, dtype=torch.float64)
    boxes = Boxes(starts[0], starts[1], lengths[0], lengths[1], torch.rand(B, G, generator=draws) < 0.5)
    found = resample(images, boxes, size, antialias).view(G, B, C, size, size).numpy()
    for image in range(B):
        for box in range(G):
            top, left, height, width = (float(part[image, box]) for part in boxes[:4])
            values = images[image].double().numpy()
            across = slow_axis(values, left, width, size, antialias)
            down = slow_axis(across.swapaxes(-1, -2), top, height, size, antialias).swapaxes(-1, -2)
            expected = down[..., ::-1] if boxes.flip[image, box] else down
            np.testing.assert_allclose(found[box, image], expected, rtol=0, atol=1e-5)


def test_large_images_keep_their_accuracy() -> None:
    # Enlarged by the antialiased kernel, a ramp stays one; float32 centres would be wrong by 1e-4 pixels.
    side, size = 2000, 300
    images = (torch.arange(side, dtype=torch.float32) - 1700).expand(1, 1, side, side)
    top, left, height, width = (torch.full((1, 1), share, dtype=torch.float64) for share in (0.1, 0.8, 0.1, 0.1123))
    found = resample(images, Boxes(top, left, height, width, torch.zeros(1, 1, dtype=torch.bool)), size, True)
    centres = 0.8 * side + 0.1123 * side / size * (torch.arange(size, dtype=torch.float64) + 0.5)
    middle = slice(10, -10)
    torch.testing.assert_close(found[0, 0, 150, middle].double(), centres[middle] - 1700.5, rtol=0, atol=4e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(dtype: torch.dtype) -> None:
    images = torch.rand(B, C, 20, 20, generator=random(0))
    _, boxes = whole_boxes(20, 1)
    expected = resample(images, boxes, 8, True)
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(resample(images, boxes, 8, True), expected)
    half = resample(images.to(dtype), boxes, 8, True)
    assert half.dtype == torch.float32
    assert torch.equal(half, resample(images.to(dtype).float(), boxes, 8, True))


def test_no_boxes_give_no_crops() -> None:
    empty = torch.zeros(B, 0, dtype=torch.float64)
    found = resample(torch.rand(B, C, 5, 5), Boxes(empty, empty, empty, empty, empty.bool()), 4, True)
    assert found.shape == (0, C, 4, 4)
