"""How fast is a training step of ExPLoRA or LoRA against full training, and how far from the floor?

    python benchmarks/training_step.py --models vit_base --json benchmarks/results/pretrain_step_vit_base.json
    python benchmarks/training_step.py --task dinov2 --models vit_base --batch 4
    python benchmarks/training_step.py --task finetune --models vit_base --rounds 7
    python benchmarks/training_step.py --memory-estimate --models vit_large --batch 8

Variants run in turn within each round of one process, so that a change of the machine's mood hits all of them; ratios
are medians over rounds of the ratios within a round.

Masked-autoencoder steps (forward, backward, AdamW) in fMoW-Sentinel geometry: 10 bands in 3 groups, 96 px, patch 8,
mask 0.75, decoder 512 wide and 8 deep.

- reference: all weights, attention written out as softmax(QK')V, torch's own fp32 products: what SatMAE's code does;
- full: all weights, fused attention;
- explora: blocks 1 and L whole, LoRA of rank 32 on Q and V, norms and embeddings; a pre-trained decoder with LoRA of
  rank 8, norms and output projections.

DINOv2 steps (forward of teacher and student, backward, AdamW, moving average of the teacher) in fMoW-RGB geometry:
patch 14 with LayerScale, 2 crops of 224 px and 8 of 98 px, a shared head of 65,536 prototypes, iBOT and KoLeo. Crops
are cut and masks drawn before; stochastic depth and gradient clipping are left out.

- full: all weights; the teacher has a copy of each, as in DINOv2 itself, on the same code;
- explora, copied: block L whole, LoRA of rank 64 on Q and V, norms, class token and head; the teacher copies what is
  frozen, too. A first step must give the losses of explora;
- explora: the same, but what is frozen exists once.

Fine-tuning steps (forward, backward, AdamW) of an RGB ViT, 224 px and patch 16, with a linear head of 62 classes on the
mean patch token; no augmentation, no stochastic depth.

- full: all weights;
- lora: LoRA of rank 8 on Q and V of all blocks, and the head.

The floor is the step's counted FLOPs (matrix products, attention, convolutions; only gradients that are needed) over
the fastest measured rate of matrix products of the model's own sizes. Peak memory is that of a process of its own,
above what the imports take. Held memory is what weights, buffers, gradients and moments take, each storage once.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from circumstances import circumstances
from step_measure import Variant, adamw, count, peak_of_steps, product_rates, seconds
from step_memory import estimate, memory_table
from step_variants_dinov2 import DINOv2Variant
from step_variants_finetune import FinetuneVariant
from step_variants_mae import MAEVariant

TASKS: dict[str, type[Variant]] = {"mae": MAEVariant, "dinov2": DINOv2Variant, "finetune": FinetuneVariant}


def peak_memory(task: str, variant: Variant, model: str, batch: int) -> float:
    """Peak memory of two steps in a process of their own, in MiB."""
    words = [sys.executable, __file__, "--memory-of", task, variant.mode, variant.precision, model, str(batch)]
    return float(subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout)


def check_losses(kind: type[Variant], losses: dict[str, float]) -> None:
    """Stop unless the variants that should compute the same did."""
    for precision, tolerance in (("fp32", 1e-5), ("bf16", 1e-3)):
        found = {name: losses[name] for name in (f"{mode} {precision}" for mode in kind.equal_modes)}
        if found and not math.isclose(*found.values(), rel_tol=tolerance):
            raise SystemExit(f"losses differ: {found}")


def measure(task: str, model: str, batch: int, rounds: int) -> dict[str, Any]:
    """All variants of one model."""
    kind = TASKS[task]
    variants = kind.all()
    inputs = variants[0].inputs(batch)
    # Both precisions of a mode train the same weights: six ViT-L with their optimizers do not fit into 24 GB.
    models = {variant.mode: variant.build(model) for variant in variants}
    optimizers = {mode: adamw(built) for mode, built in models.items()}
    steps = {v.name: v.step(models[v.mode], inputs, optimizers[v.mode]) for v in variants}
    losses = {}
    for name, step in steps.items():  # warms up
        torch.manual_seed(0)
        losses[name] = float(step())
    check_losses(kind, losses)
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
        cost = count(variant, model, batch)
        duration = statistics.median(times[variant.name])
        base = variant.baseline.name
        ratios = [b / t for b, t in zip(times[base], times[variant.name], strict=True)]
        rows[variant.name] = {
            "trained_parameters": trained[variant.mode],
            "seconds": duration,
            "spread": [min(times[variant.name]), max(times[variant.name])],
            "images_per_second": batch / duration,
            "speed_ratio": statistics.median(ratios),
            "speed_ratio_spread": [min(ratios), max(ratios)],
            "tflop": cost.flops / 1e12,
            "times_floor": duration * rates[variant.precision] / cost.flops,
            "peak_memory_mib": (memory := peak_memory(task, variant, model, batch)),
            "memory_ratio": memory / rows[base]["peak_memory_mib"] if base in rows else 1.0,
            "held_mib": cost.held_bytes / 2**20,
        }
    return {
        "batch": batch,
        "rounds": rounds,
        "product_gflops": {k: v / 1e9 for k, v in rates.items()},
        "first_losses": losses,
        "rows": rows,
    }


def table(title: str, result: dict[str, Any]) -> str:
    """The result as a Markdown table."""
    rates = ", ".join(f"{precision} {rate:.0f} GFLOP/s" for precision, rate in result["product_gflops"].items())
    lines = [
        f"{title}, batch {result['batch']}, median of {result['rounds']} rounds; matrix products: {rates}",
        "",
        "| variant | images/s | speed | x floor | peak memory, MiB | memory | held, MiB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, row in result["rows"].items():
        low, high = row["speed_ratio_spread"]
        lines.append(
            f"| {name} | {row['images_per_second']:.2f} | {row['speed_ratio']:.2f} ({low:.2f}-{high:.2f}) | "
            f"{row['times_floor']:.2f} | {row['peak_memory_mib']:.0f} | {row['memory_ratio']:.2f} | "
            f"{row['held_mib']:.0f} |"
        )
    return "\n".join(lines)


def main(words: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=list(TASKS), default="mae")
    parser.add_argument("--models", nargs="+", default=["vit_base", "vit_large"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory-estimate", action="store_true", help="DINOv2 in bf16 on a card of 16 GiB, instead")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--memory-of", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    if arguments.memory_of:
        task, mode, precision, model, batch = arguments.memory_of
        print(peak_of_steps(TASKS[task](mode, precision), model, int(batch)))
        return
    record = circumstances(("torch", "timm", "peft")) | {"seed": 0, "models": {}}
    print(
        f"{record['machine']}, {record['threads']} threads, torch {torch.__version__}, commit {record['commit'][:12]}"
    )
    for model in arguments.models:
        if arguments.memory_estimate:
            result = estimate(model, arguments.batch)
            text = memory_table(model, result)
        else:
            result = measure(arguments.task, model, arguments.batch, arguments.rounds)
            text = table(f"{TASKS[arguments.task].title}; {model}", result)
        record["models"][model] = result
        print(f"\n{text}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
