"""A run that was killed at any moment and resumed equals one that was not."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

LONG = ("--max-steps", "9", "--checkpoint-every", "3", "--probe-every", "6")


@pytest.fixture(scope="module")
def whole(pretrain, photo_run, tmp_path_factory):
    """The uninterrupted run that the others must equal."""
    output = tmp_path_factory.mktemp("whole") / "run"
    got = pretrain(output, "--init", photo_run, *LONG)
    assert got.status == 0, got.err
    return output


@pytest.fixture
def assert_equal(comparable):
    def check(run, reference):
        assert comparable(run) == comparable(reference)
        for name in ("encoder.safetensors", "decoder.safetensors", "adapter/trained.safetensors"):
            one, other = load_file(run / name), load_file(reference / name)
            assert one.keys() == other.keys()
            assert all(one[key].equal(other[key]) for key in one), name

    return check


def kill_when(process, ready, seconds=60.0):
    """Kill a process without warning once something is there; whether it was still running."""
    deadline = time.monotonic() + seconds
    while process.is_alive() and not ready() and time.monotonic() < deadline:
        time.sleep(0.002)
    running = process.is_alive()
    process.kill()
    process.join()
    return running


@pytest.mark.parametrize("workers", ["0", "2"])
def test_killed_at_random_moments(start, command, geoexplora, whole, photo_run, tmp_path, assert_equal, workers):
    run = tmp_path / "run"
    words = command(run, "--init", photo_run, *LONG, "--resume", "--num-workers", workers)
    kills = 0
    for _ in range(3):
        moment = time.monotonic() + random.uniform(0.2, 2.0)
        kills += kill_when(start(words), lambda moment=moment: time.monotonic() > moment)
    assert kills > 0
    got = geoexplora(*words)
    assert got.status == 0, got.err
    assert_equal(run, whole)


def test_killed_right_after_a_checkpoint(start, command, geoexplora, whole, photo_run, tmp_path, assert_equal):
    run = tmp_path / "run"
    assert kill_when(start(command(run, "--init", photo_run, *LONG)), (run / "checkpoints/previous.ckpt").exists)
    step = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"]
    assert step in {3, 6, 9}
    got = geoexplora("pretrain", "--resume", run)
    assert got.status == 0, got.err
    assert_equal(run, whole)


def test_killed_before_the_first_checkpoint(start, command, geoexplora, whole, photo_run, tmp_path, assert_equal):
    run = tmp_path / "run"
    assert kill_when(start(command(run, "--init", photo_run, *LONG)), (run / "metrics.csv").exists)
    assert not (run / "checkpoints/last.ckpt").exists()
    got = geoexplora("pretrain", "--resume", run)
    assert got.status == 0, got.err
    assert_equal(run, whole)


def test_a_complete_run_stays_as_it_is(geoexplora, whole, tmp_path, assert_equal):
    run = shutil.copytree(whole, tmp_path / "run")
    (run / "plots/loss.png").unlink()
    got = geoexplora("pretrain", "--resume", run)
    assert got.status == 0, got.err
    assert "9 of 9 steps done" in got.err
    assert_equal(run, whole)
    assert (run / "plots/loss.png").exists(), "what a kill after the last checkpoint left undone is made up for"


def test_a_longer_run(geoexplora, whole, tmp_path, comparable):
    run = shutil.copytree(whole, tmp_path / "run")
    got = geoexplora("pretrain", "--resume", run, "--max-steps", "11")
    assert got.status == 0, got.err
    assert "--max-steps goes from 9 to 11" in got.err
    rows = comparable(run)
    assert [row["step"] for row in rows] == list(range(12))
    assert rows[:10] == comparable(whole)
    assert rows[-1]["lr"] < rows[-2]["lr"]
    got = geoexplora("pretrain", "--resume", run, "--max-steps", "9")
    assert got.status == 2
    assert "--max-steps 9 differs from the run's 11" in got.err


def test_source_weights_and_record_may_be_gone(start, command, geoexplora, whole, photo_run, tmp_path, assert_equal):
    source, run = shutil.copytree(photo_run, tmp_path / "run_of_photographs"), tmp_path / "run"
    words = command(run, "--init", source, *LONG)
    assert kill_when(start(words), (run / "checkpoints/previous.ckpt").exists)
    shutil.rmtree(source)
    (run / "run.json").unlink()
    got = geoexplora("pretrain", "--resume", run)
    assert got.status == 0, got.err
    assert_equal(run, whole)


def test_a_damaged_checkpoint(geoexplora, whole, tmp_path, assert_equal):
    run = shutil.copytree(whole, tmp_path / "run")
    last = run / "checkpoints/last.ckpt"
    last.write_bytes(last.read_bytes()[: last.stat().st_size // 2])
    got = geoexplora("pretrain", "--resume", run)
    assert got.status == 0, got.err
    assert "last.ckpt is damaged" in got.err
    assert_equal(run, whole)
    for name in ("last", "previous"):
        (run / f"checkpoints/{name}.ckpt").write_bytes(b"PK")
    before = (run / "metrics.csv").read_bytes()
    got = geoexplora("pretrain", "--resume", run)
    assert got.status == 2
    assert "no checkpoint can be read" in got.err
    assert (run / "metrics.csv").read_bytes() == before, "nothing is lost"


def test_a_run_in_use(start, command, geoexplora, photo_run, tmp_path):
    run = tmp_path / "run"
    process = start(command(run, "--init", photo_run, "--max-steps", "9999", "--checkpoint-every", "10000"))
    while not (run / "metrics.csv").exists() and process.is_alive():
        time.sleep(0.01)
    got = geoexplora("pretrain", "--resume", run)
    assert got.status == 2
    assert f"{run} is in use by process {process.pid}" in got.err


ENDLESS = ("--max-steps", "99999", "--log-every", "1")


def stop_when(process, ready, number, seconds=60.0):
    """Send a running process a signal once something is there; its exit status."""
    deadline = time.monotonic() + seconds
    while process.is_alive() and not ready() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process.is_alive()
    os.kill(process.pid, number)
    process.join(seconds)
    return process.exitcode


def test_stopped_by_sigterm(start, command, photo_run, tmp_path):
    """The end of a batch job, or ``timeout``: no success."""
    run = tmp_path / "run"
    process = start(command(run, "--init", photo_run, *ENDLESS, "--checkpoint-every", "2"))
    assert stop_when(process, (run / "checkpoints/previous.ckpt").exists, signal.SIGTERM) == 143
    err = (tmp_path / "err.txt").read_text()
    assert err.count("SIGTERM") == 1
    assert err.endswith(f"\ngeoexplora pretrain: stopped by SIGTERM. Go on with: geoexplora pretrain --resume {run}\n")
    assert "Traceback" not in err
    assert not (run / ".lock").exists()


@pytest.mark.parametrize(
    ("number", "status", "what"), [(signal.SIGTERM, 143, "stopped by SIGTERM"), (signal.SIGINT, 130, "interrupted")]
)
def test_stopped_before_the_first_checkpoint(start, command, photo_run, tmp_path, number, status, what):
    run = tmp_path / "run"
    process = start(command(run, "--init", photo_run, *ENDLESS, "--checkpoint-every", "99999"))
    assert stop_when(process, (run / "metrics.csv").exists, number) == status
    hint = f"There is no checkpoint yet. Start again with: geoexplora pretrain --resume {run}"
    assert (tmp_path / "err.txt").read_text().endswith(f"\ngeoexplora pretrain: {what}. {hint}\n")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "ddp_fork"])
@pytest.mark.parametrize("send", [os.kill, os.killpg], ids=["to the first", "to all"])
def test_sigterm_ends_all_processes_of_the_console_command(command, photo_run, tmp_path, send, strategy):
    run = tmp_path / "run"
    more = ("--strategy", strategy, "--devices", "2", "--checkpoint-every", "2")
    words = [sys.executable, "-m", "geoexplora", *command(run, "--init", photo_run, *ENDLESS, *more)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (tmp_path / "err.txt").open("w") as err:
        process = subprocess.Popen(words, stderr=err, env=environment, start_new_session=True)
        while not (run / "checkpoints/previous.ckpt").exists() and process.poll() is None:
            time.sleep(0.01)
        send(process.pid, signal.SIGTERM)
        assert process.wait(60) == 143
    assert (tmp_path / "err.txt").read_text().count("stopped by SIGTERM. Go on with:") == 1
    deadline = time.monotonic() + 10
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(process.pid, 0)
            time.sleep(0.1)
    assert time.monotonic() < deadline, "no process is left"


@pytest.mark.slow
def test_a_true_process(command, whole, photo_run, tmp_path, assert_equal, console):
    run = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "geoexplora", *command(run, "--init", photo_run, *LONG)], stderr=subprocess.DEVNULL
    )
    while not (run / "checkpoints/last.ckpt").exists() and process.poll() is None:
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -9
    got = console("pretrain", "--resume", run)
    assert got.returncode == 0, got.stderr
    assert_equal(run, whole)
