"""Crops of raw tiles: random for training, central for evaluation; resized as torchvision does.

A mask goes through the very same crop and flip as its image, and is resized to its nearest pixels.

A tile stays in its raw type until the crop is known; then only the crop is converted, normalized and resized.
Normalization comes before resizing (as in the reference) and acts on single pixels, so it commutes with the crop.

Shape legend: C bands, (h, w) a tile, (k, l) a crop of it, S the output's side.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor
from torch.nn import functional

Array = NDArray[Any]
Normalize = Callable[[Tensor], Tensor]

EVALUATION_RATIO = 0.875
"""Evaluation resizes the short side to size / 0.875 before it takes the centre (the reference's 256 to 224)."""


_LARGEST = 2**16
"""Entries of the largest cached matrix, 256 KiB: with at most 256 of them, a loader worker spends at most 64 MiB."""


@lru_cache(maxsize=256)
def _weights(source: int, target: int, antialias: bool) -> Tensor:
    """Interpolation matrix (target, source) of PyTorch's bicubic along one axis: its answer to the unit vectors."""
    unit = torch.eye(source)[None, None]
    return functional.interpolate(unit, (target, source), mode="bicubic", antialias=antialias)[0, 0]


def resize(image: Tensor, size: tuple[int, int], antialias: bool, flip: bool = False) -> Tensor:
    """Bicubic resize, equal to torchvision's up to rounding.

    Bicubic interpolation is linear and separable: two products with small, cached matrices. At the size of satellite
    tiles this takes a third to a half of the general kernel's time (benchmarks/data_loading.py). Images too large for
    that, such as more than 292 px to 224, go to the general kernel.

    Args:
        image: (C, h, w), float32.
        size: output height and width.
        antialias: widen the kernel when shrinking (torchvision's default today; SatMAE's torchvision had none on
            tensors). The two kernels differ even when enlarging.
        flip: turn left and right around as well.

    Returns:
        (C, height, width), float32. Bicubic overshoots: values may leave the input's range.
    """
    channels, height, width = image.shape
    if (height, width) == size:
        return image.flip(-1) if flip else image
    if max(height * size[0], width * size[1]) > _LARGEST:
        large = functional.interpolate(image[None], size, mode="bicubic", antialias=antialias)[0]
        return large.flip(-1) if flip else large
    rows, columns = _weights(height, size[0], antialias), _weights(width, size[1], antialias)
    if flip:
        columns = columns.flip(0)
    across = torch.matmul(image.reshape(-1, width), columns.T).view(channels, height, size[1])
    return torch.matmul(rows, across)


def resize_mask(mask: Tensor, size: tuple[int, int], flip: bool = False) -> Tensor:
    """Resize to the nearest pixels, those in whose area the centres of the new ones lie (PyTorch's ``nearest-exact``).

    Args:
        mask: (h, w), of any type.
        size: output height and width.
        flip: turn left and right around as well.

    Returns:
        (height, width), of the same type.
    """
    rows, columns = (
        (2 * torch.arange(target) + 1) * source // (2 * target) for source, target in zip(mask.shape, size, strict=True)
    )
    return mask[rows[:, None], columns.flip(0) if flip else columns]


def random_box(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], generator: Generator | None
) -> tuple[int, int, int, int]:
    """Draw a crop as torchvision's ``RandomResizedCrop.get_params`` does, from a generator of one's own.

    Args:
        height: height of the tile.
        width: width of the tile.
        scale: smallest and largest share of the tile's area.
        ratio: smallest and largest width to height.
        generator: where the numbers come from; None: PyTorch's global one.

    Returns:
        Top, left, height, width.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        area = height * width * torch.empty(1).uniform_(*scale, generator=generator).item()
        aspect = math.exp(torch.empty(1).uniform_(low, high, generator=generator).item())
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = int(torch.randint(0, height - h + 1, (1,), generator=generator))
            left = int(torch.randint(0, width - w + 1, (1,), generator=generator))
            return top, left, h, w
    # No box fits, as in very long tiles: the largest central one of an allowed shape.
    if width / height < ratio[0]:
        w, h = width, round(width / ratio[0])
    elif width / height > ratio[1]:
        w, h = round(height * ratio[1]), height
    else:
        w, h = width, height
    return (height - h) // 2, (width - w) // 2, h, w


def _tensor(array: Array) -> Tensor:
    return torch.from_numpy(np.array(array, dtype=np.float32, order="C"))


def _mask_tensor(array: Array) -> Tensor:
    return torch.from_numpy(np.array(array, dtype=np.int64, order="C"))


@dataclass(frozen=True)
class TrainCrop:
    """Random resized crop and horizontal flip.

    Attributes:
        normalize: from raw units to network input, (C, k, l) to (C, k, l).
        size: side S of the output.
        scale: smallest and largest share of the tile's area.
        antialias: see ``resize``.
        ratio: smallest and largest width to height.
        flip: probability of a horizontal flip.
    """

    normalize: Normalize
    size: int
    scale: tuple[float, float] = (0.2, 1.0)
    antialias: bool = False
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5

    def __call__(self, image: Array, generator: Generator | None) -> Tensor:
        """Crop, normalize, resize, flip.

        Args:
            image: (C, h, w), raw, of any real type and memory order.
            generator: decides crop and flip; None: PyTorch's global one.

        Returns:
            (C, S, S), float32.
        """
        window, flip = self._draw(image, generator)
        return self._image(image, window, flip)

    def with_mask(self, image: Array, mask: Array, generator: Generator | None) -> tuple[Tensor, Tensor]:
        """The same crop and flip of an image and its mask.

        Args:
            image: as in a call.
            mask: (h, w), of any integer type.
            generator: as in a call; the image comes out as there.

        Returns:
            (C, S, S), float32, and (S, S), int64.
        """
        window, flip = self._draw(image, generator)
        cut = _mask_tensor(mask[window])
        return self._image(image, window, flip), resize_mask(cut, (self.size, self.size), flip)

    def _draw(self, image: Array, generator: Generator | None) -> tuple[tuple[slice, slice], bool]:
        top, left, height, width = random_box(image.shape[1], image.shape[2], self.scale, self.ratio, generator)
        flip = torch.rand(1, generator=generator).item() < self.flip
        return (slice(top, top + height), slice(left, left + width)), flip

    def _image(self, image: Array, window: tuple[slice, slice], flip: bool) -> Tensor:
        crop = self.normalize(_tensor(image[:, *window]))
        return resize(crop, (self.size, self.size), self.antialias, flip)


@dataclass(frozen=True)
class WholeTile:
    """The whole tile, stretched to a square: random crops of it are left to the device.

    Attributes:
        normalize: from raw units to network input, (C, h, w) to (C, h, w).
        size: side S of the output.
        antialias: see ``resize``.
    """

    normalize: Normalize
    size: int
    antialias: bool = False

    def __call__(self, image: Array, generator: Generator | None) -> Tensor:
        """Normalize, resize.

        Args:
            image: (C, h, w), raw, of any real type and memory order.
            generator: not drawn from.

        Returns:
            (C, S, S), float32.
        """
        return resize(self.normalize(_tensor(image)), (self.size, self.size), self.antialias)

    def with_mask(self, image: Array, mask: Array, generator: Generator | None) -> tuple[Tensor, Tensor]:
        """An image and its mask (h, w), of any integer type.

        Returns:
            (C, S, S), float32, and (S, S), int64.
        """
        return self(image, generator), resize_mask(_mask_tensor(mask), (self.size, self.size))


@dataclass(frozen=True)
class EvaluationCrop:
    """The short side resized to size / 0.875, then the central square.

    Attributes:
        normalize: from raw units to network input, (C, h, w) to (C, h, w).
        size: side S of the output.
        antialias: see ``resize``.
    """

    normalize: Normalize
    size: int
    antialias: bool = False

    def __call__(self, image: Array) -> Tensor:
        """Normalize, resize, crop.

        Args:
            image: (C, h, w), raw, of any real type and memory order.

        Returns:
            (C, S, S), float32.
        """
        _, height, width = image.shape
        short = int(self.size / EVALUATION_RATIO)
        # torchvision's Resize(int) truncates the long side.
        least = min(height, width)
        target = (int(short * height / least), int(short * width / least))
        resized = resize(self.normalize(_tensor(image)), target, self.antialias)
        top, left = (round((side - self.size) / 2) for side in target)
        return resized[:, top : top + self.size, left : left + self.size].contiguous()

    def with_mask(self, image: Array, mask: Array) -> tuple[Tensor, Tensor]:
        """The whole image and its whole mask (h, w), of any integer type, stretched to squares: nothing goes unjudged.

        Returns:
            (C, S, S), float32, and (S, S), int64.
        """
        return WholeTile(self.normalize, self.size, self.antialias).with_mask(image, mask, None)
