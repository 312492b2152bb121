"""Errors caused by the user's input: each says what is wrong and what to do about it."""

from __future__ import annotations

import re


class GeoExploraError(Exception):
    """The user's input is wrong; the command line answers with exit status 2.

    Args:
        problem: what is wrong, naming the file, option or value.
        remedy: what to do about it.
    """

    def __init__(self, problem: str, remedy: str = "") -> None:
        super().__init__(f"{problem}\n{remedy}" if remedy else problem)


class ConfigError(GeoExploraError):
    """An option, recipe or combination of settings is wrong."""


class DataError(GeoExploraError):
    """A dataset is missing, incomplete or not what it claims to be."""


class SplitNotFoundError(DataError):
    """None of the files of a dataset's split is there, although the dataset is said to have that split."""


class WeightsError(GeoExploraError):
    """A weights file cannot be used as asked."""


class RunError(GeoExploraError):
    """A run folder cannot be written, read or resumed."""


def user_message(error: GeoExploraError) -> str:
    """The message for the user, without the traceback that a DataLoader's worker wraps it in.

    Args:
        error: an error as raised here, or as PyTorch raises it again after a worker met it.

    Returns:
        Problem and remedy.
    """
    text = str(error)
    if not re.match(r"Caught \w+ in DataLoader worker process \d+\.", text):
        return text
    # The last line of a chain of tracebacks names the error that reached the loader; its message follows.
    return re.split(rf"^[\w.]*\b{type(error).__name__}: ", text, flags=re.MULTILINE)[-1].strip()


def message_in_traceback(text: str) -> str | None:
    """The message of an error of this module that ended another process.

    Args:
        text: that process's traceback, as text.

    Returns:
        Problem and remedy; ``None`` if it ended by another error.
    """
    *before, message = re.split(rf"^{re.escape(__name__)}\.\w+: ", text, flags=re.MULTILINE)
    return message.strip() if before and "Traceback (most recent call last)" not in message else None
