"""Recipes: all resolve, all say what a recipe must say, and the command lists, shows and copies them."""

from __future__ import annotations

from pathlib import Path

import pytest

from geoexplora.cli.recipe_files import recipe_file, recipe_folder, recipe_header, recipe_names
from geoexplora.registry import DATASETS


def test_every_dataset_has_its_recipe():
    recipes = {f"pretrain/{'torchgeo' if entry.is_torchgeo else name}" for name, entry in DATASETS.items()}
    assert recipes <= set(recipe_names())


OWN = [name for name in recipe_names() if not name.startswith("torchgeo/")]
"""Recipes of this command line; the others are for TorchGeo's."""


@pytest.mark.parametrize("name", OWN)
def test_recipe_resolves(run, name):
    command, words = name.partition("/")[0], ("--config", name, "--root", "data", "--output", "runs/a")
    got = run(command, *words, *(() if command == "pretrain" else ("--init", "dinov2-vitb14")))
    assert got.status == 0, got.err
    assert got.options.output == "runs/a"


def header_command(name):
    """The words of the first command line in a header; its further lines are indented more."""
    lines = recipe_file(name).read_text().splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("# Command:"))
    words = lines[first].removeprefix("# Command:").split()
    for line in lines[first + 1 :]:
        if not line.startswith("#             "):
            break
        words += line.lstrip("#").split()
    return words


@pytest.mark.parametrize("name", [name for name in OWN if not name.startswith("pretrain/demo-")])
def test_the_command_in_the_header_gives_the_recipe(run, name):
    program, command, *words = header_command(name)
    assert (program, command) == ("geoexplora", name.partition("/")[0])
    if "--init" in words:  # no such run or file here
        Path(words[words.index("--init") + 1]).mkdir(parents=True)
    said = {word.removeprefix("--").replace("-", "_") for word in words if word.startswith("--")}
    got = run(command, *words)
    assert got.status == 0, got.err
    recipe = run(command, "--config", name, "--root", "data", "--output", "b", "--init", got.options.init or "none")
    differing = {key for key, value in vars(got.options).items() if value != getattr(recipe.options, key)}
    assert differing <= said | {"root", "output"}


@pytest.mark.parametrize("name", recipe_names())
def test_recipe_says_command_hardware_expectation_and_source(name):
    header = "\n".join(recipe_header(name))
    for word in ("Command:", "Hardware:", "Expected:", "Source:"):
        assert word in header, f"{name} does not state its {word}"
    assert header.splitlines()[0].endswith("."), "the first line is what `recipes list` shows"


def test_the_sentinel_recipe_is_the_papers(run):
    options = run("pretrain", "--dataset", "fmow-sentinel", "--root", "d", "--output", "o").options
    assert (options.model, options.whole_blocks, options.rank, options.weight_decay) == ("vit_large", (1, "L"), 32, 0)
    assert (options.decoder_width, options.decoder_depth, options.decoder_heads) == (512, 8, 16)
    assert (options.image_size, options.patch_size, options.mask_ratio, options.mask) == (96, 8, 0.75, "independent")


def test_list(run):
    got = run("recipes")
    assert got.status == 0
    assert [line.split()[0] for line in got.out.splitlines()] == recipe_names()


def test_recipes_for_torchgeos_command_line_say_so(run):
    name = "torchgeo/dinov2-resisc45"
    assert "torchgeo fit --config FILE" in run("recipes", "--help").out
    assert "torchgeo fit --config" in run("recipes", "show", name).out
    assert run("recipes", "copy", name, "mine.yaml").out.endswith("Use it: torchgeo fit --config mine.yaml\n")
    refused = run("pretrain", "--config", name, "--root", "data", "--output", "runs/a")
    assert refused.status == 2
    assert "is a recipe for TorchGeo's command line" in refused.err
    assert f"geoexplora recipes copy {name} FILE" in refused.err


def test_show(run):
    name = "pretrain/fmow-sentinel"
    expected = recipe_file(name).read_text()
    assert run("recipes", "show", name).out == expected
    assert run("recipes", "show", f"{name}.yaml").out == expected


def test_copy(run):
    name = "pretrain/fmow-sentinel"
    assert run("recipes", "copy", name, "mine.yaml").status == 0
    assert Path("mine.yaml").read_text() == recipe_file(name).read_text()
    assert run("recipes", "copy", name, "folder/").status == 0
    assert Path("folder/fmow-sentinel.yaml").is_file()
    refused = run("recipes", "copy", name, "mine.yaml")
    assert refused.status == 2
    assert "--force" in refused.err
    assert run("recipes", "copy", name, "mine.yaml", "--force").status == 0


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("show", "pretrain/fmow-sentine"), "Did you mean pretrain/fmow-sentinel"),
        (("show",), "needs a name"),
        (("shw", "x"), "Did you mean show?"),
        (("list", "x"), "takes no name"),
        (("show", "a", "b", "c"), "unexpected argument 'c'"),
    ],
)
def test_bad_input(run, words, text):
    got = run("recipes", *words)
    assert got.status == 2
    assert text in got.err


def test_recipes_lie_where_the_package_finds_them():
    assert recipe_folder().is_dir()
