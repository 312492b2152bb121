"""How fast is a fine-tuning step with LoRA against one of all weights, and how much memory does it take?

    python benchmarks/finetune_step.py --output benchmarks/results/finetune_step_vit_base.json
    python benchmarks/finetune_step.py --small

Classification steps (forward, backward, AdamW) of an RGB ViT, 224 px and patch 16, with a linear head of 62 classes on
the mean patch token; no augmentation, no stochastic depth:

- full: all weights;
- lora: LoRA of rank 8 on the queries and values of all blocks, and the head.

Variants run in turn within each round of one process; ratios are medians over rounds of the ratios within a round,
against the full step of the same precision. The floor is the step's counted FLOPs (only gradients that are needed) over
the fastest measured rate of matrix products of the model's own sizes. Peak memory is that of two steps in a process of
their own, above what the imports take. Held memory is what weights, gradients and moments take.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import timm
import torch
from circumstances import circumstances
from step_measure import DEVICE, Variant, adamw, count, peak_of_steps, product_rates, seconds
from torch import Tensor, nn
from torch.nn import functional as F

from geoexplora.explora.config import FinetuneConfig
from geoexplora.explora.finetuning import apply_finetuning
from geoexplora.models.attention import use_fast_attention
from geoexplora.models.classifier import PooledClassifier
from geoexplora.models.linear import use_fast_linears

CLASSES, SIZE, PATCH = 62, 224, 16
SMALL = "small"


class Batch(NamedTuple):
    """Images (B, 3, S, S) and labels (B,)."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class FinetuneVariant(Variant):
    """A classifier, its encoder trained whole or by LoRA."""

    title: ClassVar[str] = "Fine-tuning; speed and memory against full"
    modes: ClassVar[tuple[str, ...]] = ("full", "lora")

    @property
    def baseline(self) -> Variant:
        """All weights, in the same precision."""
        return FinetuneVariant("full", self.precision)

    def build(self, model: str, device: torch.device = DEVICE) -> nn.Module:
        """The model as this variant trains it."""
        torch.manual_seed(0)
        encoder = encoder_of(model)
        apply_finetuning(encoder, FinetuneConfig("lora", rank=8) if self.mode == "lora" else FinetuneConfig("full"))
        classifier = PooledClassifier(encoder, CLASSES).train().to(device)
        return use_fast_linears(use_fast_attention(classifier))

    def inputs(self, batch: int, device: torch.device = DEVICE) -> Batch:
        """Images and labels."""
        return Batch(torch.rand(batch, 3, SIZE, SIZE, device=device), torch.zeros(batch, device=device).long())

    def loss(self, model: nn.Module, inputs: Batch) -> Tensor:
        """Cross-entropy."""
        with self.autocast():
            outputs = model(inputs.images)
        return F.cross_entropy(outputs.float(), inputs.labels)

    def after_step(self, model: Any) -> None:
        """Nothing."""

    def product_sizes(self, model: str, batch: int) -> list[tuple[int, int, int]]:
        """The MLP."""
        tokens, width = batch * (1 + (SIZE // PATCH) ** 2), encoder_of(model).embed_dim
        return [(tokens, width, 4 * width), (tokens, 4 * width, width)]


def encoder_of(model: str) -> Any:
    """A model's encoder with random weights."""
    if model == SMALL:
        return timm.create_model("vit_tiny_patch16_224", num_classes=0, embed_dim=64, depth=2, num_heads=2)
    return timm.create_model(f"{model}_patch{PATCH}_{SIZE}", num_classes=0)


def peak_memory(variant: Variant, model: str, batch: int) -> float:
    """Peak memory of two steps in a process of their own, in MiB."""
    words = [sys.executable, __file__, "--memory-of", variant.mode, variant.precision, model, str(batch)]
    return float(subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout)


def measure(model: str, batch: int, rounds: int) -> dict[str, Any]:
    """All variants of one model."""
    variants = FinetuneVariant.all()
    inputs = variants[0].inputs(batch)
    models = {variant.mode: variant.build(model) for variant in variants}  # both precisions train the same weights
    optimizers = {mode: adamw(built) for mode, built in models.items()}
    steps = {v.name: v.step(models[v.mode], inputs, optimizers[v.mode]) for v in variants}
    for step in steps.values():  # warms up
        step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    rates = {"fp32": 0.0, "bf16": 0.0}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(seconds(step))
        found = product_rates(variants[0].product_sizes(model, batch), 1)
        rates = {precision: max(rate, found[precision]) for precision, rate in rates.items()}
    trained = {mode: sum(p.numel() for p in built.parameters() if p.requires_grad) for mode, built in models.items()}
    del steps, models, optimizers
    rows: dict[str, dict[str, Any]] = {}
    for variant in variants:
        name, base = variant.name, variant.baseline.name
        cost, duration = count(variant, model, batch), statistics.median(times[name])
        ratios = [mine / full for mine, full in zip(times[name], times[base], strict=True)]
        memory = peak_memory(variant, model, batch)
        rows[name] = {
            "trained_parameters": trained[variant.mode],
            "seconds": duration,
            "spread": [min(times[name]), max(times[name])],
            "time_ratio": statistics.median(ratios),
            "time_ratio_spread": [min(ratios), max(ratios)],
            "tflop": cost.flops / 1e12,
            "times_floor": duration * rates[variant.precision] / cost.flops,
            "peak_memory_mib": memory,
            "memory_ratio": memory / (rows[base]["peak_memory_mib"] if base in rows else memory),
            "held_mib": cost.held_bytes / 2**20,
        }
    rates_in_gflops = {precision: rate / 1e9 for precision, rate in rates.items()}
    return {"model": model, "batch": batch, "rounds": rounds, "product_gflops": rates_in_gflops, "rows": rows}


def table(result: dict[str, Any]) -> str:
    """The result as a Markdown table."""
    rates = ", ".join(f"{precision} {rate:.0f} GFLOP/s" for precision, rate in result["product_gflops"].items())
    lines = [
        f"{FinetuneVariant.title}; {result['model']}, batch {result['batch']}, median of {result['rounds']} rounds; "
        f"matrix products: {rates}",
        "",
        "| step | trained | seconds | of full | x floor | peak memory, MiB | of full | held, MiB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, row in result["rows"].items():
        low, high = row["time_ratio_spread"]
        lines.append(
            f"| {name} | {row['trained_parameters']:,} | {row['seconds']:.2f} | {row['time_ratio']:.2f} "
            f"({low:.2f}-{high:.2f}) | {row['times_floor']:.2f} | {row['peak_memory_mib']:.0f} | "
            f"{row['memory_ratio']:.2f} | {row['held_mib']:.0f} |"
        )
    return "\n".join(lines)


def main(words: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_base")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, help="instead of torch's own choice")
    parser.add_argument("--small", action="store_true", help="a tiny model and one round, to see that it runs")
    parser.add_argument("--output", type=Path, help="a JSON file")
    parser.add_argument("--memory-of", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    if arguments.memory_of:
        mode, precision, model, batch = arguments.memory_of
        print(peak_of_steps(FinetuneVariant(mode, precision), model, int(batch)))
        return
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    record = circumstances(("torch", "timm", "peft")) | {"seed": 0}
    print(
        f"{record['machine']}, {record['threads']} threads, torch {torch.__version__}, commit {record['commit'][:12]}"
    )
    model, rounds = (SMALL, 1) if arguments.small else (arguments.model, arguments.rounds)
    result = measure(model, arguments.batch, rounds)
    print(f"\n{table(result)}", flush=True)
    if arguments.output:
        arguments.output.write_text(json.dumps(record | result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
