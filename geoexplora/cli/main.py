"""The command line: ``geoexplora COMMAND``. Starts without torch; a command imports what it needs when it runs.

Exit status: 0 done, 2 the user's input is wrong, 1 anything else, 130 interrupted (Ctrl-C), 143 stopped by SIGTERM.
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
from geoexplora.cli.stopping import INTERRUPTED, TERMINATED, Terminated, sigterm_raises, way_on
from geoexplora.errors import GeoExploraError, user_message

if TYPE_CHECKING:
    from geoexplora.cli.command import Command
    from geoexplora.cli.resolve import Request

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
    output = None
    try:
        with _log_to_stderr(), sigterm_raises():
            command, request = _resolve(name, rest)
            output = getattr(request.options, "output", None)
            return _run(command, request)
    except GeoExploraError as problem:
        return _fail(name, user_message(problem))
    except KeyboardInterrupt:
        return _stopped(name, output, INTERRUPTED)
    except Terminated:
        return _stopped(name, output, TERMINATED)
    except SystemExit as problem:
        if isinstance(problem.__context__, KeyboardInterrupt):  # Lightning turns the one into the other
            return _stopped(name, output, INTERRUPTED)
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


def _resolve(name: str, words: Sequence[str]) -> tuple[Command, Request]:
    from geoexplora.cli.resolve import resolve

    command = load_command(name)
    return command, resolve(command, words)


def _run(command: Command, request: Request) -> int:
    from geoexplora.cli.resolve import to_yaml

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


def _stopped(command: str, output: str | None, status: int) -> int:
    """Say by what, and how to go on; of several processes only the first speaks."""
    if is_first_process():
        # A terminal shows ^C where Ctrl-C was typed: the message begins a new line.
        what = "stopped by SIGTERM" if status == TERMINATED else "interrupted"
        start = f"{PROGRAM} {command}"
        hint = f" {way_on(start, output)}" if command in RESUMABLE and output else ""
        newline = "\n" if status == INTERRUPTED else ""
        sys.stderr.write(f"{newline}{start}: {what}.{hint}\n")
    return status


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
