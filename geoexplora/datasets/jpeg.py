"""Decodes a part of a JPEG file, no larger than needed.

Most of the time goes into the Huffman codes, which every decoder has to read whole; what can be spared is the rest:
pixels that are resized away later (benchmarks/jpeg_decoding.py). Whole images are decoded by imagecodecs, smaller ones
by Pillow, whose ``draft`` shrinks by 2, 4 or 8 within the inverse cosine transform. Both use libjpeg-turbo. (GDAL stops
below a window, but may take a thumbnail in the file's header for a shrunk image.)
"""

from __future__ import annotations

import io
from typing import NamedTuple

import imagecodecs
import numpy as np
from numpy.typing import NDArray
from PIL.JpegImagePlugin import JpegImageFile

from geoexplora.datasets.tiles import UnusableTileError

FACTORS = (8, 4, 2)
"""By how much libjpeg can shrink within the inverse cosine transform."""

_END, _SCAN = 0xD9, 0xDA
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
"""Markers of frame headers; the others of that range hold tables."""
_ALONE = {0x01, *range(0xD0, 0xD8)}
"""Markers without a length."""


class JpegHeader(NamedTuple):
    """What a JPEG file's frame header says.

    Attributes:
        width: in stored pixels.
        height: in stored pixels.
        components: 1 for grey, 3 for colour, 4 for print colours (CMYK).
    """

    width: int
    height: int
    components: int


class Window(NamedTuple):
    """A part of an image in stored pixels; right and bottom are the first beyond it."""

    left: int
    top: int
    right: int
    bottom: int


def read_header(content: bytes) -> JpegHeader:
    """Read the frame header and look for the end of the file.

    Args:
        content: the whole file.

    Raises:
        UnusableTileError: if it is empty, no JPEG file, not of 8 bits, or truncated: decoders would fill the rest of
            the image with grey.
    """
    if not content:
        raise UnusableTileError("it is empty")
    if content[:2] != b"\xff\xd8":
        kind = "is a PNG file" if content[:4] == b"\x89PNG" else f"starts with the bytes {content[:4].hex(' ')}"
        raise UnusableTileError(f"it is no JPEG file: it {kind}")
    header: JpegHeader | None = None
    at = 2
    while at + 4 <= len(content):
        if content[at] != 0xFF:
            raise UnusableTileError("its header is damaged")
        marker = content[at + 1]
        if marker == 0xFF or marker in _ALONE:  # padding, or a marker that stands alone
            at += 1 if marker == 0xFF else 2
            continue
        if marker == _SCAN:
            break
        if marker in _FRAMES and at + 10 <= len(content):
            if content[at + 4] != 8:
                raise UnusableTileError(f"it has {content[at + 4]} bits a colour, not 8")
            height, width = (int.from_bytes(content[at + n : at + n + 2]) for n in (5, 7))
            header = JpegHeader(width, height, content[at + 9])
        at += 2 + int.from_bytes(content[at + 2 : at + 4])
    # The end marker cannot occur within a scan; one before it may belong to an embedded thumbnail.
    if header is None or content.rfind(bytes((0xFF, _END))) < at:
        raise UnusableTileError("it is truncated")
    if header.width < 1 or header.height < 1 or header.components not in {1, 3, 4}:
        raise UnusableTileError(
            f"its header is damaged: {header.width} x {header.height} px, {header.components} bands"
        )
    return header


def shrink_factor(window: Window, least_side: int | None) -> int:
    """The largest factor of 1, 2, 4 and 8 that leaves each side of the window at least ``least_side`` pixels."""
    if least_side is None:
        return 1
    side = min(window.right - window.left, window.bottom - window.top)
    return next((factor for factor in FACTORS if side >= factor * least_side), 1)


def decode(content: bytes, header: JpegHeader, window: Window, least_side: int | None = None) -> NDArray[np.uint8]:
    """Decode a window. A tag that the picture be turned (EXIF orientation) is ignored: windows are in stored pixels.

    Args:
        content: the whole file.
        header: as ``read_header`` gives it.
        window: the wanted part; within the image.
        least_side: the image may come shrunk by 2, 4 or 8, but each side of the window keeps at least so many pixels;
            None: in full resolution.

    Returns:
        (3, h, w), red, green, blue (equal in a grey image). Shrunk, a pixel at the edge may also cover a little of
        what lies outside the window.

    Raises:
        UnusableTileError: if it cannot be decoded.
    """
    factor = shrink_factor(window, least_side)
    try:
        if factor > 1 or header.components == 4:
            pixels = _decode_with_pillow(content, window, factor)
        else:
            whole = imagecodecs.jpeg8_decode(content)
            pixels = whole[window.top : window.bottom, window.left : window.right]
    except (imagecodecs.Jpeg8Error, OSError, SyntaxError, ValueError) as error:
        raise UnusableTileError(str(error) or type(error).__name__) from error
    if pixels.ndim == 2:
        pixels = np.broadcast_to(pixels[..., None], (*pixels.shape, 3))
    return np.moveaxis(pixels, -1, 0)


def _decode_with_pillow(content: bytes, window: Window, factor: int) -> NDArray[np.uint8]:
    """(h, w) or (h, w, 3) of the window, shrunk."""
    # Not Image.open: it takes any format, and refuses images of more than 179 megapixels.
    with JpegImageFile(io.BytesIO(content)) as image:
        mode = "L" if image.mode == "L" else "RGB"
        if factor > 1:
            image.draft(image.mode, (image.width // factor, image.height // factor))
        part = (window.left // factor, window.top // factor, -(-window.right // factor), -(-window.bottom // factor))
        # Cropped before it becomes an array: Pillow's own pixels take four bytes, and converting them takes long.
        return np.asarray(image.crop(part).convert(mode))
