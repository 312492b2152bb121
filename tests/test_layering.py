"""Imports run one way: cli -> tasks, inference -> objectives, ... -> models, ... -> registry, bands, errors."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import geoexplora

PACKAGE = Path(geoexplora.__file__).parent

LEVELS = (
    {"registry", "torchgeo_facts", "bands", "errors", "timm_hook"},
    {"models", "weights", "datasets", "transforms"},
    {"objectives", "explora", "datamodules", "runs"},
    {"tasks", "inference"},
    {"cli"},
)
LEVEL = {part: number for number, parts in enumerate(LEVELS) for part in parts}

# The package itself holds the version, and `python -m geoexplora` is the command line.
OUTSIDE = {"__init__", "__main__"}


def _part(module: str) -> str:
    """``geoexplora.cli.main`` -> ``cli``."""
    return [*module.split("."), "__init__"][1]


def _imports(file: Path) -> Iterator[tuple[int, str]]:
    """Line and module of everything of the package that a file imports, wherever in the file it stands."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name.split(".")[0] == "geoexplora")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: import by the full name"
            if node.module == "geoexplora":
                yield from ((node.lineno, f"geoexplora.{alias.name}") for alias in node.names)
            elif (node.module or "").startswith("geoexplora."):
                yield node.lineno, str(node.module)


def _edges() -> Iterator[tuple[str, str, str]]:
    """Importing part, imported part, and where."""
    for file in sorted(PACKAGE.rglob("*.py")):
        source = file.relative_to(PACKAGE).with_suffix("").parts[0]
        for line, module in _imports(file):
            target = _part(module)
            if source not in OUTSIDE and source != target and target in LEVEL:
                yield source, target, f"{file.relative_to(PACKAGE.parent)}:{line}"


def test_every_part_has_its_level():
    parts = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert parts - OUTSIDE <= LEVEL.keys()


def test_imports_run_one_way():
    wrong = [f"{at}: {source} imports {target}" for source, target, at in _edges() if LEVEL[target] > LEVEL[source]]
    assert not wrong, "\n".join(wrong)


def test_siblings_do_not_import_each_other_in_circles():
    graph: dict[str, set[str]] = {}
    for source, target, _ in _edges():
        graph.setdefault(source, set()).add(target)
    TopologicalSorter(graph).prepare()


def test_data_knows_nothing_of_objectives():
    wrong = [at for source, target, at in _edges() if source == "datamodules" and target in {"objectives", "explora"}]
    assert not wrong, "\n".join(wrong)
