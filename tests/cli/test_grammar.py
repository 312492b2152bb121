"""How a command line becomes options."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

FULL = ("pretrain", "--dataset", "fmow-sentinel", "--root", "data", "--output", "runs/a")
GROUPS = (("B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A"), ("B11", "B12"))


def test_the_command_of_the_design(run):
    got = run(*FULL, "--model", "vit_base", "--whole-blocks", "1,L", "--rank", "32")
    assert got.status == 0
    options = got.options
    assert (options.model, options.whole_blocks, options.rank) == ("vit_base", (1, "L"), 32)
    assert (options.root, options.output, options.resume) == ("data", "runs/a", False)


def test_dataset_picks_its_recipe(run):
    options = run(*FULL).options
    assert options.groups == (("B2", "B3", "B4", "B8"), ("B5", "B6", "B7", "B8A"), ("B11", "B12"))
    assert (options.model, options.precision, options.lr) == ("vit_large", "bf16", 4.5e-4)


def test_command_line_over_config_over_recipe(run):
    Path("my.yaml").write_text("rank: 4\nmask-ratio: 0.5\ndataset: fmow-sentinel\n")
    options = run("pretrain", "--config", "my.yaml", "--root", "d", "--output", "o", "--rank", "6").options
    assert (options.rank, options.mask_ratio, options.model) == (6, 0.5, "vit_large")


def test_later_config_over_earlier(run):
    Path("a.yaml").write_text("rank: 4\nseed: 1\n")
    Path("b.yaml").write_text("rank: 5\n")
    options = run(*FULL, "--config", "a.yaml", "--config=b.yaml").options
    assert (options.rank, options.seed) == (5, 1)


def test_config_takes_a_recipe_by_name(run):
    options = run("pretrain", "--config", "pretrain/fmow-sentinel-cpu", "--root", "d", "--output", "o").options
    assert (options.model, options.image_size) == ("vit_tiny", 96)


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (("--mask_ratio", "0.5"), "mask_ratio", 0.5),
        (("--mask-ratio=0.5",), "mask_ratio", 0.5),
        (("--lr", "1e-4"), "lr", 1e-4),
        (("--grad-checkpointing",), "grad_checkpointing", True),
        (("--grad-checkpointing", "--rank", "3"), "grad_checkpointing", True),
        (("--grad-checkpointing", "false"), "grad_checkpointing", False),
        (("--no-norm-pix-loss",), "norm_pix_loss", False),
        (("--norm-pix-loss=false",), "norm_pix_loss", False),
        (("--groups", "B2,B3,B4,B5,B6,B7,B8,B8A; B11,B12"), "groups", GROUPS),
        (("--groups", "none"), "groups", None),
        (("--bands", "none", "--groups", "none"), "bands", None),
        (("--bands", "B4, B3 ,B2", "--groups=none"), "bands", ("B4", "B3", "B2")),
        (("--whole-blocks", "none"), "whole_blocks", ()),
        (("--whole-blocks", "1,l-1,L"), "whole_blocks", (1, "L-1", "L")),
        (("--years", "2015-2018"), "years", (2015, 2018)),
        (("--years", "2015,2018"), "years", (2015, 2018)),
        (("--crop-scale", "0.5,1"), "crop_scale", (0.5, 1.0)),
        (("--alpha", "16"), "alpha", 16.0),
        (("--alpha", "none"), "alpha", None),
        (("--precision", "32"), "precision", "32"),
        (("--rank", "1", "--rank", "2"), "rank", 2),
        (("--rank", "0"), "rank", 0),
    ],
)  # fmt: skip
def test_spellings(run, words, name, value):
    got = run(*FULL, *words)
    assert got.status == 0, got.err
    assert getattr(got.options, name) == value


def test_home_in_a_config(run, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    Path("my.yaml").write_text("root: ~/data\n")
    options = run("pretrain", "--dataset", "fmow-sentinel", "--output", "o", "--config", "my.yaml").options
    assert options.root == str(tmp_path / "home/data")


@pytest.mark.parametrize("flag", ["--print-config", "--print_config"])
def test_print_config_repeats_the_run(run, flag):
    first = run(*FULL, "--rank", "7", "--alpha", "9", "--whole-blocks", "L", flag)
    assert first.status == 0
    assert first.options is None
    Path("again.yaml").write_text(first.out)
    expected = run(*FULL, "--rank", "7", "--alpha", "9", "--whole-blocks", "L").options
    assert run("pretrain", "--config", "again.yaml").options == expected


def test_print_config_does_not_ask_for_paths(run):
    got = run("pretrain", "--dataset", "fmow-sentinel", "--print-config")
    assert got.status == 0
    assert yaml.safe_load(got.out)["output"] is None


def test_to_config_is_plain_yaml(run):
    config = run(*FULL).options.to_config()
    assert yaml.safe_load(yaml.safe_dump(config)) == config
    assert "resume" not in config
    assert config["groups"][2] == ["B11", "B12"]


def test_probe_needs_no_more_than_the_encoder_and_the_data(run):
    Path("w.safetensors").touch()
    got = run("probe", "--init", "w.safetensors", "--dataset", "fmow-sentinel", "--root", "d", "--few-shot", "10")
    assert got.status == 0, got.err
    assert (got.options.few_shot, got.options.image_size, got.options.holdout) == ((10,), None, "split")


def test_demo(run):
    options = run("demo", "--steps", "3").options
    assert (options.steps, options.seed, options.output) == (3, 0, "runs/demo")


@pytest.mark.parametrize("command", ["demo", "pretrain", "probe", "inspect", "recipes"])
def test_help(run, command):
    got = run(command, "--help")
    assert got.status == 0
    assert got.out.startswith(f"usage: geoexplora {command}")
    assert "examples:" in got.out


def test_help_explains_every_option_with_its_default(run):
    text = " ".join(run("pretrain", "--help").out.split())
    assert "rank of LoRA on Q and V of all other blocks (0: no LoRA) (default: 32)" in text
    assert "(none, the default: alpha = rank)" in text
    assert "folder to write the run into; must not hold another run (required)" in text
    assert "vit_pico, vit_tiny, vit_small, vit_base, vit_large, vit_huge, vit_giant, source (default: vit_base)" in text


def test_help_shows_the_defaults_of_the_recipe(run):
    text = " ".join(run("pretrain", "--dataset", "fmow-sentinel", "-h").out.split())
    assert "vit_giant, source (default: vit_large)" in text


def test_overview(run):
    got = run("--help")
    assert got.status == 0
    assert all(f"  {name} " in got.out for name in ("demo", "pretrain", "probe", "inspect", "recipes"))
    assert run().status == 2
    assert run("--version").out.startswith("geoexplora 0.")
