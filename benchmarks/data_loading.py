"""How fast do tiles come out of an fMoW-Sentinel tree, and where should crop and resize happen?

    python benchmarks/data_loading.py --json benchmarks/results/data_loading.json

Writes trees from the bundled sample (13 bands, uint16, deflate), then measures on one core, variants in turn within
each round so that a change of the machine's mood hits all of them:

1. a plain loop of rasterio, numpy and torchvision, per image, against the training view and the whole loader of
   ``FMoWSentinelDataModule`` without workers: crop (0.2, 1), clip to uint8, bicubic to 96 px, flip, ten bands;
2. readers alone: why tiles are decoded by imagecodecs;
3. resizing alone: why it is two matrix products in the workers, not torchvision's kernel or kornia on the batch.

Rates are tiles a second of CPU time of one process, that is per worker; ratios are medians over rounds of the rates
within a round, in brackets their least and greatest. Files are in the page cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import rasterio
import tifffile
import torch
from circumstances import circumstances
from kornia.augmentation import RandomResizedCrop as KorniaCrop
from torch.nn import functional
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tv
from torchvision.transforms.transforms import Compose, RandomHorizontalFlip, RandomResizedCrop

from geoexplora.bands import FMOW_SENTINEL_BANDS, FMOW_SENTINEL_STATISTICS, SENTINEL2
from geoexplora.datamodules import FMoWSentinelDataModule
from geoexplora.datasets import write_fmow_tree
from geoexplora.transforms import random_box, resize

SIZE = 96
SCALE = (0.2, 1.0)
RATIO = (3 / 4, 4 / 3)
TREES = {"32 to 64 px": (32, 64), "96 px": 96}
Variant = Callable[[], int]


def plain_loop(paths: list[Path]) -> Variant:
    """What one writes first: each file by rasterio, each image through numpy and torchvision."""
    statistics = FMOW_SENTINEL_STATISTICS
    mean, std = np.array(statistics.mean, np.float32), np.array(statistics.std, np.float32)
    low, high = mean - 2 * std, mean + 2 * std
    keep = list(SENTINEL2.indices(FMOW_SENTINEL_BANDS))
    transform = Compose(
        [
            RandomResizedCrop(SIZE, SCALE, interpolation=InterpolationMode.BICUBIC, antialias=False),
            RandomHorizontalFlip(),
        ]
    )

    def run() -> int:
        for path in paths:
            with rasterio.open(path) as file:
                pixels = file.read().transpose(1, 2, 0)[..., keep].astype(np.float32)
            levels = (pixels - low[keep]) / (high[keep] - low[keep]) * 255
            levels = np.clip(levels, 0, 255).astype(np.uint8)
            image = torch.from_numpy(levels.transpose(2, 0, 1).copy()).float() / 255
            transform(image)
        return len(paths)

    return run


def training_view(datamodule: FMoWSentinelDataModule) -> Variant:
    """Single samples of the datamodule's training view."""
    view = datamodule.train_dataset
    epochs = iter(range(10**9))

    def run() -> int:
        epoch = next(epochs)
        for index in range(len(view)):
            view[(epoch, index)]
        return len(view)

    return run


def loader(datamodule: FMoWSentinelDataModule) -> Variant:
    """The whole loader in this process: order, samples, collation."""
    datamodule.num_batches = len(datamodule.train_dataset) // datamodule.batch_size

    def run() -> int:
        return sum(len(batch["image"]) for batch in datamodule.train_dataloader())

    return run


def readers(paths: list[Path]) -> dict[str, Variant]:
    """Decoding alone, all bands."""

    def each(read: Callable[[Path], Any]) -> Variant:
        def run() -> int:
            for path in paths:
                read(path)
            return len(paths)

        return run

    def by_rasterio(path: Path) -> Any:
        with rasterio.open(path) as file:
            return file.read()

    def by_tifffile(path: Path) -> Any:
        with tifffile.TiffFile(path) as file:
            return file.pages[0].asarray()

    every = each(by_rasterio)

    def tuned() -> int:
        with rasterio.Env(GDAL_DISABLE_READDIR_ON_OPEN="EMPTY_DIR", GDAL_PAM_ENABLED=False):
            return every()

    return {
        "rasterio": every,
        "rasterio, outer Env, no directory scan, no PAM": tuned,
        "tifffile": each(by_tifffile),
        "imagecodecs": each(lambda path: imagecodecs.tiff_decode(path.read_bytes())),
    }


