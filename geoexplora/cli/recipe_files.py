"""The recipes that ship with the package, and configuration files. Torch-free."""

from __future__ import annotations

from pathlib import Path

import geoexplora
from geoexplora.bands import nearest
from geoexplora.errors import ConfigError

TORCHGEO = "torchgeo"
"""The folder of recipes for TorchGeo's own command line."""


def recipe_folder() -> Path:
    """Where the recipes lie: inside an installed package, beside it in a working tree."""
    package = Path(geoexplora.__file__).parent
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def recipe_names() -> list[str]:
    """Names of all recipes, such as ``pretrain/fmow-sentinel``."""
    folder = recipe_folder()
    return sorted(file.relative_to(folder).with_suffix("").as_posix() for file in folder.rglob("*.yaml"))


def recipe_file(name: str) -> Path:
    """The file of a recipe.

    Raises:
        ConfigError: if there is no such recipe; names the nearest ones.
    """
    short = name.removesuffix(".yaml")
    known = recipe_names()
    if short not in known:
        raise ConfigError(f"unknown recipe {name!r}", f"{nearest(short, known)}Known: {', '.join(known) or 'none'}.")
    return recipe_folder() / f"{short}.yaml"


def recipe_command(name: str) -> str:
    """The command that a recipe is for."""
    folder = name.split("/")[0]
    return "torchgeo fit" if folder == TORCHGEO else f"geoexplora {folder}"


def recipe_header(name: str) -> list[str]:
    """The comment lines at the head of a recipe, without their ``#``."""
    lines = []
    for line in recipe_file(name).read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("#").strip())
    return lines


def read_config(name: str) -> tuple[str, str]:
    """The text of a configuration file or, where there is no such file, of a recipe; and what to call it.

    Raises:
        ConfigError: if it is neither, or cannot be read.
    """
    file, label = Path(name).expanduser(), name
    if not file.is_file():
        if file.is_dir():
            raise ConfigError(f"--config {name} is a folder", f"Name a YAML file, such as {name}/config.yaml.")
        known = recipe_names()
        if name.removesuffix(".yaml") not in known:
            raise ConfigError(
                f"--config {name}: no such file, and no recipe of that name",
                nearest(name, known) or f"Recipes: {', '.join(known) or 'none'}.",
            )
        file, label = recipe_file(name), f"recipe {name.removesuffix('.yaml')}"
        if label.startswith(f"recipe {TORCHGEO}/"):
            raise ConfigError(
                f"--config {name} is a recipe for TorchGeo's command line",
                f"Copy it: geoexplora recipes copy {name} FILE; then: torchgeo fit --config FILE.",
            )
    try:
        return file.read_text(encoding="utf-8"), label
    except UnicodeDecodeError as problem:
        raise ConfigError(f"--config {name} is not a text file in UTF-8", "Name a YAML file.") from problem
    except OSError as problem:
        raise ConfigError(f"--config {name} cannot be read: {problem.strerror}", "Name a readable file.") from problem
