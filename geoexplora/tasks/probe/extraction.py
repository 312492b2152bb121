"""Computes the features of a dataset's splits once: what they depend on is their key, what is on disk is not repeated.

Shapes: R readable images, F features.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from geoexplora.datamodules.tiles import TilesDataModule
from geoexplora.errors import RunError
from geoexplora.models.inference import inference_copy
from geoexplora.runs.lock import FolderLock
from geoexplora.tasks.features import ProbeFeatures, read_features
from geoexplora.tasks.opening import OpenedEncoder
from geoexplora.tasks.probe.store import FeatureStore, StoredFeatures
from geoexplora.weights.atomic import write_failure

log = logging.getLogger(__name__)

FORMAT = 1
"""Raised when features computed by an older version must not be taken."""

_TOKENS = 3072
"""Tokens in one forward pass on a CPU, whose cache then holds them (benchmarks/feature_extraction.py)."""


@dataclass(frozen=True)
class Extraction:
    """How features are computed, and where they are kept.

    Attributes:
        opened: encoder and data.
        data: settings that, beside the images, decide what the dataset gives, in plain JSON types.
        device: where to compute.
        bf16: compute in bfloat16 and store float16, which holds more digits in as many bytes.
        cache: folder that keeps the features.
        spare: folder for them where the cache cannot be written; ``cache`` may be the same.
    """

    opened: OpenedEncoder
    data: dict[str, Any]
    device: torch.device
    bf16: bool
    cache: Path
    spare: Path

    def features(self, split: str) -> StoredFeatures:
        """The features of one split, from the cache as far as they are there.

        Raises:
            GeoExploraError: if images or features are not what they should be, or cannot be kept anywhere.
        """
        datamodule = self.opened.datamodule
        view = datamodule.eval_dataset(split)
        layout = ProbeFeatures.of(self.opened.encoder)
        name = f"{split}-{self._digest(split)}"
        dtype = np.float16 if self.bf16 else np.float32

        def store(folder: Path) -> FeatureStore:
            return FeatureStore(folder / name, len(view), layout.size, dtype)

        kept = store(self.cache)
        try:
            if kept.looks_complete and kept.verify():
                log.info("features of %s from %s", split, kept.folder)
            else:
                with _locked(kept.folder):
                    self._complete(kept, split, layout)
            return kept.read()
        except RunError as problem:
            if self.spare == self.cache:
                raise
            log.warning("the features of %s are not kept for another time: %s", split, str(problem).splitlines()[0])
        spare = store(self.spare)
        _copy(kept.folder, spare.folder)
        self._complete(spare, split, layout)
        return spare.read()

    def _complete(self, store: FeatureStore, split: str, layout: ProbeFeatures) -> None:
        if store.verify():  # another process has just finished it
            return
        datamodule = self.opened.datamodule
        view = datamodule.eval_dataset(split)
        if store.damaged:
            log.warning("%s is damaged: going on behind %d intact images", store.folder, store.done)
        if store.done:
            log.info("features of %s: %d of %d images are in %s", split, store.done, len(view), store.folder)
            _note_unreadable(datamodule, split, store)
        log.info("features of %d images of %s", len(view) - store.done, split)
        left = Subset(view, range(store.done, len(view)))
        loader = DataLoader(
            left, datamodule.batch_size, num_workers=datamodule.num_workers, pin_memory=self.device.type == "cuda"
        )
        progress = tqdm(
            loader, desc=split, initial=-(-store.done // datamodule.batch_size), disable=not sys.stderr.isatty()
        )
        check = partial(datamodule.check_unreadable, split=split)
        store.extend(read_features(self._encode(layout), progress, self.device, check))

    def _encode(self, layout: ProbeFeatures) -> Any:
        encoder = inference_copy(self.opened.encoder, torch.bfloat16 if self.bf16 else None).to(self.device)
        if self.device.type != "cpu":
            return partial(layout, encoder)
        spec = self.opened.spec
        tokens = (spec.image_size // spec.patch_size) ** 2 * len(spec.groups or (None,))

        def by_parts(images: Tensor) -> Tensor:
            parts = images.split(max(1, _TOKENS // tokens))
            return torch.cat([layout(encoder, part) for part in parts])

        return by_parts

    def _digest(self, split: str) -> str:
        """What a split's features depend on: weights, images and labels, preprocessing."""
        spec = self.opened.spec.to_metadata()
        spec.pop("source", None)  # says where the weights came from, not what they are
        parts = [FORMAT, self.opened.sha256, spec, self.bf16, self.data, _fingerprint(self.opened.datamodule, split)]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _fingerprint(datamodule: TilesDataModule, split: str) -> str:
    """Labels and numbers of a split's images, and what the source says that their pixels depend on."""
    view, source = datamodule.eval_dataset(split), datamodule.source(split)
    found = hashlib.sha256()
    for part in (view.labels, view.location_ids, view.image_ids):
        found.update(part.tobytes())
    found.update(source.fingerprint())
    return found.hexdigest()


def _note_unreadable(datamodule: TilesDataModule, split: str, store: FeatureStore) -> None:
    """Count the unreadable images of the part that is done already, so that their bearable share holds for all."""
    left_out = np.setdiff1d(np.arange(store.done), store.read().indices)
    for index in left_out.tolist():
        datamodule.source(split).note_unreadable(index)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Alone in a folder of features; another process that computes the same is waited for.

    Raises:
        RunError: if the folder cannot be written.
    """
    lock = FolderLock(folder)
    said = False
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
            break
        except OSError as problem:
            raise write_failure(folder, problem, resumable=False) from problem
        except RunError as problem:
            if not said:
                log.info("waiting for features: %s", str(problem).splitlines()[0])
            said = True
            time.sleep(0.2)
    try:
        yield
    finally:
        lock.release()


def _copy(source: Path, target: Path) -> None:
    """Take along what was computed already."""
    try:
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns(".*"))
        target.mkdir(parents=True, exist_ok=True)
    except OSError as problem:  # shutil.Error is one
        raise write_failure(target, problem, resumable=False) from problem


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder for features that are not kept."""
    with tempfile.TemporaryDirectory(prefix="geoexplora-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)
