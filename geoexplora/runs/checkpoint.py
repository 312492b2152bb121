"""Checkpoints of a run: written whole or not at all, the previous one kept, the rest of the run folder after each."""

from __future__ import annotations

import logging
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from geoexplora.errors import GeoExploraError, RunError
from geoexplora.runs.folder import RunFolder
from geoexplora.weights.atomic import atomic_path

log = logging.getLogger(__name__)


class RunCheckpoint(Checkpoint):
    """Writes ``checkpoints/last.ckpt`` every N optimizer steps and at the end, keeping the one before.

    A kill at any moment leaves whole files. If a checkpoint cannot be written (disk full, folder read-only), its
    unfinished file is removed, the last good one stays, and every process of the training stops with the same
    RunError. Put it into ``Trainer(callbacks=[...])`` with ``enable_checkpointing`` left as it is; Lightning runs it
    after the other callbacks, so what they log for a step is on disk before the step's checkpoint.

    Args:
        folder: the run folder.
        every_n_steps: optimizer steps between checkpoints; 0 for one at the end only.
        before_save: called on rank zero before a checkpoint, such as ``Metrics.sync``.
        on_saved: called on rank zero with the trainer and the module after a checkpoint, to bring the rest of the run
            folder up to date. A run that was killed between a last checkpoint and this call makes up for it when
            resumed.
    """

    def __init__(
        self,
        folder: RunFolder,
        every_n_steps: int,
        *,
        before_save: Callable[[], object] | None = None,
        on_saved: Callable[[Trainer, LightningModule], object] | None = None,
    ) -> None:
        super().__init__()
        self.folder = folder
        self.every_n_steps = every_n_steps
        self.before_save = before_save
        self.on_saved = on_saved
        self._saved_step: int | None = None
        self._completed_step: int | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make the trainer write whole files."""
        trainer.strategy.checkpoint_io = AtomicCheckpointIO(self.folder)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember where training starts: that step needs no checkpoint."""
        self._saved_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save after every N-th optimizer step."""
        if self.every_n_steps and trainer.global_step % self.every_n_steps == 0:
            self._save(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save at the end."""
        self._save(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Complete a run that was stopped between its last checkpoint and ``on_saved``."""
        if self._completed_step != trainer.global_step and trainer.is_global_zero and self.on_saved is not None:
            self.on_saved(trainer, pl_module)
            self._completed_step = trainer.global_step

    def _save(self, trainer: Trainer, task: LightningModule) -> None:
        step = trainer.global_step
        if step == self._saved_step:  # batches that only accumulate gradients leave the step as it is
            return
        self._together(trainer, self.before_save)
        trainer.save_checkpoint(self.folder.last_checkpoint)
        self._together(trainer, _failure_of(trainer))
        self._saved_step = step
        if (on_saved := self.on_saved) is not None:
            self._together(trainer, lambda: on_saved(trainer, task))
        self._completed_step = step

    @staticmethod
    def _together(trainer: Trainer, action: Callable[[], object] | None) -> None:
        """Act on rank zero; if that fails, fail on all ranks, so that none waits for another for ever."""
        problem: GeoExploraError | None = None
        if trainer.is_global_zero and action is not None:
            try:
                action()
            except GeoExploraError as raised:
                problem = raised
        message = trainer.strategy.broadcast(str(problem) if problem is not None else None)
        if problem is not None:
            raise problem
        if message is not None:
            raise RunError(message)


def _failure_of(trainer: Trainer) -> Callable[[], None]:
    def check() -> None:
        plugin = trainer.strategy.checkpoint_io
        if isinstance(plugin, AtomicCheckpointIO) and plugin.failure is not None:
            raise plugin.failure

    return check


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint writer, but whole or not at all, without a copy of the checkpoint in memory.

    Args:
        folder: the run folder; its ``last.ckpt`` is kept as ``previous.ckpt`` when a new one takes its place.
    """

    def __init__(self, folder: RunFolder) -> None:
        super().__init__()
        self.folder = folder
        self.failure: RunError | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint; ``failure`` then holds what went wrong, or None.

        It does not raise: the other ranks of a distributed run would wait for ever.
        """
        target = Path(path)
        keep = self._keep_previous if target == self.folder.last_checkpoint else None
        self.failure = None
        try:
            with atomic_path(target, before_replace=keep) as temporary, temporary.open("wb") as file:
                torch.save(checkpoint, file)
        except RunError as problem:
            self.failure = problem

    def _keep_previous(self) -> None:
        last, previous = self.folder.last_checkpoint, self.folder.previous_checkpoint
        if not last.exists():
            return
        link = previous.with_name(f".{previous.name}.link.tmp")
        with suppress(OSError):
            link.unlink(missing_ok=True)
        try:
            link.hardlink_to(last)  # so that last.ckpt exists at every moment
        except OSError:  # a file system without hard links: previous.ckpt alone for a moment
            last.replace(previous)
        else:
            link.replace(previous)
            link.unlink(missing_ok=True)  # the system leaves it where both names already mean the same file


def find_checkpoint(folder: RunFolder) -> Path | None:
    """The checkpoint to resume from: the last one, or the previous one if the last is damaged.

    Args:
        folder: the run folder.

    Returns:
        Its path; None if the run was stopped before its first checkpoint.

    Raises:
        RunError: if there are checkpoints but none is whole.
    """
    damaged: list[tuple[Path, str]] = []
    for path in (folder.last_checkpoint, folder.previous_checkpoint):
        if not path.exists():
            continue
        problem = _damage(path)
        if problem is None:
            if damaged:
                log.warning("%s is damaged (%s): going on from %s", *damaged[0], path)
            return path
        damaged.append((path, problem))
    if not damaged:
        return None
    raise RunError(
        "no checkpoint can be read: " + "; ".join(f"{path}: {problem}" for path, problem in damaged),
        "Start the run again with another --output, or restore a checkpoint from a backup.",
    )


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint (a zip archive with a checksum for each tensor), or None."""
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except (OSError, zipfile.BadZipFile, EOFError, zlib.error, RuntimeError) as problem:
        return str(problem)
    return f"{broken} does not match its checksum" if broken else None
