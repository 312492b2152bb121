"""``geoexplora probe``: how well frozen features tell the classes of a labelled dataset apart.

Shapes: R readable images, K classes, N rows of all splits.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from geoexplora.datamodules.tiles import TilesDataModule
from geoexplora.errors import ConfigError, DataError
from geoexplora.models.pooling import Pool
from geoexplora.registry import find_dataset
from geoexplora.runs.folder import RunFolder
from geoexplora.tasks.classifiers import Folds, leave_locations_out
from geoexplora.tasks.features import ProbeFeatures
from geoexplora.tasks.labelled_data import KINDS
from geoexplora.tasks.opening import OpenedEncoder, open_encoder
from geoexplora.tasks.probe.evaluation import Evaluation, Result
from geoexplora.tasks.probe.extraction import Extraction, temporary_folder
from geoexplora.tasks.probe.linear import LinearProbe
from geoexplora.tasks.probe.report import write_report
from geoexplora.tasks.probe.rows import FeatureRows, Index
from geoexplora.tasks.probe.store import StoredFeatures

log = logging.getLogger(__name__)


def probe(options: Any) -> list[Result]:
    """Probe an encoder.

    Args:
        options: settings of ``geoexplora probe`` (``geoexplora.cli.probe.ProbeOptions``).

    Returns:
        What each classifier reached with each number of labels.

    Raises:
        GeoExploraError: if weights and data do not fit each other or cannot be read.
    """
    device = _device(options.accelerator)
    opened = open_encoder(options, "class")
    _refuse_other_target(options.dataset, opened.datamodule)
    splits = _labelled_splits(options, opened.datamodule)
    with ExitStack() as stack:
        spare = stack.enter_context(temporary_folder())
        extraction = Extraction(
            opened, _data_settings(options), device, options.precision == "bf16", _cache_folder(options) or spare, spare
        )
        stored = [extraction.features(split) for split in splits]
        labels = np.concatenate([one.labels for one in stored])
        classes = _class_names(opened.datamodule, labels)
        folds = _folds(options, opened.datamodule, splits, stored)
        _check_classes(labels, folds, classes)
        results = _evaluation(options, opened, len(classes), device).run(
            FeatureRows([one.features for one in stored]), labels, folds
        )
    if options.output is not None:
        settings = options.to_config() | {"splits": splits, "pool": _pool(options, opened)}
        settings |= {"weights": opened.record, "digest": opened.sha256}
        write_report(Path(options.output), results, classes, settings)
    return results


def _evaluation(options: Any, opened: OpenedEncoder, classes: int, device: torch.device) -> Evaluation:
    layout = ProbeFeatures.of(opened.encoder)
    products = torch.bfloat16 if options.precision == "bf16" else torch.float32
    linear = LinearProbe(layout.sets(), classes, options.linear_steps, options.select, device=device, products=products)
    return Evaluation(
        classes=classes,
        columns=layout.columns(_pool(options, opened)),
        linear=linear,
        neighbours=options.k,
        temperature=options.temperature,
        classifiers=options.classifiers,
        shots=options.few_shot or (),
        repeats=options.repeats,
        seed=options.seed,
        device=device,
    )


def _pool(options: Any, opened: OpenedEncoder) -> Pool:
    return "cls" if (options.pool or opened.spec.pool) == "cls" else "mean"


def _refuse_other_target(dataset: str, datamodule: TilesDataModule) -> None:
    kind = datamodule.target
    if kind == "none":
        raise ConfigError(f"{dataset} has no labels", "A probe needs a labelled dataset.")
    if kind != "class":
        task = next(name for name, known in KINDS.items() if known == kind)
        words = {"multilabel": "several labels", "mask": "a mask", "value": "a value"}
        raise ConfigError(
            f"a probe needs one class for each image, {dataset} has {words[kind]}",
            f"Use geoexplora finetune --task {task} --method linear.",
        )


def _labelled_splits(options: Any, datamodule: TilesDataModule) -> list[str]:
    """The splits to read, known to be there, and as far as labels are listed, to hold two classes, before all else."""
    if options.holdout == "split":
        splits = ["train", options.test_split]
        gone = [split for split in splits if not _has_labels(datamodule, split)]
        if gone:
            raise DataError(
                f"{options.dataset} has no labelled split {' and no split '.join(gone)} there",
                "Add it, name another by --test-split, or use --holdout location to split by place.",
            )
    else:
        splits = [split for split in ("train", "val", "test") if _has_labels(datamodule, split)]
    listed = np.unique(np.concatenate([datamodule.eval_dataset(split).labels for split in splits]))
    if len(listed) == 1 and listed[0] >= 0:
        names = datamodule.classes
        raise DataError(
            f"all images are of one class, {names[listed[0]] if names else listed[0]}",
            "A probe needs labels of two classes or more.",
        )
    return splits


def _has_labels(datamodule: TilesDataModule, split: str) -> bool:
    return datamodule.has_split(split) and datamodule.source(split).target == "class"


def _class_names(datamodule: TilesDataModule, labels: Index) -> tuple[str, ...]:
    """The dataset's, or numbers where it does not tell any.

    Raises:
        DataError: if an image has no label.
    """
    if (labels < 0).any():
        raise DataError(
            f"{int((labels < 0).sum())} of {len(labels)} images have no label", "Probe with labelled splits only."
        )
    return datamodule.classes or tuple(f"class {number}" for number in range(int(labels.max()) + 1))


def _folds(options: Any, datamodule: TilesDataModule, splits: list[str], stored: list[StoredFeatures]) -> Folds:
    if options.holdout == "split":
        first, second = (len(one.labels) for one in stored)
        return [(np.arange(first), np.arange(first, first + second))]
    locations = [
        datamodule.eval_dataset(split).location_ids[one.indices] for split, one in zip(splits, stored, strict=True)
    ]
    return leave_locations_out(np.concatenate(locations))


def _check_classes(labels: Index, folds: Folds, classes: tuple[str, ...]) -> None:
    """Name the classes that no fold can learn."""
    trained: NDArray[np.int64] = np.unique(labels[np.concatenate([train for train, _ in folds])])
    tested = np.bincount(labels[np.concatenate([test for _, test in folds])], minlength=len(classes))
    absent = np.setdiff1d(np.arange(len(classes)), trained)
    if len(absent):
        log.warning(
            "no training sample is of class %s: %d test samples of %s count as wrong",
            ", ".join(classes[at] for at in absent),
            int(tested[absent].sum()),
            "it" if len(absent) == 1 else "these",
        )


def _data_settings(options: Any) -> dict[str, Any]:
    """The settings that choose images and what is cut from them."""
    settings = {name: getattr(options, name) for name in find_dataset(options.dataset).settings}
    return settings | {"dataset": options.dataset, "max_unreadable": options.max_unreadable}


def _cache_folder(options: Any) -> Path | None:
    if options.output is not None:
        return Path(options.output) / "features"
    run = RunFolder(options.init or "")
    return run.path / "features" if run.run_file.is_file() else None  # other folders are not ours to write into


def _device(accelerator: str) -> torch.device:
    if accelerator == "gpu" and not torch.cuda.is_available():
        raise ConfigError("no GPU is available", "Use --accelerator cpu.")
    return torch.device("cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu")
