"""What the logged numbers say of a training: features that collapse, a teacher that says the same of everything.

Users of DINOv2 report that continuing from its backbones ruins the features, silently; here it is said, with a remedy.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)

FALL = 0.3
"""Features whose spread or rank falls below this share of its start are collapsing."""

UNIFORM = 0.99
"""A teacher whose entropy is above this share of the largest possible says nothing."""

SAME = 0.005
"""Share of the largest possible entropy that a teacher must tell of which image it sees."""

SETTLED = 200
"""Optimizer steps before the teacher is judged: heads start at random, and say little at first."""

_REMEDY = "start again with a lower --lr, with fewer whole blocks, or with dinov2 with a longer --freeze-last-epochs"


class HealthWatch:
    """Warns when logged numbers tell of collapse, once for each kind.

    Args:
        prototypes: K of a teacher; ``None`` without one.
        first: the run's first row of metrics, where training goes on.
    """

    def __init__(self, prototypes: int | None = None, first: Mapping[str, Any] | None = None) -> None:
        self.prototypes = prototypes
        self.first = first
        self._said: set[str] = set()

    def __call__(self, row: Mapping[str, Any]) -> list[str]:
        """Judge a row of metrics.

        Args:
            row: with ``step``, and any of ``feature_std``, ``feature_rank``, ``teacher_entropy``,
                ``teacher_mean_entropy``.

        Returns:
            What is new, logged as warnings.
        """
        if self.first is None:
            self.first = row
        found = dict(self._features(row)) | dict(self._teacher(row))
        new = [text for kind, text in found.items() if kind not in self._said]
        self._said |= found.keys()
        for text in new:
            log.warning("step %d: %s", row["step"], text)
        return new

    def _features(self, row: Mapping[str, Any]) -> list[tuple[str, str]]:
        said = {"feature_std": "the spread of the features", "feature_rank": "the effective rank of the features"}
        found = []
        for name, what in said.items():
            start, value = float((self.first or {}).get(name, math.nan)), float(row.get(name, math.nan))
            if value < FALL * start:
                found.append((name, f"{what} fell to {value:.3g}, from {start:.3g} at the start: {_REMEDY}."))
        return found

    def _teacher(self, row: Mapping[str, Any]) -> list[tuple[str, str]]:
        if self.prototypes is None or row["step"] <= SETTLED or "teacher_entropy" not in row:
            return []
        entropy, mean_entropy = float(row["teacher_entropy"]), float(row["teacher_mean_entropy"])
        largest, found = math.log(self.prototypes), []
        if entropy > UNIFORM * largest:
            text = (
                f"the teacher's outputs are almost uniform (entropy {entropy:.3g} of {largest:.3g}): "
                "lower --teacher-temperature, lengthen --freeze-last-epochs, or try --centering sinkhorn."
            )
            found.append(("uniform", text))
        if mean_entropy - entropy < SAME * largest:
            text = "the teacher says the same of every image: raise --koleo-weight, try --centering sinkhorn, or lower"
            found.append(("same", f"{text} --lr."))
        return found


class FinitenessGuard:
    """Remembers, without waiting for the device, which batches had a finite loss, and of which samples they were."""

    def __init__(self) -> None:
        self._batches: list[tuple[Tensor, Tensor, Any]] = []

    def note(self, loss: Tensor, batch: Mapping[str, Any]) -> None:
        """Note a batch: its loss, and its images as far as the guard needs them."""
        finite = batch["image"].detach().flatten(1).isfinite().all(1)
        self._batches.append((loss, finite, batch.get("index")))

    def verdict(self, names: Any) -> str | None:
        """What was not finite since the last verdict, and in which samples; ``None`` if all was well.

        Args:
            names: a function from the index of a sample to what to call it.
        """
        batches, self._batches = self._batches, []
        if not batches or bool(torch.stack([loss for loss, _, _ in batches]).isfinite().all()):  # one wait for all
            return None
        for loss, finite, index in batches:
            if math.isfinite(float(loss)):
                continue
            bad = ~finite.cpu()
            which = index[bad] if index is not None and bool(bad.any()) else index
            text = f"the loss is {float(loss)}"
            if which is None:
                return text
            listed = ", ".join(str(names(int(one))) for one in which.tolist()[:8])
            more = "" if len(which) <= 8 else f" and {len(which) - 8} more"
            if bool(bad.any()):
                return f"{text}: pixels are NaN or infinite in {listed}{more}"
            return f"{text}, though the pixels of its images are finite; the batch held {listed}{more}"
        return None


def sample_names(source: Any) -> Any:
    """A function from the index of a sample to its file, or to its number where the dataset knows no files."""

    def name(index: int) -> str:
        path: Path | None = source.path(index) if hasattr(source, "path") else None
        return f"image {index}" if path is None else str(path)

    return name
