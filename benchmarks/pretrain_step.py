"""How fast is a pre-training step of ExPLoRA against full training, and how far from the floor?

    python benchmarks/pretrain_step.py --models vit_base --json benchmarks/results/pretrain_step_vit_base.json

Masked-autoencoder steps (forward, backward, AdamW) in fMoW-Sentinel geometry: 10 bands in 3 groups, 96 px, patch 8,
mask 0.75, decoder 512 wide and 8 deep. Variants run in turn within each round of one process, so that a change of the
machine's mood hits all of them; ratios are medians over rounds of the ratios within a round.

- reference: all weights, attention written out as softmax(QK')V, torch's own fp32 products: what SatMAE's code does;
- full: all weights, fused attention;
- explora: blocks 1 and L whole, LoRA of rank 32 on Q and V, norms and embeddings; a pre-trained decoder with LoRA of
  rank 8, norms and output projections.

The floor is the step's counted FLOPs (matrix products, attention, convolutions; only gradients that are needed) over
the fastest measured rate of matrix products of the model's own sizes. Peak memory is that of a process of its own,
above what the imports take.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from circumstances import circumstances
from timm.layers import Attention
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from geoexplora.explora import ExploraConfig, apply_explora, apply_explora_to_decoder
from geoexplora.models import MAEDecoder, MaskedAutoencoder
from geoexplora.models.attention import use_fast_attention
from geoexplora.models.linear import matmul, use_fast_linears
from geoexplora.objectives.mae import mae_loss
from geoexplora.objectives.masking import mask_from_noise

BANDS, GROUPS, SIZE = 10, 3, 96
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Variant:
    """One way to train."""

    mode: str
    precision: str

    @property
    def name(self) -> str:
        """For the table."""
        return f"{self.mode} {self.precision}"

    def build(self, model: str, device: torch.device = DEVICE) -> MaskedAutoencoder:
        """The model as this variant trains it."""
        torch.manual_seed(0)
        encoder = timm.create_model(f"group_channel_{model}")
        decoder = MAEDecoder(encoder.embed_dim, (12, 12), 8, encoder.patch_embed.groups, BANDS)
        if self.mode == "explora":
            apply_explora(encoder, ExploraConfig((1, len(encoder.blocks)), rank=32, embeddings=True))
            apply_explora_to_decoder(decoder, ExploraConfig(decoder_rank=8), pretrained=True, new_bands=True)
        else:
            encoder.pos_embed.requires_grad_(False)
            encoder.channel_embed.requires_grad_(False)
        autoencoder = MaskedAutoencoder(encoder, decoder).train().to(device)
        if self.mode == "reference":
            for module in autoencoder.modules():
                if isinstance(module, Attention):
                    module.fused_attn = False
            return autoencoder
        return use_fast_linears(use_fast_attention(autoencoder))

    def step(
        self, model: MaskedAutoencoder, images: Tensor, optimizer: torch.optim.Optimizer | None = None
    ) -> Callable[[], None]:
        """A whole training step."""
        optimizer = optimizer or adamw(model)
        decoder = model.decoder

        def run() -> None:
            noise = torch.rand(len(images), GROUPS * decoder.positions, device=images.device)
            mask = mask_from_noise(noise, 0.75, GROUPS)
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=self.precision == "bf16"):
                pred = model(images, mask.keep).pred
            mae_loss(pred.float(), images, mask.removed, decoder.channel_order, decoder.group_sizes).backward()
            optimizer.step()
            optimizer.zero_grad()

        return run


def adamw(model: MaskedAutoencoder) -> torch.optim.Optimizer:
    """The optimizer of what is trained."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4)


VARIANTS = [Variant(mode, precision) for precision in ("fp32", "bf16") for mode in ("reference", "full", "explora")]


def count_flops(variant: Variant, model: str, batch: int) -> int:
    """FLOPs of a step's matrix products and attention, counted without computing anything; alike in both precisions."""
    with torch.device("meta"):
        mode = "full" if variant.mode == "reference" else variant.mode
        step = Variant(mode, "fp32").step(
            Variant(mode, "fp32").build(model, torch.device("meta")), torch.empty(batch, BANDS, SIZE, SIZE)
        )
        with FlopCounterMode(display=False) as counter:
            step()
    return int(counter.get_total_flops())


def product_rates(model: str, batch: int, rounds: int) -> dict[str, float]:
    """The fastest rate of matrix products of the model's sizes, in FLOP/s, by precision."""
    width = timm.create_model(f"group_channel_{model}", depth=1).embed_dim
    tokens, decoded = batch * (1 + 108), batch * (1 + 432)
    sizes = [(tokens, width, 4 * width), (tokens, 4 * width, width), (decoded, 512, 2048), (decoded, 2048, 512)]
    best = {"fp32": 0.0, "bf16": 0.0}
    for _ in range(rounds):
        for n, i, o in sizes:
            x, weight = torch.randn(n, i, device=DEVICE), torch.randn(o, i, device=DEVICE)
            x16, weight16 = x.bfloat16(), weight.bfloat16()
            for precision, product in (
                ("fp32", lambda x=x, w=weight: matmul(x, w)),
                ("fp32", lambda x=x, w=weight: x @ w.T),
                ("bf16", lambda x=x16, w=weight16: x @ w.T),
            ):
                best[precision] = max(best[precision], 2 * n * i * o / min(seconds(product) for _ in range(3)))
    return best


