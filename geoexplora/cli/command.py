"""What a command is: its options, its help, and the function that does the work."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

from geoexplora.cli.options import Options


@dataclass(frozen=True)
class Finding:
    """Something about a combination of settings.

    Attributes:
        keys: the settings it is about, the one to change first.
        text: what is wrong and what to do.
        kind: ``error`` stops the command; ``unready``, such as a required setting that is missing, stops it unless it
            only prints its settings; ``warning`` does not stop it.
    """

    keys: tuple[str, ...]
    text: str
    kind: str = "error"


Check = Callable[[Any], Iterable[Finding]]


@dataclass(frozen=True)
class Command:
    """One command of the command line.

    Attributes:
        name: as typed.
        description: what ``--help`` says first.
        usage: the command line in short.
        options: dataclass of its options.
        run: does the work; returns the exit status.
        checks: functions over the settings, each with the names of the settings it reads.
        configurable: whether it takes ``--config`` and ``--print-config``.
        examples: command lines for the help.
    """

    name: str
    description: str
    usage: str
    options: type[Options]
    run: Callable[[Any], int]
    checks: Mapping[Check, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    configurable: bool = False
    examples: tuple[str, ...] = ()

    @property
    def fields(self) -> dict[str, dataclasses.Field[Any]]:
        """The options' fields by name."""
        return {field.name: field for field in dataclasses.fields(self.options)}

    @property
    def groups(self) -> dict[type[Options], tuple[str, ...]]:
        """The options of each dataclass that the options inherit from, in order; a class may give another default."""
        bases = [base for base in reversed(self.options.__mro__) if issubclass(base, Options)]
        groups: dict[type[Options], tuple[str, ...]] = {}
        for base in bases:
            names = tuple(name for name in inspect.get_annotations(base) if name not in chain(*groups.values()))
            if names:
                groups[base] = names
        return groups
