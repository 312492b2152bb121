"""``geoexplora inspect``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from geoexplora.cli.command import Command, Finding
from geoexplora.cli.options import Options
from geoexplora.cli.values import path, setting


@dataclass(frozen=True, kw_only=True)
class InspectOptions(Options):
    """What to show.

    Attributes:
        path: weights file or run folder.
        tensors: list every tensor with its shape and type.
        json: print JSON, for other programs.
    """

    path: str | None = setting(None, "FILE|RUN", path, positional=True)
    tensors: bool = False
    json: bool = False


def _file(options: InspectOptions) -> Iterator[Finding]:
    if options.path is None:
        yield Finding(("path",), "nothing to inspect. Name a weights file or a run folder.", "unready")
    elif not Path(options.path).exists():
        yield Finding(("path",), f"{options.path}: no such file or folder.")


def run(options: InspectOptions) -> int:
    """Describe a weights file or a run."""
    from geoexplora.weights.inspect import describe

    description = describe(str(options.path), tensors=options.tensors)
    if options.json:
        sys.stdout.write(json.dumps(description, indent=2) + "\n")
    else:
        sys.stdout.write("\n".join(_lines(description)) + "\n")
    return 0


def _lines(entries: Mapping[str, Any], indent: int = 0) -> Iterator[str]:
    """Aligned ``key  value`` lines; what a mapping holds is indented below its key."""
    margin, width = " " * indent, max((len(str(key)) for key in entries), default=0)
    for key, value in entries.items():
        if isinstance(value, list) and value and all(isinstance(row, Mapping) for row in value):
            value = dict(map(_row, value))
        if isinstance(value, Mapping) and value and not _is_tensor(value):
            yield f"{margin}{key}"
            yield from _lines(value, indent + 2)
        else:
            yield f"{margin}{key:<{width}}  {_text(value)}"


def _row(row: Mapping[str, Any]) -> tuple[str, str]:
    """A row of a table, such as that of the parameters: its first value, and the others with their names."""
    (_, title), *rest = row.items()
    return str(title), ", ".join(f"{name} {_text(value)}" for name, value in rest)


def _is_tensor(value: Mapping[str, Any]) -> bool:
    return value.keys() == {"shape", "dtype"}


def _text(value: Any) -> str:
    if value is None or (isinstance(value, list | Mapping) and not value):
        return "-"
    if isinstance(value, Mapping):
        return f"{value['dtype']}  {' x '.join(map(str, value['shape']))}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        nested = any(isinstance(item, list) for item in value)
        return ("; " if nested else ", ").join(map(_text, value))
    return str(value)


COMMAND = Command(
    name="inspect",
    description="Say what a weights file or a run folder holds: architecture, bands, normalization, source, sizes.",
    usage="FILE|RUN [--tensors] [--json]",
    options=InspectOptions,
    run=run,
    checks={_file: ("path",)},
    examples=("inspect runs/a", "inspect mae_pretrain_vit_large.pth --tensors"),
)
