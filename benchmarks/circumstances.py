"""What a benchmark must state beside its numbers: machine, versions, commit, command."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def circumstances(packages: tuple[str, ...]) -> dict[str, Any]:
    """Machine, commit, command and versions.

    Args:
        packages: whose versions to state.
    """
    return {
        "machine": machine(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages},
        "commit": _git("rev-parse", "HEAD") + ("-dirty" if _git("status", "--porcelain", "-uno") else ""),
        "command": shlex.join(["python", *sys.argv]),
    }


def machine() -> str:
    """The GPU's name, or the processor's with the extensions that matter for matrix products."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = facts.get("flags", "").split()
    known = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]
    return f"{facts.get('model name', platform.processor())} ({', '.join(known)})"


def _git(*words: str) -> str:
    answer = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return answer.stdout.strip()
