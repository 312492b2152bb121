"""Several processes, one verdict: an error of the user's that one of them meets ends all of them with its message."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Callback, LightningModule, Trainer

from geoexplora.errors import GeoExploraError, RunError, message_in_traceback, user_message
from geoexplora.weights.atomic import write_text

log = logging.getLogger(__name__)

PATIENCE = 20.0
"""Seconds that a process which met an error, or was stopped, waits for the first one to report it and end."""


def process_rank() -> int:
    """0 for the first of all processes of the training; before they have met, others may share a number."""
    rank = int(getattr(rank_zero_only, "rank", 0))
    return rank or int(os.environ.get("NODE_RANK", "0"))


def useful_workers(wanted: int) -> int:
    """As many loader processes as wanted, but no more than there are CPU cores for: the rest would only wait."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if wanted > cores:
        log.info("reading data in %d processes instead of %d: there are no more CPU cores", cores, wanted)
    return min(wanted, cores)


class SharedFailure(Callback):
    """Leaves the message of an error of the user's where the other processes of the training find it.

    They only see their peer go, or nothing at all.

    Args:
        folder: the run folder.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / ".failure"

    def clear(self) -> None:
        """Forget an earlier failure."""
        with suppress(OSError):
            self.file.unlink(missing_ok=True)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the message; the first one counts."""
        if trainer.world_size > 1 and isinstance(exception, GeoExploraError) and self.message() is None:
            with suppress(RunError):  # a full disk: each process then speaks for itself
                write_text(self.file, user_message(exception))

    def message(self) -> str | None:
        """What a process of this training left."""
        try:
            return self.file.read_text(encoding="utf-8")
        except OSError:
            return None


class KeepSigterm(Callback):
    """Keeps what SIGTERM does to this process as it was before the training.

    Lightning's own handler ends the program at the next step with exit status 0, as if the training were done, and
    starts a collective from wherever the process is, which can hang. Goes before the trainer's other callbacks.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remember the handler: Lightning's is not there yet."""
        self._handler = signal.getsignal(signal.SIGTERM)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put it back."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._handler)


def fit(trainer: Trainer, failure: SharedFailure, *args: Any, **kwargs: Any) -> None:
    """``trainer.fit`` whose errors are the same in every process.

    The first process reports an error of the user's, whichever process met it; the others end in silence. If a signal
    stops the first one, the others end as well.

    Args:
        trainer: the trainer.
        failure: one of its callbacks.
        args: for ``trainer.fit``.
        kwargs: for ``trainer.fit``.

    Raises:
        GeoExploraError: if a process met one.
    """
    leads, parent = process_rank() == 0, os.getppid()
    try:
        trainer.fit(*args, **kwargs)
    except SystemExit:  # stopped by a signal
        if leads:
            _end_others(trainer)
        elif trainer.world_size > 1:
            _wait_for_first(parent)
        raise
    except Exception as problem:
        if leads:
            _end_others(trainer)
        if trainer.world_size == 1:
            raise
        message = failure.message() or message_in_traceback(str(problem))  # the second if processes were forked
        if message is None:
            raise
        if leads:
            failure.clear()
            raise problem if isinstance(problem, GeoExploraError) else RunError(message) from None
        _wait_for_first(parent)
        raise


def _end_others(trainer: Trainer) -> None:
    launcher: Any = trainer.strategy.launcher
    if launcher is not None:
        launcher.kill(signal.SIGKILL)  # they may hang in a collective, where no other signal reaches them


def _wait_for_first(parent: int) -> None:
    """Give the first process time to report and end; its launcher would kill it as soon as this one ended."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # wakes peers that wait for this process
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if os.getppid() != parent:
            raise SystemExit(2)
        time.sleep(0.05)
