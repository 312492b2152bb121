"""What do encoders from scratch, from photographs and from ExPLoRA give downstream, on the bundled sample scene?

    OMP_NUM_THREADS=1 python benchmarks/downstream_sample.py --work runs/downstream \
        --output benchmarks/results/downstream_sample

Four starts, each for three seeds: random weights; the bundled RGB masked autoencoder of photographs, taken to ten bands
by the band policy; the same gone on learning by ExPLoRA; and the model pre-trained from scratch for as many steps. The
pre-training is the demo's, on all 4608 tiles of the scene, the test areas included, without labels (transductive).

* Probes of frozen features: each of the 8 area blocks predicted from the other seven.
* Fine-tuning to classes: learned from four blocks, validated on one, tested on three (``AREA_SPLITS``).
* Segmentation: learned from five blocks, validated on two, tested on one (``area_splits``).

Beside them classifiers of band statistics or single pixels on the same areas. Learning rates are chosen on validation
areas, for the photographs' weights and the first seed alone. What is done is kept in the working folder: what was cut
off goes on where it stopped, or is reported as it is by ``--report``. A reading in ``OUTPUT.md`` stays.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from circumstances import circumstances
from downstream_sample_report import block, write_report
from numpy.typing import NDArray
from sklearn.ensemble import RandomForestClassifier
from sklearn.metrics import confusion_matrix

from geoexplora.bands import SENTINEL2
from geoexplora.cli.finetune import COMMAND as FINETUNE
from geoexplora.cli.pretrain import COMMAND as PRETRAIN
from geoexplora.cli.probe import COMMAND as PROBE
from geoexplora.cli.resolve import resolve
from geoexplora.datasets import sample
from geoexplora.datasets.sample_dataset import area_splits
from geoexplora.datasets.sample_tree import AREA_SPLITS, write_fmow_tree
from geoexplora.explora import merged_state_dict
from geoexplora.runs.metrics import read_metrics
from geoexplora.tasks.classifiers import few_shot, knn_classifier, leave_locations_out, linear_classifier
from geoexplora.tasks.demo import NEIGHBOURS, SHOTS, TILE
from geoexplora.tasks.finetune.exports import load_finetuned
from geoexplora.tasks.finetune.finetuning import finetune
from geoexplora.tasks.opening import open_data
from geoexplora.tasks.pretrain.building import build_task
from geoexplora.tasks.probe.probing import probe
from geoexplora.tasks.schedule import Schedule
from geoexplora.weights.write import save_encoder

BANDS = ("B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "B11", "B12")
STARTS = ("random", "source", "scratch", "explora")
METHODS = ("linear", "lora", "full")
KINDS = ("knn", "few", "all")
COUNT = len(sample.CLASSES)
COMMON = (
    "--accelerator cpu --precision bf16 --num-workers 0 --rank 8 --drop-path 0.1 --weight-decay 0 --layer-decay 1"
    " --mixup 0 --cutmix 0 --random-erasing 0 --class-weights balanced --log-every 20"
)
"""Words of every ``finetune`` command."""


@dataclass(frozen=True)
class Plan:
    """How much is done.

    Attributes:
        seeds: of weights, order and few labels.
        starts: of ``STARTS``.
        methods: of fine-tuning to classes.
        pretrain_steps: of 64 tiles.
        steps: of each fine-tuning to classes, validated three times.
        batch: tiles in a step of classification.
        segmentation: method and test block of the segmentations.
        tile: side of their tiles in pixels.
        tile_batch: tiles in a step of segmentation.
        tile_steps: of each segmentation, validated at its end.
        rates: learning rates to choose from, by task and method.
        pixels: labelled pixels that the forest of single pixels learns from, at most.
        trees: of the forests of band statistics.
        draws: of the few labels, for each seed.
        tiles: at most so many of each class and block, in pre-training and fine-tuning to classes; none: all.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    starts: tuple[str, ...] = STARTS
    methods: tuple[str, ...] = METHODS
    pretrain_steps: int = 300
    steps: int = 80
    batch: int = 32
    segmentation: tuple[tuple[str, int], ...] = (("lora", 3), ("lora", 5))
    tile: int = 16
    tile_batch: int = 32
    tile_steps: int = 120
    rates: dict[str, tuple[float, ...]] = field(
        default_factory=lambda: {
            "classification linear": (0.01, 0.04),
            "classification lora": (0.004, 0.012),
            "classification full": (0.001, 0.003),
            "segmentation lora": (0.004, 0.012),
        }
    )
    pixels: int = 40_000
    trees: int = 300
    draws: int = 5
    tiles: int | None = None


