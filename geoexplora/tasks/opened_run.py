"""The run folder of a training, new or taken up again."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from geoexplora.runs.checkpoint import find_checkpoint
from geoexplora.runs.folder import RunFolder
from geoexplora.runs.metrics import Metrics
from geoexplora.tasks.parallel import SharedFailure, process_rank

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class OpenedRun:
    """A run folder and where its training starts.

    Attributes:
        folder: the folder.
        leads: whether this is the first process: only that one writes.
        resumes: whether the folder's run is taken up again.
        checkpoint: what it goes on from; None at the very start.
        saved: what the checkpoint holds.
    """

    folder: RunFolder
    leads: bool
    resumes: bool
    checkpoint: Path | None = None
    saved: dict[str, Any] = field(default_factory=dict)

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return int(self.saved.get("global_step", 0))

    def begin(self, failure: SharedFailure, metrics: Metrics) -> None:
        """Make the folder, or bring it back to the checkpoint: by the first process, when all else is right.

        Args:
            failure: forgets that of an earlier start.
            metrics: forget the steps after the checkpoint.

        Raises:
            RunError: if the folder holds another run, or cannot be written.
        """
        if not self.resumes:
            self.folder.create()  # only now: wrong input leaves no folder behind
        failure.clear()
        if self.resumes:
            log.info("going on with %s from step %d", self.folder.path, self.step)
        metrics.truncate_after(self.step if self.checkpoint else -1)


@contextmanager
def opened_run(options: Any) -> Iterator[OpenedRun]:
    """The run folder of a training, closed at the end.

    Args:
        options: settings of ``geoexplora pretrain`` or ``finetune``: ``output`` and ``resume``.

    Raises:
        RunError: if a run that is to be resumed is in use, or its checkpoints cannot be read.
    """
    folder = RunFolder(options.output)
    leads, resumes = process_rank() == 0, options.resume and folder.holds_run
    if leads and resumes:
        folder.open()
    try:
        checkpoint = find_checkpoint(folder) if resumes else None
        saved = {} if checkpoint is None else torch.load(checkpoint, mmap=True, weights_only=True)
        yield OpenedRun(folder, leads, resumes, checkpoint, saved)
    finally:
        if leads:
            folder.close()
