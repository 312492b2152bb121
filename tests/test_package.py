"""What the package exposes, and that a wheel holds what it needs."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import geoexplora
from geoexplora.cli.recipe_files import recipe_names

REPOSITORY = Path(__file__).parents[1]


def test_every_exposed_name_is_there():
    assert {name for names in geoexplora._HOMES.values() for name in names} == set(geoexplora.__all__)
    for name in geoexplora.__all__:
        assert getattr(geoexplora, name).__name__ == name
    assert set(geoexplora.__all__) <= set(dir(geoexplora))
    with pytest.raises(AttributeError, match="nothing"):
        _ = geoexplora.nothing


def test_wheel_holds_all_modules_recipes_and_sample(tmp_path):
    """Built without isolation, so that it needs no package index."""
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(REPOSITORY)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {f"geoexplora/recipes/{name}.yaml" for name in recipe_names()} <= set(names)
    assert any(name.startswith("geoexplora/sample/") and name.endswith(".jp2") for name in names)
    assert "geoexplora/py.typed" in names
    modules = {file.relative_to(REPOSITORY).as_posix() for file in (REPOSITORY / "geoexplora").rglob("*.py")}
    assert modules <= set(names), f"not in the wheel: {sorted(modules - set(names))}"
