"""What does it cost to read and convert a weights file, against a bare ``torch.load`` of it?

    python benchmarks/weights_loading.py --json benchmarks/results/weights_loading.json

Writes ViT-L files of random values in several formats, then, in a fresh process for each measurement and the variants
in turn within each round:

- ``torch.load``: the bare file (for the Hugging Face folder: the same tensors as a pickled file);
- ``read``: ``read_weights``, that is recognising, renaming, describing;
- ``encoder``: ``load_encoder``, the model built and loaded, every tensor checked for NaN and Inf;
- ``encoder + digest``: the same and the file's SHA-256, which is recorded with a run.

Time is wall clock after all imports, memory the growth of the process's high-water mark (it counts mapped file pages),
both after reading every value once. Files are in the page cache. Ratios are to the bare ``torch.load`` of the same file
in the same round: medians, in brackets least and greatest.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from circumstances import circumstances
from safetensors.torch import save_file
from torch import Tensor

from geoexplora.weights.files import read_weights
from geoexplora.weights.load import load_encoder

MIB = 2**20


def touch(tensors: Any) -> None:
    """Read every value, as its first user would."""
    for tensor in tensors:
        tensor.float().sum()


def bare(path: Path) -> None:
    """What one loads without this package."""
    state = torch.load(path / "pickled.pth" if path.is_dir() else path, weights_only=True)
    while not all(isinstance(value, Tensor) for value in state.values()):
        state = next(value for value in state.values() if isinstance(value, dict))
    touch(state.values())


def read(path: Path) -> None:
    """Recognise, rename, describe."""
    touch(read_weights(path).tensors.values())


def encoder(path: Path) -> None:
    """Build the model and load it."""
    touch(load_encoder(path)[0].parameters())


def encoder_and_digest(path: Path) -> None:
    """The same, and the digest that a run records."""
    source = read_weights(path)
    touch(load_encoder(source)[0].parameters())
    assert source.sha256


VARIANTS: dict[str, Callable[[Path], None]] = {
    "torch.load": bare,
    "read": read,
    "encoder": encoder,
    "encoder + digest": encoder_and_digest,
}


def write_files(folder: Path, model: str) -> dict[str, Path]:
    """Files of a ViT of random values: Meta's DINOv2 and MAE, a Hugging Face folder, a teacher with q, k, v apart."""
    torch.manual_seed(0)
    state: dict[str, Tensor] = dict(timm.create_model(model, num_classes=0).state_dict())
    for value in state.values():
        value.normal_(std=0.02)
    meta = state | {"mask_token": torch.zeros(1, state["cls_token"].shape[-1])}
    torch.save(meta, folder / "dinov2.pth")
    plain = {name: value for name, value in state.items() if "gamma" not in name}
    torch.save({"model": plain}, folder / "mae.pth")
    split = {name: value for name, value in state.items() if ".qkv." not in name}
    for name, value in state.items():
        if ".qkv." in name:
            split |= dict(
                zip((name.replace("qkv", part) for part in ("q_proj", "k_proj", "v_proj")), value.chunk(3), strict=True)
            )
    torch.save(
        {"teacher": {f"backbone.{name}": value.clone() for name, value in split.items()}}, folder / "teacher.pth"
    )
    hub = folder / "hub"
    hub.mkdir()
    named = {_hub_name(name): value.clone() for name, value in split.items()}
    save_file(named, hub / "model.safetensors")
    torch.save(named, hub / "pickled.pth")
    (hub / "config.json").write_text(json.dumps({"model_type": "dinov2"}))
    return {
        "DINOv2, Meta": folder / "dinov2.pth",
        "MAE, Meta": folder / "mae.pth",
        "teacher with q, k, v apart": folder / "teacher.pth",
        "DINOv2, Hugging Face": hub,
    }


def _hub_name(name: str) -> str:
    for old, new in (
        ("blocks.", "encoder.layer."), ("attn.q_proj", "attention.attention.query"),
        ("attn.k_proj", "attention.attention.key"), ("attn.v_proj", "attention.attention.value"),
        ("attn.proj", "attention.output.dense"), ("ls1.gamma", "layer_scale1.lambda1"),
        ("ls2.gamma", "layer_scale2.lambda1"), ("patch_embed.proj", "embeddings.patch_embeddings.projection"),
        ("pos_embed", "embeddings.position_embeddings"), ("cls_token", "embeddings.cls_token"),
    ):  # fmt: skip
        name = name.replace(old, new)
    return "layernorm." + name.removeprefix("norm.") if name.startswith("norm.") else name


def measure_here(variant: str, path: Path) -> dict[str, float]:
    """Seconds and mebibytes of one variant in this process."""
    if variant.startswith("encoder"):  # what a first model build imports is not the file's cost
        timm.create_model("vit_tiny_patch16_224", num_classes=0)
    before = _high_water_mark()
    start = time.perf_counter()
    VARIANTS[variant](path)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "MiB": _high_water_mark() - before}


def _high_water_mark() -> float:
    """The process's own, in MiB; ``getrusage`` would give that of the process that started it."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def measure(variant: str, path: Path) -> dict[str, float]:
    """The same in a fresh process."""
    words = [sys.executable, __file__, "--variant", variant, "--file", str(path)]
    answer = subprocess.run(words, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(answer.stdout)
    return found


def report(path: Path, rounds: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """A table of the medians, and its numbers."""
    size = sum(file.stat().st_size for file in ([path] if path.is_file() else path.glob("*.safetensors"))) / MIB
    rows: dict[str, Any] = {"file MiB": round(size, 1)}
    for variant in VARIANTS:
        times = [one[variant]["seconds"] / one["torch.load"]["seconds"] for one in rounds]
        memory = [one[variant]["MiB"] / size for one in rounds]
        rows[variant] = {
            "seconds": round(statistics.median(one[variant]["seconds"] for one in rounds), 3),
            "time / torch.load": [round(value, 2) for value in (statistics.median(times), min(times), max(times))],
            "memory / file": [round(value, 2) for value in (statistics.median(memory), min(memory), max(memory))],
        }
        row = rows[variant]
        print(
            f"  {variant:<18} {row['seconds']:6.2f} s  x {row['time / torch.load'][0]:.2f}"
            f" ({row['time / torch.load'][1]:.2f}-{row['time / torch.load'][2]:.2f})"
            f"  memory x {row['memory / file'][0]:.2f} ({row['memory / file'][1]:.2f}-{row['memory / file'][2]:.2f})"
        )
    return rows


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_large_patch14_dinov2", help="timm's name of the model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.variant:
        print(json.dumps(measure_here(arguments.variant, arguments.file)))
        return
    results = circumstances(("torch", "safetensors", "timm"))
    results |= {"model": arguments.model, "rounds": arguments.rounds, "seed": 0}
    print("\n".join(f"{name}: {value}" for name, value in results.items()))
    with tempfile.TemporaryDirectory() as folder:
        for name, path in write_files(Path(folder), arguments.model).items():
            print(name)
            bare(path)  # into the page cache
            rounds = [{variant: measure(variant, path) for variant in VARIANTS} for _ in range(arguments.rounds)]
            results[name] = report(path, rounds)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
