"""``geoexplora probe``: how well frozen features tell the classes of a labelled dataset apart."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from geoexplora.bands import SENSORS
from geoexplora.datamodules.tiles import TilesDataModule
from geoexplora.errors import ConfigError, DataError, RunError
from geoexplora.registry import find_dataset, load
from geoexplora.tasks.classifiers import (
    Floats,
    Folds,
    Labels,
    Scores,
    few_shot,
    knn_classifier,
    leave_locations_out,
    linear_classifier,
    score,
)
from geoexplora.tasks.features import Pool, extract_features
from geoexplora.tasks.parallel import useful_workers
from geoexplora.transforms.normalization import Normalization
from geoexplora.weights.atomic import atomic_path, write_text
from geoexplora.weights.files import read_weights
from geoexplora.weights.load import load_encoder
from geoexplora.weights.spec import EncoderSpec

log = logging.getLogger(__name__)


def probe(options: Any) -> dict[str, Scores]:
    """Probe an encoder.

    Args:
        options: settings of ``geoexplora probe`` (``geoexplora.cli.probe.ProbeOptions``).

    Returns:
        Scores by classifier: ``knn`` and ``linear``.

    Raises:
        GeoExploraError: if weights and data do not fit each other or cannot be read.
    """
    source = read_weights(options.init)
    encoder: Any
    encoder, spec = load_encoder(source)
    if options.image_size not in {None, spec.image_size}:
        if options.image_size % spec.patch_size:
            raise ConfigError(
                f"--image-size {options.image_size} is not a multiple of the encoder's patch size {spec.patch_size}",
                f"It was trained at {spec.image_size} pixels.",
            )
        encoder.set_input_size(img_size=(options.image_size, options.image_size))
        spec = replace(spec, image_size=options.image_size)
    if options.bands is not None and tuple(SENSORS[spec.sensor].select(options.bands)) != spec.bands:
        raise ConfigError(
            f"the encoder was trained on bands {','.join(spec.bands)}, not {','.join(options.bands)}",
            "Leave --bands out: the right ones are taken by name.",
        )
    datamodule = labelled_data(options, spec)
    splits = _labelled_splits(options, datamodule)
    device = _device(options.accelerator)
    precision = torch.bfloat16 if options.precision == "bf16" else None
    cache = _cache_folder(options)
    weights = source.record()
    parts = []
    for split in splits:
        digest = _digest(options, spec, weights, datamodule.eval_dataset(split))
        file = None if cache is None else cache / f"{split}-{digest}.npz"
        parts.append(_features(encoder.to(device), datamodule, split, options.pool, device, precision, file))
    features = np.concatenate([part[0] for part in parts])
    labels = np.concatenate([part[1] for part in parts])
    if options.holdout == "split":
        count = len(parts[0][1])
        folds = [(np.arange(count), np.arange(count, len(labels)))]
    else:
        folds = leave_locations_out(np.concatenate([part[2] for part in parts]))
    scores = evaluate(features, labels, folds, options.k, options.few_shot, options.seed)
    if options.output is not None:
        record = {name: asdict(value) for name, value in scores.items()}
        settings = {"init": str(options.init), "dataset": options.dataset, "holdout": options.holdout, "k": options.k}
        settings |= {"few_shot": options.few_shot, "pool": options.pool, "seed": options.seed, "weights": weights}
        write_text(Path(options.output) / "probe.json", json.dumps({"scores": record, "settings": settings}, indent=2))
    return scores


def labelled_data(options: Any, spec: EncoderSpec) -> TilesDataModule:
    """The datamodule of a dataset, preprocessed as the encoder was trained: bands, normalization, resizing.

    Raises:
        ConfigError: if the dataset is of another sensor than the encoder.
    """
    entry = find_dataset(options.dataset)
    if entry.sensor is not None:
        _refuse_other_sensor(spec, options.dataset, entry.sensor)
    datamodule: TilesDataModule = load(entry.datamodule)(
        options.root,
        **entry.arguments,
        **{name: getattr(options, name) for name in entry.settings},
        bands=spec.bands,
        image_size=spec.image_size,
        batch_size=options.batch_size,
        num_workers=useful_workers(options.num_workers),
        normalization=Normalization.from_dict(spec.normalization),
        antialias=spec.antialias,
        years=options.years,
        missing=options.missing,
        max_unreadable=options.max_unreadable,
        seed=options.seed,
    )
    _refuse_other_sensor(spec, options.dataset, datamodule.sensor.name)
    return datamodule


def _refuse_other_sensor(spec: EncoderSpec, dataset: str, sensor: str) -> None:
    if sensor != spec.sensor:
        raise ConfigError(
            f"the encoder was trained on {spec.sensor}, {dataset} is {sensor}",
            "Adapt it first: geoexplora pretrain --init FILE.",
        )


def evaluate(
    features: Floats, labels: Labels, folds: Folds, k: int, shots: int | None = None, seed: int = 0
) -> dict[str, Scores]:
    """Score kNN and logistic regression on the same features and folds.

    Args:
        features: (N, F).
        labels: (N,).
        folds: pairs of indices of training and of test samples.
        k: neighbours.
        shots: training samples of each class; ``None`` takes all.
        seed: of the samples drawn.

    Raises:
        DataError: if there is only one class.
    """
    if shots is not None:
        folds = list(few_shot(folds, labels, shots, seed))
    smallest = min(len(train) for train, _ in folds)
    return {
        "knn": score(knn_classifier(k, smallest), features, labels, folds),
        "linear": score(linear_classifier(seed), features, labels, folds),
    }


def format_scores(rows: dict[str, Scores]) -> str:
    """A table of scores, a line each."""
    width = max(len(name) for name in rows)
    return "\n".join(
        f"{name:<{width}}  accuracy {row.accuracy:.4f}  balanced accuracy {row.balanced_accuracy:.4f}  "
        f"({row.samples} test samples, {row.classes} classes)"
        for name, row in rows.items()
    )


def _features(
    encoder: Any,
    datamodule: TilesDataModule,
    split: str,
    pool: Pool,
    device: torch.device,
    precision: torch.dtype | None,
    file: Path | None,
) -> tuple[Floats, Labels, Labels]:
    """Features, labels and locations of a split, from the cache where they lie there."""
    view = datamodule.eval_dataset(split)
    if file is not None and file.exists():
        log.info("features of %s from %s", split, file)
        with np.load(file) as cached:
            return cached["features"], cached["labels"], view.location_ids[cached["kept"]]
    log.info("features of %d images of %s", len(view), split)
    loader = tqdm(datamodule.eval_dataloader(split), desc=split, disable=not sys.stderr.isatty())
    found = extract_features(
        encoder, loader, pool, device, precision, partial(datamodule.check_unreadable, split=split)
    )
    if file is not None:
        try:
            with atomic_path(file) as temporary, temporary.open("wb") as stream:
                np.savez(stream, **found._asdict())
        except RunError as problem:
            log.warning("the features of %s are not kept for another time: %s", split, str(problem).splitlines()[0])
    return found.features, found.labels, view.location_ids[found.kept]


def _labelled_splits(options: Any, datamodule: TilesDataModule) -> list[str]:
    """The splits to read, known to hold labels before anything slow begins."""
    if options.holdout == "split":
        splits = ["train", "val"]
        gone = [split for split in splits if not datamodule.has_split(split)]
        if gone:
            raise DataError(
                f"{options.dataset} has no labelled split {' and no split '.join(gone)} there",
                "Add it, or use --holdout location to split by place.",
            )
    else:
        splits = [split for split in ("train", "val", "test_gt") if datamodule.has_split(split)]
    views = [datamodule.eval_dataset(split) for split in splits]
    if not datamodule.classes:
        raise DataError(f"{options.dataset} has no labels", "A probe needs a labelled dataset.")
    found = np.unique(np.concatenate([view.labels for view in views]))
    if len(found) < 2:
        raise DataError(
            f"all tiles are of one class, {datamodule.classes[int(found[0])]}",
            "A probe needs labels of two classes or more.",
        )
    return splits


def _digest(options: Any, spec: EncoderSpec, weights: dict[str, Any], view: Any) -> str:
    """What a split's features depend on: weights, data, preprocessing."""
    data = [options.dataset, str(Path(options.root or "").resolve()), options.max_unreadable]
    rows = hashlib.sha256(view.labels.tobytes() + view.location_ids.tobytes() + view.image_ids.tobytes()).hexdigest()
    parts = [weights["sha256"], data, rows, options.pool, options.precision, spec.to_metadata()]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _cache_folder(options: Any) -> Path | None:
    if options.output is not None:
        return Path(options.output) / "features"
    return Path(options.init) / "features" if Path(options.init).is_dir() else None


def _device(accelerator: str) -> torch.device:
    if accelerator == "gpu" and not torch.cuda.is_available():
        raise ConfigError("no GPU is available", "Use --accelerator cpu.")
    return torch.device("cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu")
