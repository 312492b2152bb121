"""Tiny fine-tunings from the command line, and a dataset of TorchGeo's kind whose targets a test makes up."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torchgeo.datasets
from numpy.typing import NDArray
from torch import Tensor
from torchgeo.datasets import NonGeoDataset

from geoexplora.registry import DATASETS, DatasetEntry

from ..conftest import Outcome, run_command

FINE = (
    "--batch-size", "4", "--max-steps", "4", "--warmup-steps", "0", "--lr", "0.3", "--rank", "2", "--eval-every", "2",
    "--checkpoint-every", "2", "--log-every", "1", "--accelerator", "cpu", "--precision", "32", "--num-workers", "0",
)  # fmt: skip
CLASSES = ("field", "lake", "town")
COUNTS = {"train": 12, "val": 6, "test": 6}
BANDS = {
    "sentinel-2": ("B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "B11", "B12"),
    "rgb": ("R", "G", "B"),
}
SIZE = 16

Kind = Literal["class", "multilabel", "mask", "value"]
TASKS: dict[Kind, str] = {
    "class": "classification",
    "multilabel": "multilabel",
    "mask": "segmentation",
    "value": "regression",
}


class MadeUp(NonGeoDataset):
    """Reads ``<split>.npz`` with ``images`` (N, C, h, w), and ``target``, named by facts.json."""

    splits: tuple[str, ...] = tuple(COUNTS)

    def __init__(self, root: Path, split: str = "train") -> None:
        facts = json.loads((Path(root) / "facts.json").read_text())
        self.root, self.bands, self.key = root, tuple(facts["bands"]), facts["key"]
        self.classes = tuple(facts["classes"])
        with np.load(Path(root) / f"{split}.npz", allow_pickle=False) as file:
            self.images, self.target = file["images"], file["target"]
        self.files = [f"{split}_{number}.tif" for number in range(len(self.images))]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {
            "image": torch.from_numpy(self.images[index].astype(np.float32)),
            self.key: torch.from_numpy(np.asarray(self.target[index])),
        }


class MadeUpWithoutVal(MadeUp):
    """The same without a validation split."""

    splits = ("train", "test")


def made_up_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the datasets ``made-up``, ``made-up-rgb`` and ``without-val`` known."""
    for name, kind, sensor in (
        ("made-up", MadeUp, "sentinel-2"),
        ("made-up-rgb", MadeUp, "rgb"),
        ("without-val", MadeUpWithoutVal, "sentinel-2"),
    ):
        monkeypatch.setattr(torchgeo.datasets, kind.__name__, kind, raising=False)
        entry = DatasetEntry(DATASETS["eurosat"].datamodule, sensor, arguments={"name": kind.__name__})
        monkeypatch.setitem(DATASETS, name, entry)


def make_up(
    kind: Kind, number: int, sensor: str = "sentinel-2", seed: int = 0
) -> tuple[NDArray[np.uint16], NDArray[Any]]:
    """Images (N, C, h, w) whose brightness tells their target, and the targets."""
    rng = np.random.default_rng(seed)
    channels = len(BANDS[sensor])
    level, scale = (1500, 600) if sensor == "sentinel-2" else (120, 60)
    label = np.arange(number) % len(CLASSES)
    mask = np.repeat(np.repeat((label[:, None, None] + np.arange(4).reshape(2, 2)) % len(CLASSES), 8, 1), 8, 2)
    shown = mask if kind == "mask" else np.broadcast_to(label[:, None, None], mask.shape)
    images = level + scale * (shown - 1)[:, None] + rng.normal(0, scale / 3, (number, channels, SIZE, SIZE))
    targets: dict[Kind, NDArray[Any]] = {
        "class": label.astype(np.int64),
        "multilabel": np.stack([label == 0, label >= 1, label == 2], axis=1).astype(np.int64),
        "mask": mask.astype(np.int64),
        "value": (1000 + 50 * label + rng.normal(0, 5, number)).astype(np.float32),
    }
    return images.clip(1, None).astype(np.uint16), targets[kind]


def write_made_up(
    root: Path,
    kind: Kind,
    sensor: str = "sentinel-2",
    targets: Mapping[str, NDArray[Any]] | None = None,
    bands: tuple[str, ...] | None = None,
) -> Path:
    """A dataset for ``MadeUp``.

    Args:
        root: folder to write into.
        kind: of the targets.
        sensor: of the images.
        targets: instead of the made-up ones, by split.
        bands: the images' first bands, under these names.
    """
    root.mkdir(parents=True, exist_ok=True)
    names = bands or BANDS[sensor]
    classes = () if kind == "value" else CLASSES
    facts = {"bands": names, "key": "mask" if kind == "mask" else "label", "classes": classes}
    (root / "facts.json").write_text(json.dumps(facts))
    for number, (split, count) in enumerate(COUNTS.items()):
        images, target = make_up(kind, count, sensor, number)
        target = target if targets is None or split not in targets else targets[split]
        np.savez(root / f"{split}.npz", images=images[: len(target), : len(names)], target=target)
    return root


def write_all_kinds(root: Path) -> dict[tuple[str, Kind], Path]:
    """A dataset of each kind of target by each sensor."""
    return {(sensor, kind): write_made_up(root / sensor / kind, kind, sensor) for sensor in BANDS for kind in TASKS}


def dataset_of(sensor: str) -> str:
    """The name of the made-up dataset of a sensor."""
    return "made-up-rgb" if sensor == "rgb" else "made-up"


def finetune(dataset: str, root: Path, output: Path, *more: object) -> Outcome:
    """A tiny fine-tuning."""
    return run_command("finetune", "--dataset", dataset, "--root", root, "--output", output, *FINE, *more)


def refuse(
    output: Path,
    init: Path,
    *words: object,
    root: Path,
    contains: Sequence[str],
    dataset: str = "made-up",
    begun: bool = False,
) -> str:
    """Fine-tune, expecting exit status 2 and one message with a remedy; no folder unless training had begun.

    Args:
        output: the run folder; removed afterwards.
        init: the encoder, unless the words name another or none.
        words: of the command line.
        root: of the dataset.
        contains: what the message is to hold.
        dataset: its name.
        begun: whether training may have begun.

    Returns:
        The message.
    """
    source = () if {"--init", "--model"} & set(words) else ("--init", init)
    got = finetune(dataset, root, output, *source, *words)
    assert got.status == 2, got.err
    assert "Traceback" not in got.err
    message = got.err[got.err.index("geoexplora finetune: ") :]
    for text in contains:
        assert text in message
    assert len(message.splitlines()) > 1 or ". " in message or "must be" in message, "a remedy follows"
    assert begun or not output.exists()
    shutil.rmtree(output, ignore_errors=True)
    return message
