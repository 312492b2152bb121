"""The best weights of a fine-tuning, in files by step: kept, put back, removed as soon as no checkpoint knows them.

Several are kept, because a checkpoint may be older than the last validation: a run that is resumed from it goes on from
the best weights of then.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from geoexplora.errors import RunError
from geoexplora.runs.folder import RunFolder
from geoexplora.tasks.finetune.task import FineTuneTask
from geoexplora.weights.atomic import atomic_path

_UNREADABLE = (OSError, RuntimeError, EOFError, ValueError, LookupError, TypeError, UnpicklingError)
"""What reading a damaged file raises."""


def save_best(path: Path, task: FineTuneTask, step: int, score: float) -> None:
    """Keep what is trained, and the statistics of the head's norms.

    Args:
        path: the file to write, whole or not at all.
        task: the task.
        step: optimizer steps done.
        score: the monitored metric.

    Raises:
        RunError: if it cannot be written.
    """
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        torch.save({"tensors": _changing(task), "step": step, "score": score}, file)


def load_best(path: Path, task: FineTuneTask) -> int:
    """Put the best weights back, in place.

    Returns:
        The optimizer step that they are of.

    Raises:
        RunError: if the file is missing or not of this task.
    """
    try:
        stored: Mapping[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        tensors = stored["tensors"]
    except _UNREADABLE as problem:
        raise RunError(f"cannot read the best weights {path}: {problem}", "Resume the run, or start anew.") from problem
    if tensors.keys() != _changing(task).keys():
        raise RunError(f"{path} holds the weights of another task", "Start the run anew with another --output.")
    task.load_state_dict(tensors, strict=False)
    return int(stored["step"])


@contextmanager
def best_weights(path: Path, task: FineTuneTask) -> Iterator[int]:
    """The best weights in the place of the current ones, which come back bit by bit.

    Yields:
        The optimizer step that they are of.

    Raises:
        RunError: if the file is missing or not of this task.
    """
    current = {name: value.to("cpu", copy=True) for name, value in _changing(task).items()}
    step = load_best(path, task)
    try:
        yield step
    finally:
        task.load_state_dict(current, strict=False)


def _changing(task: FineTuneTask) -> dict[str, Tensor]:
    """What training changes of a model, by name."""
    frozen = {name for name, parameter in task.named_parameters() if not parameter.requires_grad}
    return {
        name: value for name, value in task.state_dict().items() if name.startswith("model.") and name not in frozen
    }


def best_step(checkpoint: Path, state_key: str) -> int:
    """The step of the best weights that a checkpoint knows; 0 before there are any.

    Args:
        checkpoint: the file.
        state_key: where it holds the state of ``Validation``.

    Raises:
        RunError: if it cannot be read.
    """
    try:
        return int(torch.load(checkpoint, mmap=True, weights_only=True)["callbacks"][state_key]["best_step"])
    except _UNREADABLE as problem:
        raise RunError(f"cannot read {checkpoint}: {problem}", "Resume the run, or start anew.") from problem


def remove_outdated(folder: RunFolder, state_key: str) -> None:
    """Remove the best weights that neither the last checkpoint nor the one before knows.

    Args:
        folder: the run folder.
        state_key: where checkpoints hold the state of ``Validation``.
    """
    checkpoints = [path for path in (folder.last_checkpoint, folder.previous_checkpoint) if path.exists()]
    try:
        known = {folder.best_file(best_step(path, state_key)) for path in checkpoints}
    except RunError:  # what a damaged one knows cannot be told
        return
    for path in folder.checkpoints.glob("best-*.pt"):
        if path not in known:
            with suppress(OSError):
                path.unlink()
