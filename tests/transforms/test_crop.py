"""Crops against torchvision's."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tv
from torchvision.transforms.transforms import CenterCrop, RandomResizedCrop, Resize

from geoexplora.transforms.crop import EvaluationCrop, TrainCrop, WholeTile, _weights, random_box, resize, resize_mask


def unchanged(image: torch.Tensor) -> torch.Tensor:
    return image


@pytest.fixture
def tile() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 4000, (4, 45, 60), dtype=np.uint16)


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("source", [(5, 9), (45, 60), (96, 96), (130, 97)])
@pytest.mark.parametrize("target", [(16, 16), (96, 96), (45, 60), (33, 110)])
def test_resize_equals_torchvision(source: tuple[int, int], target: tuple[int, int], antialias: bool) -> None:
    image = torch.rand(3, *source, generator=torch.Generator().manual_seed(1))
    expected = tv.resize(image, list(target), InterpolationMode.BICUBIC, antialias=antialias)
    torch.testing.assert_close(resize(image, target, antialias), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("flip", [False, True])
def test_large_images_leave_the_cache_alone(flip: bool) -> None:
    image = torch.rand(2, 40, 700, generator=torch.Generator().manual_seed(1))
    _weights.cache_clear()
    resized = resize(image, (224, 224), True, flip)
    assert _weights.cache_info().currsize == 0
    expected = tv.resize(image, [224, 224], InterpolationMode.BICUBIC, antialias=True)
    torch.testing.assert_close(resized, expected.flip(-1) if flip else expected, rtol=0, atol=2e-6)
    for side in range(1, 400):
        resize(image[:1, :1, :side], (1, 224), False, flip)
    largest = max(_weights(side, 224, False).nbytes for side in range(200, 293))
    assert largest <= 2**18
    assert _weights.cache_info().maxsize * largest <= 64 * 2**20


def test_antialiasing_matters() -> None:
    image = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(1))
    assert (resize(image, (16, 16), True) - resize(image, (16, 16), False)).abs().mean() > 0.05


@pytest.mark.parametrize("shape", [(45, 60), (16, 16), (300, 20), (20, 300), (3, 2)])
@pytest.mark.parametrize("scale", [(0.2, 1.0), (0.01, 0.1), (0.9, 1.0)])
def test_boxes_are_torchvisions(shape: tuple[int, int], scale: tuple[float, float]) -> None:
    # Same seed, same draws in the same order: the very same boxes.
    generator = torch.Generator().manual_seed(7)
    ours = [random_box(*shape, scale, (3 / 4, 4 / 3), generator) for _ in range(50)]
    with torch.random.fork_rng():
        torch.manual_seed(7)
        image = torch.zeros(1, *shape)
        theirs = [RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3]) for _ in range(50)]
    assert ours == [tuple(int(value) for value in box) for box in theirs]


@pytest.mark.parametrize("antialias", [False, True])
def test_training_crop_equals_torchvision(tile: np.ndarray, antialias: bool) -> None:
    crop = TrainCrop(lambda image: image / 4000, 24, (0.2, 1.0), antialias)
    flips = 0
    for seed in range(20):
        ours = crop(tile, torch.Generator().manual_seed(seed))
        generator = torch.Generator().manual_seed(seed)
        box = random_box(45, 60, (0.2, 1.0), (3 / 4, 4 / 3), generator)
        image = torch.from_numpy(tile.astype(np.float32)) / 4000
        theirs = tv.resized_crop(image, *box, [24, 24], InterpolationMode.BICUBIC, antialias)
        if torch.rand(1, generator=generator) < 0.5:
            theirs, flips = tv.hflip(theirs), flips + 1
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)
    assert 0 < flips < 20


@pytest.mark.parametrize("shape", [(45, 60), (60, 45), (16, 16), (200, 31), (7, 300)])
@pytest.mark.parametrize("size", [16, 96])
@pytest.mark.parametrize("antialias", [False, True])
def test_evaluation_crop_equals_torchvision(shape: tuple[int, int], size: int, antialias: bool) -> None:
    tile = np.random.default_rng(2).random((2, *shape), dtype=np.float32)
    short = Resize(int(size / 0.875), InterpolationMode.BICUBIC, antialias=antialias)
    expected = CenterCrop(size)(short(torch.from_numpy(tile)))
    torch.testing.assert_close(EvaluationCrop(unchanged, size, antialias)(tile), expected, rtol=0, atol=2e-6)


def test_memory_order_does_not_matter(tile: np.ndarray) -> None:
    interleaved = np.moveaxis(np.ascontiguousarray(np.moveaxis(tile, 0, -1)), -1, 0)
    crop = TrainCrop(unchanged, 16)
    first, second = (crop(image, torch.Generator().manual_seed(3)) for image in (tile, interleaved))
    assert torch.equal(first, second)
    assert first.is_contiguous()


def test_the_raw_tile_is_left_alone() -> None:
    tile = np.ones((1, 8, 8), dtype=np.float32)
    TrainCrop(lambda image: image.mul_(3), 8, (1.0, 1.0), ratio=(1.0, 1.0), flip=0)(tile, torch.Generator())
    assert (tile == 1).all()


def slow_nearest(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """Each new pixel holds the old one in whose area its centre lies, in exact arithmetic."""
    rows = [math.floor(Fraction(2 * row + 1, 2) * Fraction(mask.shape[0], height)) for row in range(height)]
    columns = [math.floor(Fraction(2 * column + 1, 2) * Fraction(mask.shape[1], width)) for column in range(width)]
    return np.array([[mask[row, column] for column in columns] for row in rows])


@pytest.mark.parametrize("source", [(1, 1), (5, 9), (45, 60), (96, 97), (131, 33)])
@pytest.mark.parametrize("target", [(1, 1), (16, 16), (45, 60), (33, 110)])
@pytest.mark.parametrize("flip", [False, True])
def test_masks_are_resized_to_the_nearest_pixel(source: tuple[int, int], target: tuple[int, int], flip: bool) -> None:
    mask = np.random.default_rng(3).integers(0, 250, source)
    expected = slow_nearest(mask, *target)
    found = resize_mask(torch.from_numpy(mask), target, flip)
    np.testing.assert_array_equal(found.numpy(), expected[:, ::-1] if flip else expected)
    theirs = tv.resize(torch.from_numpy(mask)[None], list(target), InterpolationMode.NEAREST_EXACT)[0]
    assert (found.numpy() == (theirs.flip(-1) if flip else theirs).numpy()).mean() > 0.95, "theirs rounds in float32"


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64, bool])
def test_a_mask_is_cropped_and_flipped_with_its_image(tile: np.ndarray, dtype: type) -> None:
    crop = TrainCrop(lambda image: image / 4000, 24)
    mask = np.random.default_rng(4).integers(0, 2, (45, 60)).astype(dtype)
    flips = 0
    for seed in range(20):
        image, found = crop.with_mask(tile, mask, torch.Generator().manual_seed(seed))
        assert torch.equal(image, crop(tile, torch.Generator().manual_seed(seed))), "the mask changes nothing"
        generator = torch.Generator().manual_seed(seed)
        top, left, height, width = random_box(45, 60, (0.2, 1.0), (3 / 4, 4 / 3), generator)
        expected = slow_nearest(mask[top : top + height, left : left + width].astype(np.int64), 24, 24)
        if torch.rand(1, generator=generator) < 0.5:
            expected, flips = expected[:, ::-1], flips + 1
        np.testing.assert_array_equal(found.numpy(), expected)
        assert found.dtype == torch.int64
    assert 0 < flips < 20


@pytest.mark.parametrize("shape", [(45, 60), (16, 16), (200, 31)])
def test_masks_are_evaluated_whole(shape: tuple[int, int]) -> None:
    tile = np.random.default_rng(5).random((2, *shape), dtype=np.float32)
    mask = np.random.default_rng(6).integers(0, 9, shape)
    whole = WholeTile(unchanged, 24, True)
    for image, found in (
        EvaluationCrop(unchanged, 24, True).with_mask(tile, mask),
        whole.with_mask(tile, mask, torch.Generator()),
    ):
        assert torch.equal(image, whole(tile, None))
        np.testing.assert_array_equal(found.numpy(), slow_nearest(mask, 24, 24))