def seconds(action: Callable[[], Any]) -> float:
    """Duration of an action."""
    synchronize()
    begin = time.perf_counter()
    action()
    synchronize()
    return time.perf_counter() - begin


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def peak_memory(variant: Variant, model: str, batch: int) -> float:
    """Peak memory of two steps in a process of their own, in MiB."""
    words = [sys.executable, __file__, "--memory-of", variant.mode, variant.precision, model, str(batch)]
    return float(subprocess.run(words, capture_output=True, text=True, check=True).stdout)


def memory_of(mode: str, precision: str, model: str, batch: str) -> None:
    """Print the peak memory of this process, in MiB, above what it took at the start."""
    before = resident("VmRSS")
    variant = Variant(mode, precision)
    step = variant.step(variant.build(model), torch.rand(int(batch), BANDS, SIZE, SIZE, device=DEVICE))
    step()
    step()
    if DEVICE.type == "cuda":
        print(torch.cuda.max_memory_allocated() / 2**20)
    else:
        print(resident("VmHWM") - before)


def resident(which: str) -> float:
    """Memory of this process, now (VmRSS) or at its peak (VmHWM), in MiB; getrusage's peak is a parent's too."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 2**10 for line in lines if line.startswith(which))


def measure(model: str, batch: int, rounds: int) -> dict[str, Any]:
    """All variants of one model."""
    images = torch.rand(batch, BANDS, SIZE, SIZE, device=DEVICE)
    # Both precisions of a mode train the same weights: six ViT-L with their optimizers do not fit into 24 GB.
    models = {variant.mode: variant.build(model) for variant in VARIANTS}
    optimizers = {mode: adamw(built) for mode, built in models.items()}
    steps = {v.name: v.step(models[v.mode], images, optimizers[v.mode]) for v in VARIANTS}
    times: dict[str, list[float]] = {name: [] for name in steps}
    rates = {"fp32": 0.0, "bf16": 0.0}
    for round_ in range(rounds + 1):
        for name, step in steps.items():
            duration = seconds(step)
            if round_:  # the first round warms up
                times[name].append(duration)
        found = product_rates(model, batch, 1)
        rates = {precision: max(rate, found[precision]) for precision, rate in rates.items()}
    del steps, models, optimizers
    rows = {}
    base = times[VARIANTS[0].name]
    memory_base = math.nan
    for variant in VARIANTS:
        flops = count_flops(variant, model, batch)
        duration = statistics.median(times[variant.name])
        ratios = [b / t for b, t in zip(base, times[variant.name], strict=True)]
        memory = peak_memory(variant, model, batch)
        memory_base = memory if math.isnan(memory_base) else memory_base
        rows[variant.name] = {
            "seconds": duration,
            "spread": [min(times[variant.name]), max(times[variant.name])],
            "images_per_second": batch / duration,
            "speed_ratio": statistics.median(ratios),
            "speed_ratio_spread": [min(ratios), max(ratios)],
            "tflop": flops / 1e12,
            "times_floor": duration * rates[variant.precision] / flops,
            "peak_memory_mib": memory,
            "memory_ratio": memory / memory_base,
        }
    return {"batch": batch, "rounds": rounds, "product_gflops": {k: v / 1e9 for k, v in rates.items()}, "rows": rows}


def table(model: str, result: dict[str, Any]) -> str:
    """The result as a Markdown table."""
    rates = ", ".join(f"{precision} {rate:.0f} GFLOP/s" for precision, rate in result["product_gflops"].items())
    lines = [
        f"{model}, batch {result['batch']}, median of {result['rounds']} rounds; matrix products: {rates}",
        "",
        "| variant | images/s | speed | x floor | peak memory, MiB | memory |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, row in result["rows"].items():
        low, high = row["speed_ratio_spread"]
        lines.append(
            f"| {name} | {row['images_per_second']:.2f} | {row['speed_ratio']:.2f} ({low:.2f}-{high:.2f}) | "
            f"{row['times_floor']:.2f} | {row['peak_memory_mib']:.0f} | {row['memory_ratio']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["vit_base", "vit_large"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--memory-of", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        memory_of(*arguments.memory_of)
        return
    record = circumstances(("torch", "timm", "peft")) | {"seed": 0, "models": {}}
    print(
        f"{record['machine']}, {record['threads']} threads, torch {torch.__version__}, commit {record['commit'][:12]}"
    )
    for model in arguments.models:
        record["models"][model] = measure(model, arguments.batch, arguments.rounds)
        print(f"\n{table(model, record['models'][model])}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
