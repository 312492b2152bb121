"""How fast is multi-crop as two batched matrix products?

    python benchmarks/multi_crop.py --json benchmarks/results/multi_crop.json

Cuts 2 global crops of 224 px and 8 local ones of 98 px out of each tile of a batch of 8 tiles of 396 px, with 3 and
with 10 bands, variants in turn within each round so that a change of the machine's mood hits all of them:

1. ``MultiCrop``: bicubic, antialiased; and the same with the photometric augmentation that follows;
2. torchvision v2's ``RandomResizedCrop`` and flip, crop by crop: the same kernel;
3. kornia's ``RandomResizedCrop`` and flip on the repeated batch, bicubic, resample, ``align_corners=False``: it has no
   antialiasing, so it computes less, and something else.

Rates are tiles a second of CPU time on one thread, or of wall time on an accelerator; ratios are medians over rounds
of the rates within a round, in brackets their least and greatest. Boxes are drawn anew in each call.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from circumstances import circumstances
from kornia.augmentation import RandomHorizontalFlip as KorniaFlip
from kornia.augmentation import RandomResizedCrop as KorniaCrop
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import Compose, RandomHorizontalFlip, RandomResizedCrop

from geoexplora.bands import FMOW_RGB_STATISTICS, FMOW_SENTINEL_BANDS, FMOW_SENTINEL_STATISTICS, RGB, SENTINEL2
from geoexplora.transforms.multi_crop import MultiCrop
from geoexplora.transforms.normalization import Normalization
from geoexplora.transforms.photometric import photometric

LOAD_SIZE = 396
VIEWS = ((2, 224, (0.32, 1.0)), (8, 98, (0.05, 0.32)))
SOURCES = {
    "3 bands": (RGB, FMOW_RGB_STATISTICS),
    "10 bands": (SENTINEL2, FMOW_SENTINEL_STATISTICS.select(FMOW_SENTINEL_BANDS)),
}


def variants(source: str, batch: int, seed: int, device: torch.device) -> dict[str, Callable[[], Any]]:
    """What is compared, on one batch of random tiles."""
    sensor, statistic = SOURCES[source]
    normalization = Normalization.from_statistics("clip-uint8", statistic)
    draws = torch.Generator().manual_seed(seed)
    images = torch.rand(batch, len(statistic.bands), LOAD_SIZE, LOAD_SIZE, generator=draws).to(device)
    sizes = torch.full((batch, 2), LOAD_SIZE)
    (_, large, _), (_, small, _) = VIEWS
    multi_crop = MultiCrop(large, small)
    augment = photometric("auto", sensor, normalization)
    single = [
        (
            crops,
            Compose([RandomResizedCrop(size, scale, interpolation=InterpolationMode.BICUBIC), RandomHorizontalFlip()]),
        )
        for crops, size, scale in VIEWS
    ]
    whole = [
        (crops, KorniaCrop((size, size), scale, resample="bicubic", cropping_mode="resample", align_corners=False))
        for crops, size, scale in VIEWS
    ]
    flip = KorniaFlip()

    def by_torchvision() -> list[Tensor]:
        return [torch.stack([crop(image) for _ in range(crops) for image in images]) for crops, crop in single]

    def by_kornia() -> list[Tensor]:
        return [flip(crop(images.repeat(crops, 1, 1, 1))) for crops, crop in whole]

    return {
        "MultiCrop": lambda: multi_crop(images, sizes, draws),
        "MultiCrop and photometric": lambda: augment(multi_crop(images, sizes, draws), draws),
        "torchvision v2, crop by crop": by_torchvision,
        "kornia on the batch, not antialiased": by_kornia,
    }


def measure(
    functions: dict[str, Callable[[], Any]], batch: int, rounds: int, seconds: float, device: torch.device
) -> dict[str, list[float]]:
    """Tiles a second, one rate a round, the variants in turn."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return clock()

    rates: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for number in range(rounds):
        # Every other round backwards, so that no variant always follows the same one.
        for name in list(functions) if number % 2 == 0 else list(functions)[::-1]:
            calls, start = 0, now()
            while now() - start < seconds:
                functions[name]()
                calls += 1
            rates[name].append(calls * batch / (now() - start))
    return rates


def report(title: str, rates: dict[str, list[float]]) -> dict[str, Any]:
    """Print a table, the first variant being the measure of the others."""
    print(f"\n{title}\n")
    print(f"| {'variant':<38} | tiles/s | ratio to the first |")
    print(f"| {'-' * 38} | ------: | -----------------: |")
    first = next(iter(rates.values()))
    results = {}
    for name, values in rates.items():
        ratios = [value / base for value, base in zip(values, first, strict=True)]
        middle, spread = statistics.median(ratios), f"[{min(ratios):.2f} {max(ratios):.2f}]"
        print(f"| {name:<38} | {statistics.median(values):7.1f} | {middle:5.2f} {spread:>12} |")
        results[name] = {"tiles_per_second": values, "ratio_median": middle, "ratio_range": [min(ratios), max(ratios)]}
    return results


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.0, help="time of a variant in a round")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the results there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    warnings.simplefilter("ignore")
    results = circumstances(("torch", "torchvision", "kornia"))
    results |= {name: str(value) for name, value in vars(arguments).items() if name != "json"}
    print("\n".join(f"{name}: {value}" for name, value in results.items()))
    for source in SOURCES:
        functions = variants(source, arguments.batch, arguments.seed, arguments.device)
        rates = measure(functions, arguments.batch, arguments.rounds, arguments.seconds, arguments.device)
        title = f"{arguments.batch} tiles of {LOAD_SIZE} px, {source}, to 2 x 224 and 8 x 98 px"
        results[title] = report(title, rates)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
