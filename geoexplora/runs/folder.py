"""The run folder: where everything of a run lies, who may write to it, its configuration and its record."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import platform
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml

from geoexplora.errors import RunError
from geoexplora.runs.lock import FolderLock
from geoexplora.weights.atomic import remove_leftovers, write_failure, write_text

log = logging.getLogger(__name__)

RECORDED_PACKAGES = (
    "geoexplora",
    "torch",
    "torchvision",
    "timm",
    "peft",
    "lightning",
    "torchgeo",
    "kornia",
    "rasterio",
)
"""Packages whose versions a run records."""


class RunFolder:
    """A run folder (``--output``): complete after every checkpoint and resumable.

    ``create`` starts a run, ``open`` goes on with one; both lock the folder until ``close``. Reading needs neither.
    In distributed training only the process of rank zero creates, opens and writes.

    Args:
        path: the folder. Nothing is touched yet.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config_file = self.path / "config.yaml"
        self.run_file = self.path / "run.json"
        self.metrics_file = self.path / "metrics.csv"
        self.checkpoints = self.path / "checkpoints"
        self.last_checkpoint = self.checkpoints / "last.ckpt"
        self.previous_checkpoint = self.checkpoints / "previous.ckpt"
        self.encoder_file = self.path / "encoder.safetensors"
        self.decoder_file = self.path / "decoder.safetensors"
        self.heads_file = self.path / "heads.safetensors"
        self.task_head_file = self.path / "task_head.safetensors"
        self.predictions_file = self.path / "predictions.csv"
        self.adapter = self.path / "adapter"
        self.plots = self.path / "plots"
        self.loss_plot = self.plots / "loss.png"
        self.health_plot = self.plots / "health.png"
        self.reconstruction_plot = self.plots / "reconstruction.png"
        self.features_plot = self.plots / "features.png"
        self.predictions_plot = self.plots / "predictions.png"
        self.confusion_plot = self.plots / "confusion.png"
        self.features_before = self.plots / "features-before.npz"
        self._lock = FolderLock(self.path)

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r})"

    def best_file(self, step: int) -> Path:
        """Where the weights of a step are kept that was the best one of a fine-tuning."""
        return self.checkpoints / f"best-{step}.pt"

    @property
    def holds_run(self) -> bool:
        """Whether a run was started here, however far it came."""
        files = (self.config_file, self.run_file, self.metrics_file, self.encoder_file)
        return any(file.exists() for file in (*files, self.last_checkpoint, self.previous_checkpoint))

    def create(self) -> Self:
        """Make the folder for a new run and lock it.

        Raises:
            RunError: if it already holds a run, cannot be written to, or another process is using it.
        """
        self._acquire(resumable=False)
        if self.holds_run:
            self.close()
            raise RunError(
                f"{self.path} already holds a run",
                "Go on with it by --resume, or name another folder with --output.",
            )
        self._prepare(resumable=False)
        return self

    def open(self) -> Self:
        """Lock a folder that holds a run, to go on with it, and clear what a killed process left half written.

        Raises:
            RunError: if there is no run, the folder cannot be written to, or another process is using it.
        """
        if not self.holds_run:
            raise RunError(
                f"{self.path} holds no run to resume",
                "Check the path: a run folder has config.yaml and checkpoints/. Leave out --resume to start a new run.",
            )
        self._acquire(resumable=True)
        self._prepare(resumable=True)
        return self

    def close(self) -> None:
        """Unlock the folder. Harmless if it is not locked."""
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _acquire(self, *, resumable: bool) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except OSError as problem:
            raise write_failure(self.path, problem, resumable=resumable) from problem

    def _prepare(self, *, resumable: bool) -> None:
        try:
            for folder in (self.checkpoints, self.plots):
                folder.mkdir(exist_ok=True)
        except OSError as problem:
            self.close()
            raise write_failure(self.path, problem, resumable=resumable) from problem
        for folder in (self.path, self.checkpoints, self.plots, self.adapter):
            for left in remove_leftovers(folder):
                log.info("removed %s, left half written by a run that was stopped", left)

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Write config.yaml: the resolved configuration, which repeats the run when fed back.

        Args:
            config: plain YAML types; the order is kept.

        Raises:
            RunError: if it cannot be written.
        """
        write_text(self.config_file, yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True, width=120))

    def read_config(self) -> dict[str, Any]:
        """Read config.yaml.

        Raises:
            RunError: if it is missing or unreadable.
        """
        try:
            config = yaml.safe_load(self.config_file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as problem:
            raise RunError(
                f"cannot read {self.config_file}: {problem}",
                "The configuration of a run is needed to go on with it: restore the file or start a new run.",
            ) from problem
        if not isinstance(config, dict):
            raise RunError(f"{self.config_file} holds no settings", "Restore the file or start a new run.")
        return config

    def update_run_json(self, **sections: Any) -> None:
        """Put sections into run.json, replacing those of the same name and keeping the others.

        Every call also records the versions of Python and the main packages, and the git commit if there is one, as
        they were at this process's first call.

        Args:
            sections: plain JSON values, such as ``source``, ``bands``, ``parameters``, ``metrics``.

        Raises:
            RunError: if it cannot be written, or the existing one cannot be read.
        """
        record = self.read_run_json() if self.run_file.exists() else {}
        record = {"environment": None} | record | sections | {"environment": _environment()}
        write_text(self.run_file, json.dumps(record, indent=2, ensure_ascii=False) + "\n")

    def read_run_json(self) -> dict[str, Any]:
        """Read run.json.

        Raises:
            RunError: if it is missing or unreadable.
        """
        try:
            record = json.loads(self.run_file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as problem:
            raise RunError(
                f"cannot read {self.run_file}: {problem}", "Remove it and resume the run: it is then written anew."
            ) from problem
        return dict(record)


@cache  # asks git, which is slow in large working copies, and this is called at every checkpoint
def _environment() -> dict[str, Any]:
    versions: dict[str, str] = {}
    for package in RECORDED_PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
        "commit": _commit(),
    }


def _commit() -> str | None:
    """The git commit of the working copy that this package runs from, ``-dirty`` if changed; None if installed."""
    here = Path(__file__).resolve().parent
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def git(*arguments: str) -> str | None:
        try:
            answer = subprocess.run(
                ["git", *arguments], cwd=here, env=environment, capture_output=True, text=True, timeout=10, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return answer.stdout.strip()

    # An installed package may lie in a virtual environment inside somebody's repository: only tracked files count.
    if not git("ls-files", "--error-unmatch", Path(__file__).name):
        return None
    commit = git("rev-parse", "HEAD")
    return f"{commit}-dirty" if commit and git("status", "--porcelain", "--untracked-files=no") else commit
