from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from geoexplora.cli import main as cli
from geoexplora.cli.command import Command


@dataclass
class Outcome:
    status: int
    out: str
    err: str
    options: Any = None


Run = Callable[..., Outcome]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run a command line in an empty folder; instead of the command's work, keep the options it was given."""
    monkeypatch.chdir(tmp_path)
    seen: list[Any] = []
    load = cli.load_command

    def load_without_work(name: str) -> Command:
        command = load(name)
        if name in {"pretrain", "probe", "finetune", "demo"}:
            fields = {name: getattr(command, name) for name in command.__dataclass_fields__}
            return Command(**fields | {"run": lambda options: seen.append(options) or 0})
        return command

    monkeypatch.setattr(cli, "load_command", load_without_work)

    def run_once(*argv: str) -> Outcome:
        seen.clear()
        capsys.readouterr()
        status = cli.main(argv)
        captured = capsys.readouterr()
        return Outcome(status, captured.out, captured.err, seen[0] if seen else None)

    return run_once
