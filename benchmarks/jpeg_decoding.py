"""Which decoder reads JPEG files fastest, and what is spared by decoding less than a whole image?

    python benchmarks/jpeg_decoding.py --json benchmarks/results/jpeg_decoding.json

Large images are mirrored from the bundled sample in true colour (quality 90, chroma halved). On one core, variants in
turn within each round so that a change of the machine's mood hits all of them:

1. decoders of whole images;
2. decoders that shrink within the inverse cosine transform;
3. decoders of a window in the middle, three tenths of each side;
4. samples of ``FMoWRGBDataModule`` (crop of the whole image, random crop of 0.2 to 1 of it, antialiased to 224 px,
   normalized): read at the resolution that the crop needs, in full resolution, and by a plain loop of Pillow and
   torchvision.

Decoders that are not installed are left out: simplejpeg and opencv-python-headless are no dependencies of this
package. Rates are images a second of CPU time of one process; ratios are medians over rounds of the rates within a
round, in brackets their least and greatest. Files are in memory, or in the page cache.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import tempfile
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import imagecodecs
import kornia_rs
import numpy as np
import rasterio
import torch
from circumstances import circumstances
from data_loading import Variant, measure, report
from numpy.typing import NDArray
from PIL import Image
from rasterio.windows import Window as RasterWindow
from torchvision.io import decode_jpeg
from torchvision.transforms import InterpolationMode, v2

from geoexplora.bands import FMOW_RGB_STATISTICS, SENTINEL2
from geoexplora.datamodules import FMoWRGBDataModule
from geoexplora.datasets import FMoWRGB, read_scene
from geoexplora.datasets.jpeg import Window, decode, read_header

SIDES = (1000, 2000, 3000)
FACTORS = (2, 4, 8)
SIZE = 224
SCALE = (0.2, 1.0)
OPTIONAL = {"simplejpeg": "simplejpeg", "opencv-python-headless": "cv2"}
COUNT = 8
"""Images in a tree of samples."""


def satellite_image(side: int, shift: int = 0) -> NDArray[np.uint8]:
    """(side, side, 3): the sample in true colour, mirrored on until it is large enough."""
    bands = read_scene().image[list(SENTINEL2.indices(("red", "green", "blue")))]
    colour = np.moveaxis(np.clip(bands * (255 / 3558), 0, 255).astype(np.uint8), 0, -1)
    more = [(0, max(0, side + shift - length)) for length in colour.shape[:2]]
    return np.ascontiguousarray(np.pad(colour, [*more, (0, 0)], mode="symmetric")[shift:, shift:][:side, :side])


def encode(pixels: NDArray[np.uint8]) -> bytes:
    """Quality 90, chroma halved in both directions."""
    target = io.BytesIO()
    Image.fromarray(pixels).save(target, "jpeg", quality=90, subsampling="4:2:0")
    return target.getvalue()


def once(read: Callable[[], Any]) -> Variant:
    """One image a call."""

    def run() -> int:
        read()
        return 1

    return run


def by_pillow(content: bytes, factor: int = 1, part: tuple[int, int, int, int] | None = None) -> NDArray[np.uint8]:
    """Whole, or shrunk, or a part."""
    with Image.open(io.BytesIO(content)) as image:
        if factor > 1:
            image.draft("RGB", (image.width // factor, image.height // factor))
        return np.asarray(image if part is None else image.crop(part))


def whole_decoders(content: bytes) -> dict[str, Variant]:
    """All pixels, (h, w, 3) or (3, h, w)."""
    tensor = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    variants: dict[str, Callable[[], Any]] = {
        "imagecodecs": lambda: imagecodecs.jpeg8_decode(content),
        "torchvision": lambda: decode_jpeg(tensor),
        "Pillow": lambda: by_pillow(content),
        "kornia-rs": lambda: kornia_rs.io.decode_image_jpeg(content),
    }
    if find_spec("simplejpeg"):
        simplejpeg: Any = importlib.import_module("simplejpeg")
        variants["simplejpeg"] = lambda: simplejpeg.decode_jpeg(content)
    if find_spec("cv2"):
        cv2: Any = importlib.import_module("cv2")
        cv2.setNumThreads(1)
        variants["opencv"] = lambda: cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
    return {name: once(read) for name, read in variants.items()}


def shrinking_decoders(content: bytes, side: int) -> dict[str, Variant]:
    """A half, a quarter, an eighth of each side, against all pixels."""
    variants: dict[str, Callable[[], Any]] = {"imagecodecs, whole": lambda: imagecodecs.jpeg8_decode(content)}
    for factor in FACTORS:
        variants[f"Pillow, 1/{factor}"] = lambda factor=factor: by_pillow(content, factor)
    if find_spec("simplejpeg"):
        simplejpeg: Any = importlib.import_module("simplejpeg")
        for factor in FACTORS:
            least = {"min_height": side // factor, "min_width": side // factor}
            variants[f"simplejpeg, 1/{factor}"] = lambda least=least: simplejpeg.decode_jpeg(content, **least)
    if find_spec("cv2"):
        cv2: Any = importlib.import_module("cv2")
        for factor in FACTORS:
            flag = getattr(cv2, f"IMREAD_REDUCED_COLOR_{factor}")
            variants[f"opencv, 1/{factor}"] = lambda flag=flag: cv2.imdecode(np.frombuffer(content, np.uint8), flag)
    return {name: once(read) for name, read in variants.items()}


def window_decoders(content: bytes, path: Path, side: int) -> dict[str, Variant]:
    """The middle, in full resolution and at a half."""
    low, high = 35 * side // 100, 65 * side // 100
    window, part = Window(low, low, high, high), (low, low, high, high)

    def by_gdal(factor: int) -> NDArray[np.uint8]:
        with rasterio.open(path) as file:
            shape = (3, (high - low) // factor, (high - low) // factor)
            return file.read(window=RasterWindow(low, low, high - low, high - low), out_shape=shape)

    header = read_header(content)
    return {
        "imagecodecs, whole, then a slice": once(lambda: decode(content, header, window)),
        "Pillow, cropped": once(lambda: by_pillow(content, 1, part)),
        "rasterio, window": once(lambda: by_gdal(1)),
        "Pillow, 1/2, cropped": once(lambda: decode(content, header, window, (high - low) // 2)),
        "rasterio, 1/2, window": once(lambda: by_gdal(2)),
    }


def write_tree(root: Path, side: int) -> Path:
    """A few large images of fMoW-RGB's layout."""
    for number in range(COUNT):
        place = root / "fmow-rgb" / "train" / "zoo" / f"zoo_{number}"
        place.mkdir(parents=True)
        (place / f"zoo_{number}_0_rgb.jpg").write_bytes(encode(satellite_image(side, 37 * number)))
        box = {"ID": -1, "category": "zoo", "box": [side // 4, side // 4, side // 2, side // 2]}
        content = {"img_width": side, "img_height": side, "bounding_boxes": [box]}
        (place / f"zoo_{number}_0_rgb.json").write_text(json.dumps(content))
    return root


def sample_readers(root: Path, seed: int) -> dict[str, Variant]:
    """Samples ready for the network."""
    datamodule = FMoWRGBDataModule(root, image_size=SIZE, crop="full", crop_scale=SCALE, seed=seed)
    datamodule.setup("fit")
    view, source = datamodule.train_dataset, datamodule.source("train")
    assert isinstance(source, FMoWRGB)
    transform = v2.Compose(
        [
            v2.PILToTensor(),
            v2.ToDtype(torch.float32),
            v2.Normalize(list(FMOW_RGB_STATISTICS.mean), list(FMOW_RGB_STATISTICS.std)),
            v2.RandomResizedCrop(SIZE, SCALE, interpolation=InterpolationMode.BICUBIC, antialias=True),
            v2.RandomHorizontalFlip(),
        ]
    )
    epochs = iter(range(10**9))

    def samples(least_side: int | None) -> Variant:
        def run() -> int:
            source.least_side = least_side
            epoch = next(epochs)
            for index in range(COUNT):
                view[(epoch, index)]
            return COUNT

        return run

    def plain() -> int:
        for index in range(COUNT):
            transform(Image.open(source.path(index)).convert("RGB"))
        return COUNT

    return {
        "plain loop: Pillow, torchvision": plain,
        "datamodule, full resolution": samples(None),
        "datamodule, least side": samples(datamodule.least_side),
    }


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.3, help="CPU time of a variant in a round")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the results there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    warnings.simplefilter("ignore")
    optional = [
        name for name, module in (("simplejpeg", "simplejpeg"), ("opencv-python-headless", "cv2")) if find_spec(module)
    ]
    results = circumstances(("torch", "torchvision", "pillow", "imagecodecs", "kornia-rs", "rasterio", *optional))
    results |= {"seed": arguments.seed, "rounds": arguments.rounds, "seconds_per_variant_and_round": arguments.seconds}
    print("\n".join(f"{name}: {value}" for name, value in results.items()))

    def run(title: str, variants: dict[str, Variant]) -> None:
        results[title] = report(title, measure(variants, arguments.rounds, arguments.seconds))

    # One environment around all files spares each of them its own.
    quick = rasterio.Env(GDAL_DISABLE_READDIR_ON_OPEN="EMPTY_DIR", GDAL_PAM_ENABLED=False)
    with tempfile.TemporaryDirectory() as folder, quick:
        for side in SIDES:
            content = encode(satellite_image(side))
            path = Path(folder) / f"{side}.jpg"
            path.write_bytes(content)
            size = f"{side} px, {len(content) / 1e6:.2f} MB"
            run(f"Whole images of {size}", whole_decoders(content))
            run(f"Shrunk within the cosine transform, {size}", shrinking_decoders(content, side))
            run(f"A window in the middle, {size}", window_decoders(content, path, side))
            run(
                f"Samples of {SIZE} px, {size}",
                sample_readers(write_tree(Path(folder) / f"tree{side}", side), arguments.seed),
            )
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
