"""How fast does a frozen encoder give features, how far from the floor, and at what error?

    python benchmarks/feature_extraction.py --output benchmarks/results/feature_extraction_vit_base.json
    python benchmarks/feature_extraction.py --batches 2 4 8 16 32
    python benchmarks/feature_extraction.py --small

Two geometries: an RGB ViT of 224 px and patch 16, and the group-channel ViT of fMoW-Sentinel, 10 bands in 3 groups,
96 px and patch 8. Variants run in turn within each round of one process, so that a change of the machine's mood hits
all of them; durations are medians over rounds.

- encoder: as it is, fp32 and under bf16 autocast;
- copy: ``geoexplora.models.inference.inference_copy`` of it.

The floor is the counted FLOPs (matrix products, attention, convolutions) over the rate of matrix products of the
model's own sizes in that precision, the fastest size of those measured in the same round; shares of it are medians
over rounds of the shares within a round, in brackets their least and greatest. Errors are against float64: of all
tokens (relative, in the Frobenius norm), and 1 - cosine similarity of the class token and of the mean patch token, the
worst image's.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from circumstances import circumstances
from step_measure import DEVICE, META, product_rates, seconds
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import geoexplora.models  # noqa: F401 - registers the group-channel models with timm
from geoexplora.models.inference import inference_copy

SMALL: dict[str, Any] = {"embed_dim": 64, "depth": 2, "num_heads": 2}


@dataclass(frozen=True)
class Geometry:
    """An encoder's input.

    Attributes:
        name: timm's name of the model.
        bands: number of bands.
        size: image side in pixels.
        options: passed to timm.
    """

    name: str
    bands: int
    size: int
    options: dict[str, Any]

    def build(self, device: torch.device = DEVICE) -> Any:
        """The encoder, with the same random weights each time."""
        torch.manual_seed(0)
        encoder = timm.create_model(self.name, num_classes=0, **self.options)
        for block in encoder.blocks:
            for parameter in block.parameters():
                if parameter.ndim == 2:  # timm starts so small that blocks would hardly change the tokens
                    nn.init.xavier_uniform_(parameter)
        return encoder.eval().requires_grad_(False).to(device)

    def images(self, batch: int, device: torch.device = DEVICE) -> Tensor:
        """A batch."""
        return torch.randn(batch, self.bands, self.size, self.size, device=device)

    def flops(self, batch: int) -> int:
        """FLOPs of a batch's features, counted on tensors without values."""
        with torch.device("meta"):
            encoder, images = self.build(META), self.images(batch, META)
            with FlopCounterMode(display=False) as counter:
                encoder.forward_features(images)
        return int(counter.get_total_flops())


def geometries(model: str, small: bool) -> dict[str, Geometry]:
    """Both, by what the table calls them."""
    rgb, groups = (SMALL, SMALL | {"channel_width": 16}) if small else ({}, {})
    return {
        "RGB 224 px, patch 16": Geometry(f"{model}_patch16_224", 3, 224, rgb),
        "10 bands in 3 groups, 96 px, patch 8": Geometry(f"group_channel_{model}", 10, 96, groups),
    }


def variants(encoder: Any, images: Tensor) -> dict[str, Callable[[], Tensor]]:
    """What gives features, by name; the last word is the precision."""
    fp32, bf16 = inference_copy(encoder), inference_copy(encoder, torch.bfloat16)

    def autocast() -> Tensor:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            return encoder.forward_features(images)

    return {
        "encoder fp32": lambda: encoder.forward_features(images),
        "copy fp32": lambda: fp32.forward_features(images),
        "encoder autocast bf16": autocast,
        "copy bf16": lambda: bf16.forward_features(images),
    }


