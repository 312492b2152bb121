"""What do 50 heads of a linear probe cost, beside one?

    python benchmarks/linear_probe.py --json benchmarks/results/linear_probe.json

Random features as ``geoexplora probe`` caches them of a ViT-B (class tokens of the last 4 blocks and the mean patch
token: 3840 columns), in a file that is mapped into memory, and 62 classes. In turn within each round, so that a change
of the machine's mood hits all of them:

1. reading: batches of 256 shuffled rows, nothing learned from them;
2. one setting alone: the widest (class tokens of 4 blocks and the mean patch token), and the mean over the 5 sets of
   features, each alone with one rate, which reads only its own columns;
3. 50 settings in one pass: 5 sets of features with 10 rates each;
4. 50 runs of one setting, one after the other: what the one pass replaces (on a tenth of the steps, times ten).

With ``--cold`` the operating system is told to forget the file before each of them. Products are in float32, or with
``--products bfloat16`` as of ``geoexplora probe --precision bf16``, whose features are stored in float16. Times are
wall times; ratios are medians over rounds of the ratios within a round, in brackets their least and greatest.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from circumstances import circumstances

from geoexplora.tasks.features import ProbeFeatures
from geoexplora.tasks.probe.heads import LinearHeads, batch_order
from geoexplora.tasks.probe.linear import BATCH_SIZE, RATES
from geoexplora.tasks.probe.rows import FeatureRows

LAYOUT = ProbeFeatures(768, 4, 768)
WIDEST = "cls-4+mean"


def write_features(path: Path, rows: int, dtype: type, seed: int) -> None:
    """Random features, in pieces, so that memory need not hold them."""
    draws = np.random.default_rng(seed)
    out = np.lib.format.open_memmap(path, "w+", dtype, (rows, LAYOUT.size))
    for start in range(0, rows, 4096):
        out[start : start + 4096] = draws.standard_normal((min(4096, rows - start), LAYOUT.size), dtype=np.float32)
    out.flush()


def forget(path: Path) -> None:
    """Tell the operating system to drop the file from its cache."""
    with path.open("rb") as stream:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def variants(
    path: Path, labels: np.ndarray, arguments: argparse.Namespace
) -> tuple[dict[str, Callable[[], Any]], dict[str, float]]:
    """What is compared, and by how much each time is multiplied."""
    rows = np.arange(len(labels))
    sets, rates = LAYOUT.sets(), RATES[-arguments.rates :]
    steps, few = arguments.steps, max(1, arguments.steps // 10)
    products = getattr(torch, arguments.products)

    def features() -> FeatureRows:
        return FeatureRows([np.load(path, mmap_mode="c")])

    def fit(names: list[str], rates: tuple[float, ...], steps: int = steps) -> None:
        heads = LinearHeads(
            {name: sets[name] for name in names}, rates, arguments.classes, device=arguments.device, products=products
        )
        heads.fit(features(), labels, rows, steps, BATCH_SIZE, 0)

    def read() -> None:
        for _ in features().stream(batch_order(rows, BATCH_SIZE, steps, 0), device=arguments.device):
            pass

    def one_by_one() -> None:
        for name in sets:
            for rate in rates:
                fit([name], (rate,), few)

    functions: dict[str, Callable[[], Any]] = {
        "reading alone": read,
        "one setting, the widest": lambda: fit([WIDEST], rates[:1]),
        "one setting, mean of the 5 sets": lambda: [fit([name], rates[:1]) for name in sets],
        f"{len(sets) * len(rates)} settings in one pass": lambda: fit(list(sets), rates),
        f"{len(sets) * len(rates)} runs of one setting": one_by_one,
    }
    return functions, {name: 1.0 for name in functions} | {
        "one setting, mean of the 5 sets": 1 / len(sets),
        f"{len(sets) * len(rates)} runs of one setting": steps / few,
    }


def measure(
    functions: dict[str, Callable[[], Any]], scales: dict[str, float], path: Path, arguments: argparse.Namespace
) -> dict[str, list[float]]:
    """Seconds, one a round, the variants in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(arguments.rounds + 1):
        # Every other round backwards, so that no variant always follows the same one; the first only warms up.
        for name in list(functions) if number % 2 == 0 else list(functions)[::-1]:
            if arguments.cold:
                forget(path)
            if arguments.device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            functions[name]()
            if arguments.device.type == "cuda":
                torch.cuda.synchronize()
            if number:
                seconds[name].append((time.perf_counter() - start) * scales[name])
    return seconds


def report(seconds: dict[str, list[float]], steps: int) -> dict[str, Any]:
    """Print a table; the widest single setting is the measure of the others."""
    print(f"\n| {'variant':<32} | ms a step | times the widest alone |")
    print(f"| {'-' * 32} | --------: | ---------------------: |")
    results = {}
    for name, values in seconds.items():
        ratios = [value / base for value, base in zip(values, seconds["one setting, the widest"], strict=True)]
        middle, spread = statistics.median(ratios), f"[{min(ratios):.2f} {max(ratios):.2f}]"
        step = 1e3 * statistics.median(values) / steps
        print(f"| {name:<32} | {step:9.2f} | {middle:6.2f} {spread:>15} |")
        results[name] = {"seconds": values, "ratio_median": middle, "ratio_range": [min(ratios), max(ratios)]}
    return results


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--classes", type=int, default=62)
    parser.add_argument("--rates", type=int, default=10, help="learning rates of each of the 5 sets of features")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--products", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--threads", type=int, default=None, help="of torch (none: its own choice)")
    parser.add_argument("--cold", action="store_true", help="forget the file before each measurement")
    parser.add_argument("--folder", type=Path, help="for the features (none: the usual place of temporary files)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the results there")
    arguments = parser.parse_args()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    results = circumstances(("torch", "numpy"))
    results |= {name: str(value) for name, value in vars(arguments).items() if name not in {"json", "folder"}}
    print("\n".join(f"{name}: {value}" for name, value in results.items()))
    labels = np.random.default_rng(arguments.seed).integers(0, arguments.classes, arguments.rows)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        path = Path(folder) / "features.npy"
        dtype = np.float32 if arguments.products == "float32" else np.float16
        write_features(path, arguments.rows, dtype, arguments.seed)
        functions, scales = variants(path, labels, arguments)
        results["results"] = report(measure(functions, scales, path, arguments), arguments.steps)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
