"""What a user reads on standard error: no library's noise, nothing twice, no traceback."""

from __future__ import annotations

import re

from geoexplora.runs.progress import PlainProgress

EXPECTED = (
    r"classes: the 5 found in the csv files, not fMoW's 62",
    r"encoder from .*encoder\.safetensors \(geoexplora\): \d+ tensors matched",
    r"decoder from the same source: \d+ tensors matched",
    r" *(converted|resampled|kept) .*: .*",
    r"what is trained:",
    r"part +trainable +frozen",
    r"[\w ]+ +[\d,]+ +[\d,]+",
    r"total \([\d.]+% trained\) +[\d,]+ +[\d,]+",
    r"53 images, 2 steps of 8 images, learning rate [\de.-]+",
    r"kNN probe at step [02].*",
    r"warning: the kNN probe fell to .*",
    r"pre-training: step [12] of 2, loss [\d.]+, [\d.]+ steps/s(, 0:\d\d left)?",
    r"run folder: .*, 2 of 2 steps done",
)


def test_pretrain_and_probe_and_resume(console, command, photo_run, tmp_path, fmow_tree):
    run = tmp_path / "run"
    words = ("--max-steps", "2", "--num-workers", "2", "--probe-every", "2", "--precision", "bf16")
    got = console(*command(run, "--init", photo_run, *words))
    assert got.returncode == 0, got.stderr
    assert got.stdout == ""
    lines = got.stderr.splitlines()
    strange = [line for line in lines if not any(re.fullmatch(known, line) for known in EXPECTED)]
    assert strange == []
    assert len(set(lines)) == len(lines), "nothing twice"

    data = ("--dataset", "fmow-sentinel", "--root", fmow_tree, "--accelerator", "cpu", "--num-workers", "0")
    got = console("probe", "--init", run, *data, "--linear-steps", "5", "--classifiers", "knn,linear,logistic")
    assert got.returncode == 0, got.stderr
    assert got.stderr.splitlines()[1:] == ["features of 53 images of train", "features of 15 images of val"]
    assert got.stderr.startswith("classes: the 5 found in the csv files")
    lines = got.stdout.splitlines()
    assert [line.split()[:2] for line in lines[1:-1]] == [["all", "knn"]] * 3 + [["all", "linear"], ["all", "logistic"]]


def test_a_start_from_random_weights_is_said_once(pretrain, geoexplora, tmp_path):
    got = pretrain(tmp_path / "r", "--max-steps", "1")
    assert got.status == 0
    assert got.err.count("random weights") == 1
    got = geoexplora("pretrain", "--resume", tmp_path / "r")
    assert "random weights" not in got.err
    assert "going on with" in got.err


def test_no_more_workers_than_cores(pretrain, tmp_path, monkeypatch):
    monkeypatch.setattr("geoexplora.tasks.parallel.os.sched_getaffinity", lambda _: {0})
    got = pretrain(tmp_path / "r", "--max-steps", "1", "--num-workers", "8")
    assert "reading data in 1 processes instead of 8: there are no more CPU cores" in got.err


def test_a_loss_of_an_earlier_step_is_not_shown_as_of_this_one(pretrain, tmp_path, monkeypatch):
    monkeypatch.setattr("geoexplora.tasks.pretrain.pretraining.progress_callback", lambda text: PlainProgress(text, 0))
    got = pretrain(tmp_path / "r", "--max-steps", "4", "--log-every", "50")
    assert got.status == 0, got.err
    shown = re.findall(r"step \d of 4, (loss )[\d.]+(| at step \d), ", got.err)
    assert shown == [("loss ", when) for when in ("", " at step 1", " at step 1", "")]


def test_a_folder_that_cannot_be_made_is_not_to_be_resumed(pretrain):
    got = pretrain("/proc/foo")
    assert got.status == 2
    assert "cannot write /proc/foo: " in got.err
    assert "name another place with --output" in got.err
    assert "--resume" not in got.err
