"""Crop, bicubic resize and flip of many boxes at once, as two batched matrix products on the images' device.

Bicubic interpolation is linear and separable, so each box is one small matrix per axis. Within a box the values equal
those of cropping first and ``torch.nn.functional.interpolate(mode="bicubic")`` after, with or without ``antialias``;
unlike there, the box may begin and end between pixels.

Most entries of these matrices are 0. That suits accelerators, whose products are cheap beside many small kernels; on a
CPU torchvision, crop by crop, is 3 to 4 times as fast (benchmarks/multi_crop.py).

Shape legend: B images, G boxes of each, N = B * G boxes, C bands, S the output's side, L the images' side,
T taps: the pixels that may contribute to one output pixel.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

_ROUNDING = 1e-6
"""Pixels: a box that ends this little inside the next pixel ends at its edge, up to rounding."""


class Boxes(NamedTuple):
    """Boxes in shares of their image's sides, on the CPU.

    Attributes:
        top: (B, G), float64.
        left: (B, G), float64.
        height: (B, G), float64.
        width: (B, G), float64.
        flip: (B, G), bool: turn left and right around.
    """

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor
    flip: Tensor


def resample(images: Tensor, boxes: Boxes, size: int, antialias: bool) -> Tensor:
    """Cut out, resize and flip boxes, in float32 also under autocast.

    Both axes have the same lengths before and after, so the order of the two products is without effect on their cost.

    Args:
        images: (B, C, L, L), on any device.
        boxes: G of each image.
        size: side S of the output.
        antialias: widen the kernel when shrinking. The two kernels differ even when enlarging, as PyTorch's do.

    Returns:
        (G * B, C, S, S), float32: the first box of all images, then the second. Bicubic overshoots: values may leave
        the input's range.
    """
    count, channels, side, _ = images.shape
    per_image = boxes.top.shape[1]
    if per_image == 0:
        return torch.zeros(0, channels, size, size, device=images.device)
    upright = torch.zeros_like(boxes.flip)
    with torch.autocast(images.device.type, enabled=False):
        rows = _matrices(boxes.top, boxes.height, upright, side, size, antialias, images.device)
        columns = _matrices(boxes.left, boxes.width, boxes.flip, side, size, antialias, images.device)
        # Height before bands: then all boxes of an image, and all its bands, are one product.
        tall = images.float().transpose(1, 2).reshape(count, side, channels * side)
        down = torch.bmm(rows.view(count, per_image * size, side), tall)
        across = torch.bmm(down.view(count * per_image, size * channels, side), columns.mT)
    return across.view(count, per_image, size, channels, size).permute(1, 0, 3, 2, 4).reshape(-1, channels, size, size)


def _matrices(
    start: Tensor, length: Tensor, flip: Tensor, source: int, target: int, antialias: bool, device: torch.device
) -> Tensor:
    """Interpolation matrices (N, target, source) along one axis, from shares of it, each (B, G)."""
    low = start.reshape(-1, 1) * source
    span = length.reshape(-1, 1) * source
    scale = span / target
    centre = low + scale * (torch.arange(target, dtype=torch.float64) + 0.5)
    centre = torch.where(flip.reshape(-1, 1), centre.flip(1), centre)
    # The pixels that the box touches: only they contribute, as if they had been cut out first.
    first = (low + _ROUNDING).floor().clamp(0, source - 1)
    last = torch.maximum((low + span - _ROUNDING).ceil().clamp(1, source) - 1, first)
    # Centres travel to the device in whole pixels and a remainder: float32 distances stay exact in large images.
    whole = centre.floor()
    remainder = (centre - whole).to(device, torch.float32)[..., None]
    pixel, first, last = (part.to(device, torch.int64)[..., None] for part in (whole, first, last))
    if antialias:
        widening = scale.clamp(min=1)
        taps = min(source, math.ceil(4 * float(widening.max())) + 1)
        reach = (2 * widening).ceil().to(device, torch.int64)[..., None]
        at = (pixel - reach).clamp(0, source - taps) + torch.arange(taps, device=device)
        distance = (at - pixel) + (0.5 - remainder)
        weight = _cubic(distance / widening.to(device, torch.float32)[..., None], -0.5)
        weight = weight * ((at >= first) & (at <= last))
        weight = weight / weight.sum(-1, keepdim=True)
    else:
        taps = min(source, 4)
        nearest = pixel - (remainder < 0.5).long() + torch.arange(-1, 3, device=device)
        share = _cubic((nearest - pixel) + (0.5 - remainder), -0.75)
        # Taps beyond the box repeat its outermost pixel.
        nearest = torch.minimum(torch.maximum(nearest, first), last)
        at = nearest[..., :1].clamp(0, source - taps) + torch.arange(taps, device=device)
        weight = ((nearest[..., None] == at[..., None, :]) * share[..., None]).sum(-2)
    # No pixel stands twice among the taps of one output pixel, so nothing depends on the order of writing.
    return torch.zeros(len(at), target, source, device=device).scatter_(2, at, weight)


def _cubic(distance: Tensor, a: float) -> Tensor:
    """The cubic convolution kernel (Keys 1981, equation 15 with free a): 1 at 0, 0 from 2 on."""
    x = distance.abs()
    inner = ((a + 2) * x - (a + 3)) * x * x + 1
    outer = a * (((x - 5) * x + 8) * x - 4)
    return torch.where(x <= 1, inner, torch.where(x < 2, outer, 0))