SMALL = Plan(
    seeds=(0,), starts=("explora",), methods=("linear",), pretrain_steps=2, steps=2,
    segmentation=(("lora", 3),), tile_batch=2, tile_steps=2, pixels=500, trees=5, draws=1, tiles=6,
    rates={"classification linear": (0.04,), "segmentation lora": (0.004,)},
)  # fmt: skip
"""For a test."""


def scores(confusion: NDArray[np.int64]) -> dict[str, Any]:
    """Numbers of a confusion matrix, truth by prediction."""
    right = np.diag(confusion)
    with np.errstate(invalid="ignore"):
        recall, overlap = right / confusion.sum(1), right / (confusion.sum(0) + confusion.sum(1) - right)
    return {
        "accuracy": float(right.sum() / confusion.sum()), "balanced": float(np.nanmean(recall)),
        "miou": float(np.nanmean(overlap)), "iou": overlap.tolist(), "confusion": confusion.tolist(),
    }  # fmt: skip


class Experiment:
    """Does what is not yet done, in a working folder."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        self.folder, self.plan, self.file = folder, plan, folder / "record.json"
        folder.mkdir(parents=True, exist_ok=True)
        settings = json.loads(json.dumps(asdict(plan)))
        self.record: dict[str, Any] = {"plan": settings, "results": {}}
        if self.file.exists():
            self.record = json.loads(self.file.read_text(encoding="utf-8"))
            if self.record["plan"] != settings:
                raise SystemExit(f"{folder} holds work of another plan: name another folder")
        self.results = self.record["results"]
        for name, labelled in {"unlabelled": False, "labelled": True}.items():
            if not (folder / name).exists():
                shutil.rmtree(folder / "writing", ignore_errors=True)  # cut off
                write_fmow_tree(folder / "writing", TILE, labelled, limit=plan.tiles).rename(folder / name)

    def once(self, key: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A result, computed if it is not there yet."""
        if key not in self.results:
            self.results[key] = compute()
            self.file.write_text(json.dumps(self.record) + "\n", encoding="utf-8")
        found: dict[str, Any] = self.results[key]
        return found

    def encoder(self, start: str, seed: int) -> Path:
        """The weights of a start: a file, or the folder of a pre-training."""
        trained = start in {"explora", "scratch"}
        path = self.folder / (f"{start}-{seed}" if trained else f"{start}-{seed}.safetensors")
        if (path / "encoder.safetensors" if trained else path).exists():
            return path
        of_source = start in {"explora", "source"}
        words = ["--config", f"pretrain/demo-{'explora' if of_source else 'scratch'}", "--seed", str(seed)]
        words += ["--init", str(sample.source_weights())] if of_source else []
        steps = self.plan.pretrain_steps
        words += ["--max-steps", str(steps), "--warmup-steps", str(min(20, steps - 1)), "--output", str(path)]
        options: Any = resolve(PRETRAIN, [*words, "--root", str(self.folder / "unlabelled")]).options
        if trained:
            shutil.rmtree(path, ignore_errors=True)  # cut off
            PRETRAIN.run(options)
            for checkpoint in path.glob("checkpoints"):
                shutil.rmtree(checkpoint)
        else:  # what that pre-training would start from
            task = build_task(options, open_data(options), Schedule(1, 1, options.batch_size, 0), None)
            save_encoder(path, merged_state_dict(task.encoder), task.spec)
        return path

    def probe(self, start: str, seed: int) -> dict[str, Any]:
        """Nearest neighbours and logistic regression on frozen features, each block predicted from the others."""
        words = ["--dataset", "sample", "--init", str(self.encoder(start, seed)), "--holdout", "location"]
        words += ["--accelerator", "cpu", "--num-workers", "0", "--k", str(NEIGHBOURS), "--seed", str(seed)]
        words += ["--output", str(self.folder / f"probe-{start}-{seed}")]
        few = [
            "--classifiers",
            "logistic",
            "--few-shot",
            str(SHOTS),
            "--repeats",
            str(self.plan.draws),
            "--seed",
            str(self.plan.draws * seed),
        ]
        found = probe(resolve(PROBE, [*words, "--classifiers", "knn,logistic"]).options)
        found += probe(resolve(PROBE, [*words, *few]).options)
        one = {kind: result for kind, result in zip(("knn", "all", "few"), found, strict=True)}
        return {
            kind: {"balanced": one[kind].balanced_accuracy.mean, "accuracy": one[kind].accuracy.mean} for kind in KINDS
        }

    def statistics(self) -> tuple[sample.Tiles, NDArray[np.float32]]:
        """The labelled tiles, and mean and standard deviation of their bands."""
        tiles, keep = sample.labelled_tiles(TILE), list(SENTINEL2.indices(BANDS))
        images = [image[keep].astype(np.float32) for image in tiles.images()]
        return tiles, np.stack([np.r_[image.mean((1, 2)), image.std((1, 2))] for image in images])

    def forest(self, seed: int, **settings: Any) -> RandomForestClassifier:
        """A random forest."""
        return RandomForestClassifier(self.plan.trees, n_jobs=1, random_state=seed, **settings)

    def floor_probe(self, seed: int) -> dict[str, Any]:
        """Classifiers of band statistics on the folds of the probes."""
        tiles, features = self.statistics()
        labels, folds = tiles.labels, leave_locations_out(tiles.blocks)

        def test(classifier: Any, chosen: Any) -> dict[str, float]:
            truth = np.concatenate([labels[at] for _, at in chosen])
            told = np.concatenate([classifier.fit(features[a], labels[a]).predict(features[b]) for a, b in chosen])
            found = scores(confusion_matrix(truth, told, labels=range(COUNT)))
            return {name: found[name] for name in ("balanced", "accuracy")}

        def drawn(classifier: Any) -> dict[str, float]:
            found = [
                test(classifier, list(few_shot(folds, labels, SHOTS, self.plan.draws * seed + n)))
                for n in range(self.plan.draws)
            ]
            return {name: float(np.mean([one[name] for one in found])) for name in found[0]}

        forest, linear = self.forest(seed), linear_classifier(seed)
        return {
            "knn": test(knn_classifier(NEIGHBOURS, len(labels)), folds),
            "all": test(linear, folds), "few": drawn(linear), "forest": test(forest, folds),
        }  # fmt: skip

    def floor_classes(self, seed: int) -> dict[str, Any]:
        """Classifiers of band statistics on the split of the fine-tuning."""
        tiles, features = self.statistics()
        train, test = (np.isin(tiles.blocks, AREA_SPLITS[split]) for split in ("train", "test_gt"))
        found = {}
        for name, one in {
            "forest": self.forest(seed),
            "forest, balanced": self.forest(seed, class_weight="balanced"),
            "logistic": linear_classifier(seed),
        }.items():
            told = one.fit(features[train], tiles.labels[train]).predict(features[test])
            found[name] = scores(confusion_matrix(tiles.labels[test], told, labels=range(COUNT)))
        return found

    def floor_pixels(self, fold: int, seed: int) -> dict[str, Any]:
        """A forest of single pixels on the split of the segmentation."""
        image, mask = sample.read_scene().image[list(SENTINEL2.indices(BANDS))], sample.class_mask()
        parts = [block(number) for number in area_splits(fold)["train"]]
        x = np.concatenate([image[:, rows, columns].reshape(len(BANDS), -1).T for rows, columns in parts])
        y = np.concatenate([mask[rows, columns].ravel() for rows, columns in parts])
        known = np.random.default_rng(seed).permutation(np.flatnonzero(y != sample.IGNORE))[: self.plan.pixels]
        forest = RandomForestClassifier(
            n_estimators=100, min_samples_leaf=5, class_weight="balanced", n_jobs=1, random_state=seed
        )
        forest.fit(x[known], y[known])
        rows, columns = block(fold)
        told = forest.predict(image[:, rows, columns].reshape(len(BANDS), -1).T).reshape(mask[rows, columns].shape)
        return self.score_map("forest", fold, seed, told)

    def score_map(self, name: str, fold: int, seed: int, told: NDArray[Any]) -> dict[str, Any]:
        """Keep the predicted classes of a block, and score them where the land use is known."""
        np.save(self.folder / f"map-{name}-{fold}-{seed}.npy", told.astype(np.uint8))
        truth = sample.class_mask()[block(fold)]
        known = truth != sample.IGNORE
        return scores(confusion_matrix(truth[known], told[known], labels=range(COUNT)))

    def train(self, task: str, start: str, method: str, seed: int, rate: float, fold: int = 0) -> dict[str, Any]:
        """One fine-tuning, tested."""
        plan, out = self.plan, self.folder / "finetune"
        shutil.rmtree(out, ignore_errors=True)
        masks = task == "segmentation"
        batch, steps = (plan.tile_batch, plan.tile_steps) if masks else (plan.batch, plan.steps)
        words = [*COMMON.split(), "--task", task, "--method", method, "--init", str(self.encoder(start, seed))]
        words += ["--seed", str(seed), "--batch-size", str(batch), "--effective-batch-size", str(batch)]
        words += ["--lr", str(rate * 256 / batch), "--max-steps", str(steps), "--output", str(out)]
        words += ["--warmup-steps", str(max(1, steps // 10)), "--checkpoint-every", str(steps)]
        words += ["--eval-every", str(steps if masks else max(1, steps // 3))]
        if masks:
            words += [
                "--dataset",
                "sample",
                "--fold",
                str(fold),
                "--tile-size",
                str(plan.tile),
                "--crop-scale",
                "0.5,1",
            ]
            words += ["--image-size", str(plan.tile), "--head", "linear"]
        else:
            words += ["--dataset", "fmow-sentinel", "--root", str(self.folder / "labelled"), "--crop-scale", "1,1"]
            words += ["--monitor", "val_AverageAccuracy"]
        finetune(resolve(FINETUNE, words).options)
        column = "val_AverageJaccardIndex" if masks else "val_AverageAccuracy"
        validated = max(float(row[column]) for row in read_metrics(out / "metrics.csv") if row.get(column))
        if masks:
            found = self.score_map(f"{start}-{method}", fold, seed, self.predict_block(out, fold))
        else:
            with (out / "predictions.csv").open(encoding="utf-8") as file:
                rows = [(line["label"], line["prediction"]) for line in csv.DictReader(file)]
            found = scores(confusion_matrix(*zip(*rows, strict=True), labels=sample.CLASSES))
        return found | {"validated": validated, "rate": rate}

    def predict_block(self, run: Path, fold: int) -> NDArray[np.int64]:
        """The classes of all pixels of a block, tile by tile."""
        task, side = load_finetuned(run), self.plan.tile
        rows, columns = block(fold)
        image = sample.read_scene().image[list(SENTINEL2.indices(task.spec.bands)), rows, columns].astype(np.float32)
        tiles = torch.from_numpy(image).unflatten(2, (-1, side)).unflatten(1, (-1, side)).permute(1, 3, 0, 2, 4)
        told = torch.stack([task.predict(line).argmax(1) for line in tiles])
        return told.permute(0, 2, 1, 3).flatten(2, 3).flatten(0, 1).numpy()

    def tuned(self, task: str, method: str, fold: int = 0) -> float:
        """The rate that does best on the validation areas, for the photographs' weights and the first seed."""
        rates, seed = self.plan.rates[f"{task} {method}"], self.plan.seeds[0]
        if len(rates) == 1:
            return rates[0]
        tried = {rate: self.run(task, "source", method, seed, rate, fold)["validated"] for rate in rates}
        return max(tried, key=lambda rate: tried[rate])

    def run(self, task: str, start: str, method: str, seed: int, rate: float, fold: int = 0) -> dict[str, Any]:
        """One fine-tuning, once."""
        key = f"{task}/{start}/{method}/{fold}/{seed}/{rate:g}"
        return self.once(key, lambda: self.train(task, start, method, seed, rate, fold))

    def do_seed(self, seed: int) -> None:
        """Everything of one seed."""
        self.once(f"floor probe/{seed}", lambda: self.floor_probe(seed))
        self.once(f"floor classes/{seed}", lambda: self.floor_classes(seed))
        for start in self.plan.starts:
            self.once(f"probe/{start}/{seed}", lambda start=start: self.probe(start, seed))  # type: ignore[misc]
        for method, start in product(self.plan.methods, self.plan.starts):
            self.run("classification", start, method, seed, self.tuned("classification", method))
        for fold in sorted({fold for _, fold in self.plan.segmentation}):
            self.once(f"floor pixels/{fold}/{seed}", lambda fold=fold: self.floor_pixels(fold, seed))  # type: ignore[misc]
        for (method, fold), start in product(self.plan.segmentation, self.plan.starts):
            self.run("segmentation", start, method, seed, self.tuned("segmentation", method, fold), fold)


def main(words: list[str] | None = None) -> None:
    """Do what is not yet done, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="working folder")
    parser.add_argument("--output", type=Path, required=True, help="path of the results, without an ending")
    parser.add_argument("--small", action="store_true", help="a few steps of one seed, for a test")
    parser.add_argument("--report", action="store_true", help="only write the results of what is done")
    arguments = parser.parse_args(words)
    warnings.filterwarnings("ignore")
    experiment = Experiment(arguments.work, SMALL if arguments.small else Plan())
    if not arguments.report:
        experiment.record |= circumstances(("torch", "lightning", "timm", "peft", "scikit-learn"))
        for seed in experiment.plan.seeds:
            experiment.do_seed(seed)
    write_report(experiment.record, arguments.work, arguments.output)


if __name__ == "__main__":
    main()
