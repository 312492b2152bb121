"""The part of an fMoW-RGB image that a bounding box stands for.

Boxes are ``(x, y, width, height)`` in the image's stored pixels, (x, y) the upper left corner.
"""

from __future__ import annotations

from typing import Literal

from geoexplora.datasets.jpeg import Window

Crop = Literal["baseline", "tight", "full"]
CROPS: tuple[Crop, ...] = ("baseline", "tight", "full")

Box = tuple[int, int, int, int]

TINY = 2
"""The baseline leaves boxes out that are not wider or not higher than this many pixels."""

CONTEXT = ((0.1, 2.0), (0.2, 1.0), (0.3, 0.5), (0.4, 0.3), (0.5, 0.2))
"""Context as a share of the box's side, where that side is a smaller share of the image than the first number."""
LEAST_CONTEXT = 0.15
"""Context of larger boxes."""


def context(share: float) -> float:
    """How much of its side a box grows by, half of it at either end, if its side is that share of the image."""
    return next((grown for below, grown in CONTEXT if share < below), LEAST_CONTEXT)


def crop_window(box: Box, width: int, height: int, crop: Crop) -> Window:
    """The part of an image that a box stands for, clipped to the image.

    ``tight`` is the box itself, ``full`` the whole image. ``baseline`` is the box with the context that the dataset's
    baseline adds (Christie et al., Functional Map of the World, CVPR 2018, arXiv 1711.07846; the rule stands only in
    its code, ``_process_file`` in fMoW/baseline, ``dataFunctions.py``): the smaller a box in its image, the more. The
    box's *width* as a share of the image's *height*, and its height as a share of the image's width, look up what each
    side grows by: 200 % below a share of 0.1, 100 % below 0.2, 50 % below 0.3, 30 % below 0.4, 20 % below 0.5, else
    15 %. Half of that, truncated to whole pixels, is added at either end. That the shares are crossed matters in images
    that are not square; it is kept, since the published results come from such crops.

    Args:
        box: x, y, width, height.
        width: of the image.
        height: of the image.
        crop: one of ``CROPS``.

    Returns:
        The window.

    Raises:
        ValueError: if nothing of the box lies within the image.
    """
    x, y, across, down = box
    if across <= 0 or down <= 0 or x >= width or y >= height or x + across <= 0 or y + down <= 0:
        raise ValueError(f"the box {list(box)} has no area within the image of {width} x {height} px")
    if crop == "full":
        return Window(0, 0, width, height)
    wider = higher = 0
    if crop == "baseline":
        wider, higher = int(across * context(across / height) / 2), int(down * context(down / width) / 2)
    return Window(
        max(x - wider, 0),
        max(y - higher, 0),
        min(x + across + wider, width),
        min(y + down + higher, height),
    )
