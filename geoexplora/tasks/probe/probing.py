"""``geoexplora probe``: how well frozen features tell the classes of a labelled dataset apart.

Shapes: R readable images, K classes, N rows of all splits.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack, suppress
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
from geoexplora.tasks.probe.amounts import class_sizes, refuse_few, tell_fewer_neighbours, usable_shots
from geoexplora.tasks.probe.evaluation import Evaluation, Result
from geoexplora.tasks.probe.extraction import Extraction, temporary_folder
from geoexplora.tasks.probe.linear import LinearProbe
from geoexplora.tasks.probe.report import write_report
from geoexplora.tasks.probe.rows import FeatureRows, Index

log = logging.getLogger(__name__)

_SPLITS = ("train", "val", "test")


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
    datamodule = opened.datamodule
    _refuse_other_target(options.dataset, datamodule)
    splits = _labelled_splits(options, datamodule)
    with ExitStack() as stack:
        spare = stack.enter_context(temporary_folder())
        extraction = Extraction(
            opened, _data_settings(options), device, options.precision == "bf16", _cache_folder(options) or spare, spare
        )
        stored = [extraction.features(split) for split in splits]
        labels = np.concatenate([one.labels for one in stored])
        classes = _class_names(datamodule, labels)
        places = [datamodule.eval_dataset(split).location_ids for split in splits]
        folds = _folds(options, [place[one.indices] for place, one in zip(places, stored, strict=True)])
        _check_classes(labels, folds, classes)
        shots = usable_shots(options.few_shot or (), labels, folds, classes)
        tell_fewer_neighbours(options, folds)
        results = _evaluation(options, opened, len(classes), shots, device).run(
            FeatureRows([one.features for one in stored]), labels, folds
        )
    if options.output is not None:
        settings = options.to_config() | {"splits": splits, "pool": _pool(options, opened)}
        settings |= {"weights": opened.record, "digest": opened.sha256}
        write_report(Path(options.output), results, classes, settings)
    return results


def _evaluation(
    options: Any, opened: OpenedEncoder, classes: int, shots: Sequence[int], device: torch.device
) -> Evaluation:
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
        shots=shots,
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
    """The splits to read; whatever of them cannot be probed is refused here, before features are computed.

    Raises:
        DataError: if a split is not there, there is nothing to hold out, or, as far as labels are listed, the training
            samples are of one class.
        ConfigError: if no class has as many listed labels as any ``--few-shot`` asks for.
    """
    if options.holdout == "split":
        splits = ["train", options.test_split]
        gone = [split for split in splits if not _has_labels(datamodule, split)]
        if gone:
            raise DataError(
                f"{options.dataset} has no labelled split {' and no split '.join(gone)} there",
                "".join(["Add it", *(f", or {way}" for way in _other_ways(datamodule))]) + ".",
            )
    else:
        splits = [split for split in _SPLITS if _has_labels(datamodule, split)]
    _check_listed(options, datamodule, splits)
    return splits


def _has_labels(datamodule: TilesDataModule, split: str) -> bool:
    return datamodule.has_split(split) and datamodule.source(split).target == "class"


def _other_ways(datamodule: TilesDataModule) -> list[str]:
    """What the labelled splits that can be opened allow, where the one asked for is not there."""
    there = []
    for split in _SPLITS:
        with suppress(DataError):
            if _has_labels(datamodule, split):
                there.append(split)
    ways = [f"take --test-split {split}" for split in there if split != "train"]
    if there and _several([datamodule.eval_dataset(split).location_ids for split in there]):
        ways.append("use --holdout location to split by place")
    return ways


def _check_listed(options: Any, datamodule: TilesDataModule, splits: list[str]) -> None:
    """Check by listed labels and locations what the features would otherwise be computed for in vain."""
    views = [datamodule.eval_dataset(split) for split in splits]
    labels, locations = np.concatenate([view.labels for view in views]), [view.location_ids for view in views]
    _refuse_one_class(datamodule, labels, "images")
    if options.holdout == "location" and not _several(locations):
        tests = [split for split in splits if split != "train"]
        others = f"Use --holdout split --test-split {tests[0]}." if tests else "Add a labelled split val or test."
        raise DataError(
            f"all labelled images of {options.dataset} lie at one location, or it does not tell where they lie", others
        )
    folds = _folds(options, locations)
    for train, _ in folds:
        _refuse_one_class(datamodule, labels[train], "training samples")
    if options.few_shot and (labels >= 0).all():
        refuse_few(options.few_shot, class_sizes(labels, folds, int(labels.max()) + 1))


def _several(locations: list[Index]) -> bool:
    return len(np.unique(np.concatenate(locations))) > 1


def _refuse_one_class(datamodule: TilesDataModule, labels: Index, what: str) -> None:
    """Refuse labels of one class; -1 stands for those that are not listed."""
    found = np.unique(labels)
    if len(found) == 1 and found[0] >= 0:
        names = datamodule.classes
        raise DataError(
            f"all {what} are of one class, {names[found[0]] if names else found[0]}",
            "A probe needs labels of two classes or more.",
        )


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


def _folds(options: Any, locations: list[Index]) -> Folds:
    """Rows of all splits to train and to test on.

    Args:
        options: settings of ``geoexplora probe``.
        locations: of each split's images, in the order of the splits.
    """
    if options.holdout == "split":
        first, second = (len(one) for one in locations)
        return [(np.arange(first), np.arange(first, first + second))]
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
    if options.init is None:
        return None
    run = RunFolder(options.init)
    return run.path / "features" if run.run_file.is_file() else None  # other folders are not ours to write into


def _device(accelerator: str) -> torch.device:
    if accelerator == "gpu" and not torch.cuda.is_available():
        raise ConfigError("no GPU is available", "Use --accelerator cpu.")
    return torch.device("cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu")
