"""How a setting is declared, and how the text of its value is read. Torch-free."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

type Tree = str | list[Tree] | dict[str, Tree] | None
"""A value before its type is known: the command line and YAML alike hold only texts, lists and mappings of texts."""


def setting[T](
    default: T,
    metavar: str | None = None,
    read: Callable[[Tree], Tree] | None = None,
    positional: bool = False,
    expects: str | None = None,
    known: Iterable[str] = (),
    required: bool = False,
) -> T:
    """Declare a field of an options dataclass.

    Args:
        default: the value if nothing sets the field.
        metavar: the placeholder in the help, naming the unit where there is one.
        read: turns a shorthand such as ``B2,B3`` into the list it stands for.
        positional: whether the command line takes it without a name.
        expects: what a message says is expected, where the type alone says too little.
        known: names to list in the help.
        required: whether the help says so; a check of the command enforces it.
    """
    metadata = {
        "metavar": metavar,
        "read": read,
        "positional": positional,
        "expects": expects,
        "known": known,
        "required": required,
    }
    return dataclasses.field(default=default, metadata=metadata)


def names(text: Tree) -> Tree:
    """``B2,B3`` -> a list of names."""
    return [part.strip() for part in text.split(",") if part.strip()] if isinstance(text, str) else text


def name_groups(text: Tree) -> Tree:
    """``B2,B3;B5`` -> a list of lists of names."""
    return [names(part) for part in text.split(";") if part.strip()] if isinstance(text, str) else text


def blocks(text: Tree) -> Tree:
    """``1,L`` -> a list of block numbers, where ``L`` and ``L-1`` count from the last block; ``none`` -> empty."""
    if text is None or is_null(text):
        return []
    return [str(part).strip().upper() for part in text.split(",")] if isinstance(text, str) else text


def interval(text: Tree) -> Tree:
    """``2000-2020`` or ``0.2,1`` -> a list of two values."""
    if not isinstance(text, str):
        return text
    return [part.strip() for part in text.replace("-", ",", 1 if "," not in text else 0).split(",")]


def class_weights(text: Tree) -> Tree:
    """``1,2.5,1`` -> a list of numbers; a word stays one."""
    return names(text) if isinstance(text, str) and "," in text else text


def path(text: Tree) -> Tree:
    """A path whose leading ``~`` means the user's home, in YAML as in a shell."""
    return str(Path(text).expanduser()) if isinstance(text, str) else text


def source(text: Tree) -> Tree:
    """Source weights: an address, shortcut or name as it stands, a path with its ``~`` resolved."""
    return text if isinstance(text, str) and "://" in text else path(text)


def is_null(value: Tree) -> bool:
    """Whether a value means "not set"."""
    return value is None or (isinstance(value, str) and value.strip().lower() in {"", "null", "none", "~"})


def plain(value: Any) -> Any:
    """A resolved value in types that YAML and JSON know: tuples become lists."""
    return [plain(item) for item in value] if isinstance(value, tuple | list) else value
