"""Multi-crop (Caron et al. 2020, arXiv 2006.09882; as in DINOv2, arXiv 2304.07193) of whole batches on the device.

Shape legend: B images, C bands, L the images' side, S and s the sides of global and local crops.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from geoexplora.errors import ConfigError
from geoexplora.transforms.resampling import Boxes, resample

_TRIES = 10
"""Boxes drawn for a crop before the central one is taken, as in torchvision."""


@dataclass(frozen=True)
class Crops:
    """Crops of a batch: first crop of all images, then the second, and so on.

    Attributes:
        global_: (global crops * B, C, S, S), float32.
        local: (local crops * B, C, s, s), float32; of length 0 without local crops.
        batch_size: B.
    """

    global_: Tensor
    local: Tensor
    batch_size: int


@dataclass(frozen=True)
class MultiCrop:
    """Random resized crops and flips of two sizes, as ``torchvision.transforms.RandomResizedCrop`` draws them.

    Unlike there, edges of boxes lie between pixels as well, and all numbers come from one generator on the CPU: the
    same ones whatever the device. How many are drawn depends on the number of images only, and those of the global
    crops do not depend on the local ones.

    Attributes:
        global_size: side S of the global crops in pixels.
        local_size: side s of the local crops in pixels.
        global_scale: smallest and largest share of a tile's area that a global crop covers.
        local_scale: the same for local crops.
        ratio: smallest and largest width to height, before resizing to a square.
        global_crops: global crops of an image.
        local_crops: local crops of an image; may be 0.
        flip: probability of a horizontal flip.
        antialias: see ``geoexplora.transforms.resampling.resample``.

    Raises:
        ConfigError: if a setting is out of range.
    """

    global_size: int
    local_size: int
    global_scale: tuple[float, float] = (0.32, 1.0)
    local_scale: tuple[float, float] = (0.05, 0.32)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    global_crops: int = 2
    local_crops: int = 8
    flip: float = 0.5
    antialias: bool = True

    def __post_init__(self) -> None:
        """Check the settings."""
        if self.global_size < 1 or self.local_size < 1:
            raise ConfigError(
                f"global crops of {self.global_size} px and local crops of {self.local_size} px cannot be",
                "Give sizes of at least 1 pixel.",
            )
        if self.global_crops < 1 or self.local_crops < 0:
            raise ConfigError(
                f"{self.global_crops} global and {self.local_crops} local crops cannot be",
                "Give at least 1 global crop, and 0 or more local ones.",
            )
        for name, (low, high) in {"global": self.global_scale, "local": self.local_scale}.items():
            if not 0 < low <= high <= 1:
                raise ConfigError(
                    f"the scale {low}, {high} of {name} crops is not a range of shares",
                    "Give two numbers with 0 < low <= high <= 1.",
                )
        low, high = self.ratio
        if not 0 < low <= high < math.inf:
            raise ConfigError(
                f"{low}, {high} is not a range of ratios of width to height", "Give two with 0 < low <= high."
            )
        if not 0 <= self.flip <= 1:
            raise ConfigError(f"the probability {self.flip} of a flip is none", "Give a number from 0 to 1.")

    @torch.no_grad()
    def __call__(self, images: Tensor, sizes: Tensor, generator: Generator) -> Crops:
        """Draw the boxes and cut them out.

        Args:
            images: (B, C, L, L), normalized whole tiles, each stretched to a square; on any device.
            sizes: (B, 2), on the CPU: the tiles' true heights and widths, in which areas and ratios are meant.
            generator: decides boxes and flips; on the CPU.

        Returns:
            The crops, on the images' device, without gradients.

        Raises:
            ValueError: if the images are not square, or the sizes do not fit them.
        """
        if images.ndim != 4 or images.shape[2] != images.shape[3]:
            raise ValueError(f"images of shape {tuple(images.shape)} are not (B, C, L, L)")
        if sizes.shape != (len(images), 2):
            raise ValueError(f"sizes of shape {tuple(sizes.shape)} are not ({len(images)}, 2), as the images need")
        if sizes.device.type != "cpu" or not bool((sizes > 0).all()):
            raise ValueError("sizes must be positive and on the CPU")
        big = self._draw(sizes, self.global_crops, self.global_scale, generator)
        small = self._draw(sizes, self.local_crops, self.local_scale, generator)
        return Crops(
            resample(images, big, self.global_size, self.antialias),
            resample(images, small, self.local_size, self.antialias),
            len(images),
        )

    def _draw(self, sizes: Tensor, crops: int, scale: tuple[float, float], generator: Generator) -> Boxes:
        """Draw that many boxes of each image, ``RandomResizedCrop.get_params`` for all of them at once."""
        count = len(sizes)
        # Whatever becomes of them, the same numbers are drawn for every box.
        tries = torch.rand(_TRIES, count, crops, 2, generator=generator, dtype=torch.float64)
        place = torch.rand(count, crops, 3, generator=generator, dtype=torch.float64)
        aspect = (sizes[:, 1].double() / sizes[:, 0].double())[:, None]
        area = scale[0] + (scale[1] - scale[0]) * tries[..., 0]
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        ratio = torch.exp(low + (high - low) * tries[..., 1])
        heights, widths = torch.sqrt(area / ratio * aspect), torch.sqrt(area * ratio / aspect)
        fits = (heights <= 1) & (widths <= 1)
        chosen = fits.to(torch.uint8).argmax(0, keepdim=True)
        # No box fits, as in very long tiles: the largest central one of an allowed shape.
        nearest = aspect.clamp(*self.ratio)
        found = fits.any(0)
        height = torch.where(found, heights.gather(0, chosen)[0], (aspect / nearest).clamp(max=1))
        width = torch.where(found, widths.gather(0, chosen)[0], (nearest / aspect).clamp(max=1))
        top, left = (
            (1 - side) * torch.where(found, place[..., axis], 0.5) for axis, side in enumerate((height, width))
        )
        return Boxes(top, left, height, width, place[..., 2] < self.flip)