def resizers(side: int) -> dict[str, Variant]:
    """Crop and resize alone, 64 normalized tiles of one size (kornia works on whole batches only)."""
    batch = torch.rand(64, len(FMOW_SENTINEL_BANDS), side, side, generator=torch.Generator().manual_seed(0))
    draws = torch.Generator().manual_seed(1)

    def crops() -> Iterator[torch.Tensor]:
        for image in batch:
            top, left, height, width = random_box(side, side, SCALE, RATIO, draws)
            yield image[:, top : top + height, left : left + width]

    def each(change: Callable[[torch.Tensor], Any]) -> Variant:
        def run() -> int:
            torch.stack([change(crop) for crop in crops()])
            return len(batch)

        return run

    def whole(change: Callable[[torch.Tensor], Any]) -> Variant:
        def run() -> int:
            change(batch)
            return len(batch)

        return run

    def kornia(mode: str) -> Variant:
        return whole(KorniaCrop((SIZE, SIZE), SCALE, RATIO, resample="bicubic", cropping_mode=mode))

    size = [SIZE, SIZE]
    return {
        "torchvision, per image": each(lambda crop: tv.resize(crop, size, InterpolationMode.BICUBIC, antialias=False)),
        "torch interpolate, per image": each(lambda crop: functional.interpolate(crop[None], size, mode="bicubic")[0]),
        "two matrix products, per image": each(lambda crop: resize(crop, (SIZE, SIZE), antialias=False)),
        "kornia on the batch, slice": kornia("slice"),
        "kornia on the batch, resample": kornia("resample"),
    }


def measure(variants: dict[str, Variant], rounds: int, seconds: float) -> dict[str, list[float]]:
    """Tiles a second of CPU time, one rate a round, the variants in turn."""
    rates: dict[str, list[float]] = {name: [] for name in variants}
    for variant in variants.values():
        variant()
    for number in range(rounds):
        # Every other round backwards, so that no variant always follows the same one.
        for name in list(variants) if number % 2 == 0 else list(variants)[::-1]:
            count, start = 0, time.process_time()
            while time.process_time() - start < seconds:
                count += variants[name]()
            rates[name].append(count / (time.process_time() - start))
    return rates


def report(title: str, rates: dict[str, list[float]]) -> dict[str, Any]:
    """Print a table, the first variant being the measure of the others."""
    print(f"\n{title}\n")
    print(f"| {'variant':<48} | tiles/s | ratio to the first |")
    print(f"| {'-' * 48} | ------: | -----------------: |")
    first = next(iter(rates.values()))
    results = {}
    for name, values in rates.items():
        ratios = [value / base for value, base in zip(values, first, strict=True)]
        middle, spread = statistics.median(ratios), f"[{min(ratios):.2f} {max(ratios):.2f}]"
        print(f"| {name:<48} | {statistics.median(values):7.0f} | {middle:5.2f} {spread:>12} |")
        results[name] = {"tiles_per_second": values, "ratio_median": middle, "ratio_range": [min(ratios), max(ratios)]}
    return results


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.5, help="CPU time of a variant in a round")
    parser.add_argument("--limit", type=int, default=32, help="tiles a block (there are 8)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the results there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    warnings.simplefilter("ignore")
    results = circumstances(("torch", "torchvision", "kornia", "rasterio", "imagecodecs"))
    results |= {"seed": arguments.seed, "rounds": arguments.rounds, "seconds_per_variant_and_round": arguments.seconds}
    print("\n".join(f"{name}: {value}" for name, value in results.items()))
    with tempfile.TemporaryDirectory() as folder:
        for name, size in TREES.items():
            root = write_fmow_tree(Path(folder) / name, size, labelled=False, limit=arguments.limit)
            paths = sorted(root.rglob("*.tif"))
            datamodule = FMoWSentinelDataModule(root, image_size=SIZE, seed=arguments.seed)
            datamodule.setup("fit")
            variants = {
                "plain loop: rasterio, numpy, torchvision": plain_loop(paths),
                "training view of the datamodule": training_view(datamodule),
                "loader of the datamodule, collated": loader(datamodule),
            }
            rates = measure(variants, arguments.rounds, arguments.seconds)
            results[f"samples, {name}"] = report(f"Samples of {len(paths)} tiles of {name}", rates)
            rates = measure(readers(paths), arguments.rounds, arguments.seconds)
            results[f"readers, {name}"] = report(f"Reading alone, 13 bands of {name}", rates)
    for side in (48, 96):
        rates = measure(resizers(side), arguments.rounds, arguments.seconds)
        results[f"resizing, {side} px"] = report(f"Crop and resize alone, {side} px to {SIZE}, 10 bands", rates)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
