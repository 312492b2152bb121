"""Decoding of JPEG files against Pillow's plain decoding."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from geoexplora.datasets.jpeg import JpegHeader, Window, decode, read_header, shrink_factor
from geoexplora.datasets.tiles import UnusableTileError


def picture(height: int = 120, width: int = 200) -> Image.Image:
    """Smooth, so that JPEG keeps it."""
    rows, columns = np.mgrid[:height, :width]
    pixels = np.stack([rows * 200 / height, columns * 200 / width, 128 + 80 * np.sin(rows / 20 + columns / 15)], -1)
    return Image.fromarray(pixels.astype(np.uint8))


def encoded(image: Image.Image, **options: Any) -> bytes:
    target = io.BytesIO()
    image.save(target, "jpeg", **({"quality": 90} | options))
    return target.getvalue()


def plain(content: bytes) -> np.ndarray[Any, Any]:
    return np.moveaxis(np.asarray(Image.open(io.BytesIO(content)).convert("RGB")), -1, 0)


def whole(content: bytes, least_side: int | None = None) -> np.ndarray[Any, Any]:
    header = read_header(content)
    return decode(content, header, Window(0, 0, header.width, header.height), least_side)


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("shape", [(120, 200), (17, 33)])
def test_every_kind_reads_as_pillow_reads_it(
    mode: str, progressive: bool, subsampling: int, shape: tuple[int, int]
) -> None:
    content = encoded(picture(*shape).convert(mode), progressive=progressive, subsampling=subsampling)
    header = read_header(content)
    assert header == JpegHeader(shape[1], shape[0], {"RGB": 3, "L": 1, "CMYK": 4}[mode])
    read = whole(content)
    assert read.dtype == np.uint8
    assert read.shape == (3, *shape)
    # Two builds of libjpeg-turbo may round differently.
    np.testing.assert_allclose(read.astype(int), plain(content).astype(int), atol=2)


@pytest.mark.parametrize("window", [(0, 0, 200, 120), (13, 7, 90, 101), (150, 100, 200, 120), (199, 119, 200, 120)])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_window_is_a_part_of_the_whole(window: tuple[int, int, int, int], mode: str) -> None:
    content = encoded(picture().convert(mode))
    left, top, right, bottom = window
    read = decode(content, read_header(content), Window(*window))
    np.testing.assert_array_equal(read, whole(content)[:, top:bottom, left:right])


@pytest.mark.parametrize(
    ("window", "least_side", "factor"),
    [
        ((0, 0, 200, 120), None, 1),
        ((0, 0, 200, 120), 61, 1),
        ((0, 0, 200, 120), 60, 2),
        ((0, 0, 200, 120), 31, 2),
        ((0, 0, 200, 120), 30, 4),
        ((0, 0, 200, 120), 15, 8),
        ((0, 0, 200, 120), 1, 8),
        ((13, 7, 90, 101), 39, 1),
        ((13, 7, 90, 101), 38, 2),
        ((13, 7, 90, 101), 19, 4),
        ((13, 7, 20, 9), 1, 2),
        ((13, 7, 20, 8), 1, 1),
    ],
)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_shrunk_images_keep_the_least_side_and_the_place(
    window: tuple[int, int, int, int], least_side: int | None, factor: int, mode: str
) -> None:
    content = encoded(picture().convert(mode), subsampling=0)
    left, top, right, bottom = window
    assert shrink_factor(Window(*window), least_side) == factor
    read = decode(content, read_header(content), Window(*window), least_side)
    first = top // factor, left // factor
    end = -(-bottom // factor), -(-right // factor)
    assert read.shape == (3, end[0] - first[0], end[1] - first[1])
    assert least_side is None or min(read.shape[1:]) >= least_side
    # The cosine transform shrinks by about the mean of each square of pixels.
    full = whole(content).astype(float)
    squares = np.pad(full, [(0, 0), (0, -120 % factor), (0, -200 % factor)], mode="edge")
    squares = squares.reshape(3, squares.shape[1] // factor, factor, squares.shape[2] // factor, factor).mean((2, 4))
    np.testing.assert_allclose(read, squares[:, first[0] : end[0], first[1] : end[1]], atol=8)


def test_orientation_tags_are_ignored() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encoded(picture(), exif=exif)
    for least_side in (None, 30):
        read = whole(content, least_side)
        assert read.shape[2] > read.shape[1]
    np.testing.assert_array_equal(whole(content), whole(encoded(picture())))


def thumbnail() -> bytes:
    """A file with a whole small JPEG in its header, end marker and all."""
    inner = b"Exif\0\0" + encoded(picture(16, 16))
    content = encoded(picture())
    return content[:2] + b"\xff\xe1" + (len(inner) + 2).to_bytes(2) + inner + content[2:]


def test_headers_may_hold_thumbnails_and_padding() -> None:
    np.testing.assert_array_equal(whole(thumbnail()), whole(encoded(picture())))
    content = encoded(picture())
    np.testing.assert_array_equal(whole(content[:2] + b"\xff\xff" + content[2:]), whole(content))
    np.testing.assert_array_equal(whole(content + b"trailing"), whole(content))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (b"<html>not found</html>", "it is no JPEG file: it starts with the bytes 3c 68 74 6d"),
        (b"\x89PNG\r\n\x1a\n", "it is no JPEG file: it is a PNG file"),
        (encoded(picture())[:400], "it is truncated"),
        (encoded(picture())[:-2], "it is truncated"),
        (encoded(picture())[:-500], "it is truncated"),
        (encoded(picture(), progressive=True)[:-500], "it is truncated"),
        (thumbnail()[:-500], "it is truncated"),
        (encoded(picture())[:2], "it is truncated"),
        (b"\xff\xd8\0\0\0\0\0\0", "its header is damaged"),
        (b"\xff\xd8\xff\xc0\0\x0b\x08\0\0\0\x05\x03\0\0\0\xff\xda\0\2\xff\xd9", "its header is damaged: 5 x 0 px"),
        (b"\xff\xd8\xff\xc0\0\x0b\x0c\0\x05\0\x05\x03\0\0\0\xff\xd9", "it has 12 bits a colour, not 8"),
    ],
)
def test_unusable_files(content: bytes, message: str) -> None:
    with pytest.raises(UnusableTileError, match=message):
        read_header(content)


def test_a_header_without_tables_cannot_be_decoded() -> None:
    content = (
        b"\xff\xd8\xff\xc0\0\x0b\x08\0\x40\0\x40\x01\x01\x11\0\xff\xda\0\x08\1\1\0\0\x3f\0" + b"a" * 50 + b"\xff\xd9"
    )
    for least_side in (None, 8):
        with pytest.raises(UnusableTileError):
            whole(content, least_side)
