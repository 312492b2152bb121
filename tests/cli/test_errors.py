"""What the user is told when the input is wrong: everything at once, with the remedy, and exit status 2."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from geoexplora.cli import main as cli
from geoexplora.errors import DataError

FULL = ("pretrain", "--dataset", "fmow-sentinel", "--root", "data", "--output", "runs/a")


def test_all_errors_of_a_config_together(run):
    Path("bad.yaml").write_text(
        "dataset: fmow-sentinel\n"
        "rank: abc\n"
        "whole_block: [1]\n"
        "lr: null\n"
        "seed: 1\n"
        "seed: 2\n"
        "precision: bf17\n"
        "image_size: 100\n"
        "training:\n"
        "  epochs: 3\n"
    )
    got = run("pretrain", "--config", "bad.yaml", "--mask-ratio", "2", "--nodes", "3")
    assert got.status == 2
    assert got.out == ""
    assert "11 settings are wrong" in got.err
    for text in (
        "bad.yaml line 2: rank: expected a whole number, got 'abc'",
        "bad.yaml line 3: unknown key 'whole_block' for pretrain. Did you mean whole_blocks",
        "bad.yaml line 4: lr: must not be empty or null; expected a number",
        "bad.yaml line 6: seed is set twice (before in bad.yaml line 5)",
        "precision: expected one of 32, bf16, got 'bf17'. Did you mean bf16?",
        "--image-size 100 is not a multiple of --patch-size 8. Near it: 96 or 104. [image_size: bad.yaml line 8",
        "bad.yaml line 9: unknown key 'training' for pretrain. Settings are not nested",
        "--mask-ratio 2 must lie between 0 and 1",
        "unknown option --nodes. Did you mean --num-nodes",
        "--root is missing",
        "--output is missing",
    ):
        assert text in got.err
    assert "Traceback" not in got.err


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--rank", "2000"), "--rank 2000 is above the width of vit_large, 1024"),
        (("--rank", "-1"), "--rank -1 is negative"),
        (("--rank", "8.0"), "--rank: expected a whole number, got '8.0'"),
        (("--rank", "true"), "--rank: expected a whole number"),
        (("--rank", "none"), "--rank: must not be empty or null"),
        (("--decoder-rank", "600"), "--decoder-rank 600 is above the width of the decoder, 512"),
        (("--whole-blocks", "0,L"), "whole block 0 is out of range: the model has 24 blocks"),
        (("--whole-blocks", "25"), "whole block 25 is out of range"),
        (("--whole-blocks", "first"), "cannot read block"),
        (("--whole-blocks", "24,L"), "name a block twice"),
        (("--image-size", "97"), "--image-size 97 is not a multiple of --patch-size 8. Near it: 96 or 104."),
        (("--image-size", "0"), "at least 1 pixel"),
        (("--bands", "B2,B03,B99"), "unknown band 'B99'"),
        (("--bands", "B2,B02", "--groups", "none"), "band B2 is named twice"),
        (("--groups", "B2,B3;B3"), "band B3 stands in group 1 and in group 2"),
        (("--groups", "B2,B3,B4,B8;B5,B6,B7,B8A"), "band B11, B12 stands in no channel group"),
        (("--groups", "B1,B2"), "band B1, which is not among the input bands"),
        (("--dataset", "fmow-sentinl"), "Did you mean fmow-sentinel"),
        (("--model", "vit_gigantic"), "unknown model 'vit_gigantic'"),
        (("--model", "vitbase"), "Did you mean vit_base"),
        (("--mask-ratio", "1"), "must lie between 0 and 1"),
        (("--mask-ratio", ".nan"), "must lie between 0 and 1"),
        (("--lr", "0"), "--lr must be above 0"),
        (("--lr", ".inf"), "--lr must be above 0"),
        (("--batch-size", "0", "--effective-batch-size", "none"), "--batch-size must be at least 1"),
        (("--effective-batch-size", "100"), "not a multiple of 128"),
        (("--devices", "3"), "--devices 3"),
        (("--epochs", "none"), "neither --epochs nor --max-steps is set"),
        (("--years", "2015"), "--years: expected two years such as 2000,2020, got '2015'"),
        (("--years", "2018,2015"), "is after the last"),
        (("--crop-scale", "0.8,0.2"), "--crop-scale"),
        (("--max-unreadable", "1.5"), "is no share"),
        (("--init", "nowhere.pth"), "--init nowhere.pth: no such file or run folder"),
        (("--mode", "scratch", "--init", "w.pth"), "--mode scratch starts from random weights"),
        (("--mode", "lora"), "expected one of explora, full, scratch"),
        (("--decoder-heads", "7"), "does not divide"),
        (("--ran", "3"), "unknown option --ran. Did you mean --rank"),
        (("--rank",), "--rank needs a value"),
        (("--bands", "B2", "B3"), "unexpected argument 'B3'. Join the items of a list by commas."),
        (("--missing", "ignore"), "expected one of error, skip"),
        (("--config", "pretrain/fmow-sentinal"), "Did you mean pretrain/fmow-sentinel"),
        (("--config", "."), "is a folder"),
        (("--objective", "dino"), "expected one of mae, dinov2"),
    ],
)
def test_one_clear_message(run, words, text):
    got = run(*FULL, *words)
    assert got.status == 2
    assert got.options is None
    assert text in got.err
    assert "Traceback" not in got.err


def test_values_that_go_together_are_accepted(run):
    assert run(*FULL, "--effective-batch-size", "512", "--devices", "2", "--num-nodes", "2").status == 0
    assert run(*FULL, "--mode", "full", "--rank", "99999").status == 0


def test_missing_settings_are_named_together(run):
    err = run("pretrain").err
    assert "--dataset is missing" in err
    assert "--output is missing" in err
    assert "--root is missing" in run("pretrain", "--dataset", "fmow-sentinel").err
    assert run("pretrain", "--dataset", "photographs", "--output", "o").status == 0
    assert "--init is missing" in run("probe", "--dataset", "photographs").err


def test_random_start_of_explora_is_warned_about(run):
    got = run(*FULL)
    assert got.status == 0
    assert got.err.startswith("warning: --mode explora without --init")


@pytest.mark.parametrize("text", ["rank: [", "- 1\n- 2\n", "just words", "rank: 1\n\trank: 2"])
def test_config_that_is_no_mapping_or_no_yaml(run, text):
    Path("bad.yaml").write_text(text)
    got = run(*FULL, "--config", "bad.yaml")
    assert got.status == 2
    assert "bad.yaml" in got.err


def test_config_that_is_not_text(run):
    Path("bad.yaml").write_bytes(b"\xff\xfe\x00rank")
    assert "not a text file" in run(*FULL, "--config", "bad.yaml").err


def test_empty_config_changes_nothing(run):
    Path("empty.yaml").write_text("# nothing\n")
    assert run(*FULL, "--config", "empty.yaml").options == run(*FULL).options


def test_key_of_another_command(run):
    Path("my.yaml").write_text("rank: 8\n")
    Path("w.pth").touch()
    got = run("probe", "--init", "w.pth", "--dataset", "photographs", "--config", "my.yaml")
    assert "unknown key 'rank' for probe" in got.err


def test_unknown_command(run):
    got = run("pretrian")
    assert got.status == 2
    assert "Did you mean pretrain?" in got.err


def _raising(monkeypatch, problem):
    def work(options):
        raise problem

    load = cli.load_command

    def load_raising(name):
        command = load(name)
        fields = {name: getattr(command, name) for name in command.__dataclass_fields__}
        return type(command)(**fields | {"run": work})

    monkeypatch.setattr(cli, "load_command", load_raising)


def test_user_errors_of_the_work_end_with_status_2(monkeypatch, capsys):
    _raising(monkeypatch, DataError("no train.csv in data", "Name the folder that holds it by --root."))
    assert cli.main(["demo"]) == 2
    assert capsys.readouterr().err == (
        "geoexplora demo: no train.csv in data\nName the folder that holds it by --root.\n"
    )


def test_errors_of_a_worker_lose_their_traceback(monkeypatch, capsys):
    wrapped = (
        "Caught DataError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
        '  File "x.py", line 1, in f\ngeoexplora.errors.DataError: tile a.tif has 12 bands\nExpected 13.\n'
    )
    _raising(monkeypatch, DataError(wrapped))
    assert cli.main(["demo"]) == 2
    assert capsys.readouterr().err == "geoexplora demo: tile a.tif has 12 bands\nExpected 13.\n"


def test_interruption_is_no_traceback(monkeypatch, capsys):
    _raising(monkeypatch, KeyboardInterrupt())
    assert cli.main(["demo"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_other_errors_are_not_hidden(monkeypatch):
    _raising(monkeypatch, ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        cli.main(["demo"])


def test_reader_that_has_seen_enough():
    script = f"{sys.executable} -m geoexplora pretrain --help | head -n 1"
    done = subprocess.run(script, shell=True, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("usage:")
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


def test_image_of_one_token_is_refused(run):
    outcome = run(*FULL, "--image-size", "16", "--patch-size", "16", "--groups", "none")
    assert outcome.status == 2
    assert "an image has 1 token to mask" in outcome.err


def test_epochs_replace_the_steps_of_a_recipe(run):
    words = (*FULL, "--config", "pretrain/fmow-sentinel-cpu")
    assert run(*words).options.max_steps == 500
    assert run(*words, "--epochs", "3").options.max_steps is None
    assert run(*words, "--epochs", "3", "--max-steps", "7").options.max_steps == 7
