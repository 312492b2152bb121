"""A command that is stopped from outside: by SIGTERM, or by the user's Ctrl-C. Torch-free."""

from __future__ import annotations

import shlex
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

INTERRUPTED = 128 + signal.SIGINT
TERMINATED = 128 + signal.SIGTERM


class Terminated(SystemExit):
    """SIGTERM came, such as at the end of a batch job. The exit status is what a shell gives a process that it ends."""

    def __init__(self) -> None:
        super().__init__(TERMINATED)


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """Let SIGTERM raise ``Terminated`` in the main thread, unless the process ignores or handles it already.

    What must be left in order is then left in order, as after Ctrl-C.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return

    def stop(*_: Any) -> NoReturn:
        raise Terminated

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def way_on(command: str, output: str | Path) -> str:
    """How to go on with a run that was stopped.

    Args:
        command: the command line up to the options, such as ``geoexplora pretrain``.
        output: the run folder.
    """
    from geoexplora.runs.folder import RunFolder

    folder, resume = RunFolder(output), f"{command} --resume {shlex.quote(str(output))}"
    if folder.last_checkpoint.exists() or folder.previous_checkpoint.exists():
        return f"Go on with: {resume}"
    if folder.config_file.exists():
        return f"There is no checkpoint yet. Start again with: {resume}"
    return "There is nothing to resume yet: start again."
