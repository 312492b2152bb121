"""Resuming takes the run's own settings and refuses changes that would change its result."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

FULL = ("pretrain", "--dataset", "fmow-sentinel", "--root", "data", "--output", "runs/a", "--rank", "16")


@pytest.fixture
def started(run):
    """The options of a run that was started in ``runs/a``."""
    options = run(*FULL).options
    Path("runs/a").mkdir(parents=True)
    Path("runs/a/config.yaml").write_text(yaml.safe_dump(options.to_config()))
    return options


@pytest.mark.parametrize(
    "words",
    [
        ("pretrain", "--resume", "runs/a"),
        ("pretrain", "--resume=runs/a"),
        ("pretrain", "--output", "runs/a", "--resume"),
        ("pretrain", "--resume", "--output", "runs/a"),
        (*FULL, "--resume"),
    ],
)
def test_settings_come_from_the_run(run, started, words):
    got = run(*words)
    assert got.status == 0, got.err
    assert got.options.resume is True
    assert got.options.to_config() == started.to_config()


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--rank", "8"), "--rank 8 differs from the run's 16"),
        (("--lr", "1e-3"), "--lr 0.001 differs from the run's 0.00045"),
        (("--seed", "3"), "--seed 3 differs from the run's 0"),
        (("--batch-size", "64"), "--batch-size 64 differs"),
        (("--devices", "2"), "--devices 2 differs"),
        (("--epochs", "100"), "--epochs 100 differs from the run's 200"),
        (("--bands", "B2,B3", "--groups", "none"), "--bands B2,B3 differs"),
    ],
)
def test_what_decides_the_result_stays(run, started, words, text):
    got = run("pretrain", "--resume", "runs/a", *words)
    assert got.status == 2
    assert text in got.err
    assert "--init RUN" in got.err


def test_what_does_not_decide_the_result_may_change(run, started):
    words = ("--num-workers", "1", "--log-every", "5", "--root", "elsewhere", "--grad-checkpointing")
    got = run("pretrain", "--resume", "runs/a", *words)
    assert got.status == 0, got.err
    assert (got.options.num_workers, got.options.root) == (1, "elsewhere")


def test_a_run_may_be_made_longer_with_a_warning(run, started):
    got = run("pretrain", "--resume", "runs/a", "--epochs", "300")
    assert got.status == 0
    assert "warning: --epochs goes from 200 to 300" in got.err


def test_full_options_start_a_run_that_does_not_exist(run):
    got = run(*FULL, "--resume")
    assert got.status == 0
    assert got.options.rank == 16


def test_a_named_run_must_exist_if_nothing_else_is_given(run):
    got = run("pretrain", "--resume", "runs/nowhere")
    assert got.status == 2
    assert "there is no run in runs/nowhere to resume" in got.err
    assert "--dataset is missing" in got.err


def test_an_output_that_holds_a_run_is_refused_without_resume(run, started, monkeypatch):
    got = run(*FULL)
    assert got.status == 2
    assert "already holds a run. Go on with it by --resume" in got.err
    assert run(*FULL, "--print-config").status == 0
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert run(*FULL).status == 0, "the first process has just made the folder"


def test_source_weights_may_be_gone(run):
    Path("w.pth").touch()
    options = run(*FULL, "--init", "w.pth").options
    Path("runs/a").mkdir(parents=True)
    Path("runs/a/config.yaml").write_text(yaml.safe_dump(options.to_config()))
    Path("w.pth").unlink()
    assert run("pretrain", "--resume", "runs/a").status == 0


def test_two_folders_are_refused(run, started):
    got = run("pretrain", "--resume", "runs/a", "--output", "runs/b")
    assert "name two folders" in got.err


def test_resume_without_a_folder(run):
    assert "--output is missing" in run("pretrain", "--dataset", "photographs", "--resume").err


def test_a_moved_run_resumes_where_it_lies(run, started):
    Path("runs/a").rename("runs/b")
    assert run("pretrain", "--resume", "runs/b").options.output == "runs/b"


def test_a_damaged_configuration_is_reported(run, started):
    Path("runs/a/config.yaml").write_text("rank: many\n")
    got = run("pretrain", "--resume", "runs/a")
    assert got.status == 2
    assert "runs/a/config.yaml line 1: rank: expected a whole number" in got.err
