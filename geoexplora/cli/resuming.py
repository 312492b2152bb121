"""Resuming: the settings come from the run's own config.yaml, and few of them may change. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from geoexplora.cli.layers import option
from geoexplora.cli.parser import show
from geoexplora.errors import RunError

FREE = frozenset(
    {
        "accelerator",
        "checkpoint_every",
        "grad_checkpointing",
        "init",  # the checkpoint holds the weights; the file may have moved
        "log_every",
        "max_unreadable",
        "num_workers",
        "output",  # the folder may have moved
        "probe_every",
        "resume",
        "root",  # the data may have moved
        "strategy",
    }
)
"""Settings that a resumed run may change: they say where and how fast, not what is computed."""

LENGTH = ("epochs", "max_steps")
"""Settings that a resumed run may only raise."""


@dataclass(frozen=True)
class SavedConfig:
    """The configuration of a run as it lies on disk."""

    text: str
    label: str


def saved_config(folder: str, command: str) -> SavedConfig | None:
    """The configuration of the run in a folder, or ``None`` if no run was started there.

    Args:
        folder: the run folder.
        command: the command that is to go on with it.

    Raises:
        RunError: if it is there but cannot be read, or is a run of another command.
    """
    from geoexplora.runs.folder import RunFolder  # only resuming needs it

    run = RunFolder(folder)
    made_by = run.read_run_json().get("command", command) if run.run_file.is_file() else command
    if made_by != command:
        raise RunError(
            f"{folder} is a run of geoexplora {made_by}",
            f"Go on with it by geoexplora {made_by} --resume {folder}, or start from its weights: --init {folder}.",
        )
    file = run.config_file
    try:
        return SavedConfig(file.read_text(encoding="utf-8"), str(file))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError) as problem:
        raise RunError(
            f"cannot read {file}: {problem}",
            "The configuration of a run is needed to go on with it: restore the file or start a new run.",
        ) from problem


def compare(saved: Mapping[str, Any], asked: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """What a resumed run asks to change.

    Args:
        saved: the run's settings.
        asked: the settings asked for now.

    Returns:
        Problems, for settings that would change the result, and warnings, for those that may change but matter.
    """
    problems, warnings = [], []
    for name, value in asked.items():
        before = saved[name]
        if name in FREE or value == before:
            continue
        if name in LENGTH and before is not None and (value is None or value > before):
            warnings.append(
                f"{option(name)} goes from {show(before)} to {show(value)}: the learning rate follows a cosine over the"
                " new length from here on, so the result differs from a run that had this length from the start"
            )
        else:
            problems.append(
                f"{option(name)} {show(value)} differs from the run's {show(before)}. A resumed run keeps what decides"
                " its result: leave the option out, or start a new run with another --output"
                " (--init RUN starts from this run's weights)."
            )
    return problems, warnings
