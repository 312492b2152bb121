"""``geoexplora inspect``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from geoexplora.cli import checks
from geoexplora.cli.command import Command, Finding
from geoexplora.cli.options import Options
from geoexplora.cli.values import setting, source


@dataclass(frozen=True, kw_only=True)
class InspectOptions(Options):
    """What to show.

    Attributes:
        init: weights of any known format, a run folder, or an adapter.
        tensors: list every tensor with its shape and type.
        json: print JSON, for other programs.
    """

    init: str | None = setting(None, "FILE|RUN", source, positional=True)
    tensors: bool = False
    json: bool = False


def _named(options: InspectOptions) -> Iterator[Finding]:
    if options.init is None:
        yield Finding(("init",), "nothing to inspect. Name a weights file or a run folder.", "unready")
    else:
        yield from checks.positional_exists(options)


def run(options: InspectOptions) -> int:
    """Describe a weights file or a run."""
    from geoexplora.tasks.inspecting import describe

    description = describe(str(options.init), tensors=options.tensors)
    if options.json:
        sys.stdout.write(json.dumps(description, indent=2) + "\n")
    else:
        sys.stdout.write("\n".join(_lines(_readable(description))) + "\n")
    return 0


def _readable(entries: Mapping[str, Any]) -> dict[str, Any]:
    """What there is to say, and of tensors that had the same fate only the first and how many more."""
    from geoexplora.weights.report import grouped

    kept = {}
    for name, value in entries.items():
        if name in {"converted", "left_out", "kept", "resampled"} and isinstance(value, Mapping):
            value = grouped(value)
        elif isinstance(value, Mapping) and not _is_tensor(value):
            value = _readable(value)
        if value is not None and value not in ("", [], {}):
            kept[name] = value
    return kept


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
    description=(
        "Say what a weights file, a run folder or an adapter holds: format, architecture, bands, normalization,\n"
        "source, what was trained, sizes."
    ),
    usage="FILE|RUN [--tensors] [--json]",
    options=InspectOptions,
    run=run,
    checks={_named: ("init",)},
    examples=(
        "inspect runs/a",
        "inspect mae_pretrain_vit_large.pth --tensors",
        "inspect runs/a/adapter --json",
        "inspect dinov2-vitl14",
    ),
)