def errors(found: Tensor, wanted: Tensor, prefix_tokens: int) -> dict[str, float]:
    """Errors of features (B, N, D)."""
    found, rest = found.double(), slice(prefix_tokens, None)
    pairs = {"class": (found[:, 0], wanted[:, 0]), "mean": (found[:, rest].mean(1), wanted[:, rest].mean(1))}
    unlike = {f"{name}_token_error": float((1 - F.cosine_similarity(*pair)).max()) for name, pair in pairs.items()}
    return {"relative_error": float((found - wanted).norm() / wanted.norm())} | unlike


@torch.inference_mode()
def measure(geometry: Geometry, batch: int, rounds: int) -> dict[str, Any]:
    """All variants of one geometry."""
    encoder, images = geometry.build(), geometry.images(batch)
    actions = variants(encoder, images)
    wanted = geometry.build().double().forward_features(images.double())
    rows: dict[str, dict[str, Any]] = {
        name: errors(action(), wanted, encoder.num_prefix_tokens)
        for name, action in actions.items()  # warms up
    }
    tokens, width = batch * wanted.shape[1], encoder.embed_dim
    sizes = [(tokens, width, 3 * width), (tokens, width, 4 * width), (tokens, 4 * width, width)]
    times: dict[str, list[float]] = {name: [] for name in actions}
    rates = []
    for _ in range(rounds):
        for name, action in actions.items():
            times[name].append(seconds(action))
        rates.append(product_rates(sizes, 1))
    flops = geometry.flops(batch)
    for name, row in rows.items():
        duration, precision = statistics.median(times[name]), name.split()[-1]
        shares = [flops / rate[precision] / time for rate, time in zip(rates, times[name], strict=True)]
        row["seconds"] = duration
        row["spread"] = [min(times[name]), max(times[name])]
        row["images_per_second"] = batch / duration
        row["share_of_floor"] = statistics.median(shares)
        row["share_range"] = [min(shares), max(shares)]
    return {
        "batch": batch,
        "tokens": tokens,
        "rounds": rounds,
        "gflop_per_image": flops / batch / 1e9,
        "product_gflops": {name: statistics.median(rate[name] for rate in rates) / 1e9 for name in rates[0]},
        "rows": rows,
    }


def table(title: str, result: dict[str, Any]) -> str:
    """The result as a Markdown table."""
    rates = ", ".join(f"{precision} {rate:.0f} GFLOP/s" for precision, rate in result["product_gflops"].items())
    lines = [
        f"{title}; batch {result['batch']} ({result['tokens']} tokens), {result['gflop_per_image']:.1f} GFLOP an "
        f"image, median of {result['rounds']} rounds; matrix products: {rates}",
        "",
        "| variant | images/s | of the floor's rate | error, tokens | class token | mean token |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, row in result["rows"].items():
        lines.append(
            f"| {name} | {row['images_per_second']:.2f} | {row['share_of_floor']:.2f} "
            f"({row['share_range'][0]:.2f}-{row['share_range'][1]:.2f}) | {row['relative_error']:.1e} | "
            f"{row['class_token_error']:.1e} | {row['mean_token_error']:.1e} |"
        )
    return "\n".join(lines)


def main(words: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_base")
    parser.add_argument("--batches", type=int, nargs="+", default=[8])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, help="instead of torch's own choice")
    parser.add_argument("--small", action="store_true", help="a tiny model and one round, to see that it runs")
    parser.add_argument("--output", type=Path, help="a JSON file")
    arguments = parser.parse_args(words)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    record = circumstances(("torch", "timm")) | {"seed": 0, "model": arguments.model, "results": {}}
    print(
        f"{record['machine']}, {record['threads']} threads, torch {torch.__version__}, commit {record['commit'][:12]}"
    )
    for title, geometry in geometries(arguments.model, arguments.small).items():
        for batch in arguments.batches:
            result = measure(geometry, batch, 1 if arguments.small else arguments.rounds)
            record["results"].setdefault(title, []).append(result)
            print(f"\n{table(f'{arguments.model}, {title}', result)}", flush=True)
    if arguments.output:
        arguments.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
