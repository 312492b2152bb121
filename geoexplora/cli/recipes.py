"""``geoexplora recipes``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from geoexplora.cli.command import Command, Finding
from geoexplora.cli.options import Options
from geoexplora.cli.recipe_files import recipe_command, recipe_file, recipe_header, recipe_names
from geoexplora.cli.values import path, setting
from geoexplora.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class RecipesOptions(Options):
    """What to do.

    Attributes:
        action: list all recipes, show one, or copy one to edit it.
        name: the recipe, such as pretrain/fmow-sentinel.
        destination: file ending in .yaml, or folder (default: the current folder).
        force: overwrite the destination.
    """

    action: Literal["list", "show", "copy"] = setting("list", "list|show|copy", positional=True)
    name: str | None = setting(None, "NAME", positional=True)
    destination: str | None = setting(None, "DESTINATION", path, positional=True)
    force: bool = False


def _name(options: RecipesOptions) -> Iterator[Finding]:
    if options.action != "list" and options.name is None:
        text = f"recipes {options.action} needs a name. Known: {', '.join(recipe_names())}."
        yield Finding(("name",), text, "unready")


def run(options: RecipesOptions) -> int:
    """List, show or copy recipes."""
    if options.name is None:
        _list()
    elif options.action == "show":
        sys.stdout.write(recipe_file(options.name).read_text(encoding="utf-8"))
    elif options.action == "copy":
        _copy(options.name, options.destination or ".", options.force)
    else:
        raise ConfigError(f"recipes list takes no name, but got {options.name!r}", "Show one: recipes show NAME.")
    return 0


def _list() -> None:
    names = recipe_names()
    width = max(map(len, names), default=0)
    lines = [f"{name:<{width}}  {(recipe_header(name) or [''])[0]}".rstrip() for name in names]
    sys.stdout.write("\n".join(lines) + "\n")


def _copy(name: str, destination: str, force: bool) -> None:
    source, target = recipe_file(name), Path(destination)
    if target.is_dir() or target.suffix not in {".yaml", ".yml"}:
        target = target / source.name
    if target.exists() and not force:
        raise ConfigError(f"{target} exists", "Name another destination, or overwrite it by --force.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    except OSError as problem:
        raise ConfigError(f"cannot write {target}: {problem.strerror}", "Name a place you may write to.") from problem
    sys.stdout.write(f"Copied to {target}. Use it: {recipe_command(name)} --config {target}\n")


COMMAND = Command(
    name="recipes",
    description="Recipes are YAML files of settings. pretrain --dataset NAME starts from recipe pretrain/NAME. Those "
    "in torchgeo/ are for TorchGeo's command line: torchgeo fit --config FILE.",
    usage="list | show NAME | copy NAME [DESTINATION]",
    options=RecipesOptions,
    run=run,
    checks={_name: ("action", "name")},
    examples=(
        "recipes list",
        "recipes show pretrain/fmow-sentinel",
        "recipes copy pretrain/fmow-sentinel mine.yaml",
    ),
)
