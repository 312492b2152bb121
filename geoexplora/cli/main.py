"""The command line: ``geoexplora COMMAND``. Starts without torch; a command imports what it needs when it runs.

Exit status: 0 done, 2 the user's input is wrong, 1 anything else, 130 interrupted.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from geoexplora import __version__
from geoexplora.bands import nearest
from geoexplora.cli.processes import is_first_process
from geoexplora.errors import GeoExploraError, user_message

if TYPE_CHECKING:
    from geoexplora.cli.command import Command

log = logging.getLogger(__name__)

PROGRAM = "geoexplora"

COMMANDS = {
    "demo": "the whole path on a bundled Sentinel-2 scene: pre-train, probe, picture (minutes, CPU)",
    "pretrain": "extend pre-training to new imagery: ExPLoRA, all weights, or from scratch",
    "probe": "measure an encoder's features by kNN and a linear classifier",
    "finetune": "train an encoder on labels (classes, masks, values): by LoRA, AdaLoRA, DoRA, fully",
    "export": "write an encoder for timm, TorchGeo, transformers, SatMAE or onnxruntime",
    "inspect": "say what a weights file or a run folder is",
    "recipes": "list, show or copy the settings that ship with the package",
}
"""Commands and what they do; each lives in the module of its name."""

RESUMABLE = {"pretrain", "finetune"}

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the command line without the program's name; that of the process by default.

    Returns:
        The exit status.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in {"-h", "--help", "help"}:
        sys.stdout.write(overview())
        return 0 if words else 2
    if words[0] == "--version":
        sys.stdout.write(f"{PROGRAM} {__version__}\n")
        return 0
    name, rest = words[0], words[1:]
    if name not in COMMANDS:
        hint = nearest(name, COMMANDS)
        return _fail("", f"unknown command {name!r}\n{hint}Commands: {', '.join(COMMANDS)}.")
    try:
        with _log_to_stderr():
            return _run(load_command(name), rest)
    except GeoExploraError as problem:
        return _fail(name, user_message(problem))
    except KeyboardInterrupt:
        return _interrupted(name)
    except SystemExit as problem:
        if isinstance(problem.__context__, KeyboardInterrupt):  # Lightning turns the one into the other
            return _interrupted(name)
        raise
    except BrokenPipeError:
        # The reader of our output, such as `head`, has seen enough; nothing may be flushed into it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def overview() -> str:
    """What ``geoexplora --help`` shows."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {summary}" for name, summary in COMMANDS.items()]
    return "\n".join(
        [
            f"usage: {PROGRAM} COMMAND [options]",
            "",
            "ExPLoRA for TorchGeo: adapt pre-trained vision transformers to satellite imagery, training few weights.",
            "",
            "commands:",
            *lines,
            "",
            f"{PROGRAM} COMMAND --help explains a command. Start with: {PROGRAM} demo",
            "",
        ]
    )


def load_command(name: str) -> Command:
    """The command of that name."""
    command: Command = importlib.import_module(f"geoexplora.cli.{name}").COMMAND
    return command


def _run(command: Command, words: Sequence[str]) -> int:
    from geoexplora.cli.resolve import resolve, to_yaml

    request = resolve(command, words)
    if request.help:
        sys.stdout.write(request.parser.format_help(vars(request.options), PROGRAM))
        return 0
    if request.print_config:
        sys.stdout.write(to_yaml(request))
        return 0
    if is_first_process():
        for text in request.warnings:
            log.warning(text)
    status = command.run(request.options)
    sys.stdout.flush()
    return status


def _fail(command: str, message: str) -> int:
    name = f"{PROGRAM} {command}".rstrip()
    sys.stderr.write(f"{name}: {message}\n")
    return 2


def _interrupted(command: str) -> int:
    hint = f" Go on with: {PROGRAM} {command} --resume RUN" if command in RESUMABLE else ""
    sys.stderr.write(f"\n{PROGRAM} {command}: interrupted.{hint}\n")
    return INTERRUPTED


class _PlainLines(logging.Formatter):
    """Messages as they are; those that matter more say so."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return f"{record.levelname.lower()}: {text}" if record.levelno >= logging.WARNING else text


@contextmanager
def _log_to_stderr() -> Iterator[None]:
    """Show what the package logs as plain lines on standard error; of several processes only the first informs."""
    package = logging.getLogger("geoexplora")
    before = package.level, package.propagate
    handler = logging.StreamHandler()
    handler.setFormatter(_PlainLines())
    package.addHandler(handler)
    package.propagate = False
    package.setLevel(logging.INFO if is_first_process() else logging.WARNING)
    try:
        yield
    finally:
        package.removeHandler(handler)
        package.setLevel(before[0])
        package.propagate = before[1]
