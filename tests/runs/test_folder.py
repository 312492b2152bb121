from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from geoexplora.errors import RunError
from geoexplora.runs.folder import RunFolder, _environment


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[RunFolder]:
    folder = RunFolder(tmp_path / "runs" / "a").create()
    yield folder
    folder.close()


HOLDER = """
import os, sys, time
from geoexplora.runs.folder import RunFolder
folder = RunFolder(sys.argv[1])
folder = folder.open() if folder.holds_run else folder.create()
folder.write_config({"lr": 0.1})
if os.fork() == 0:  # a data loader's worker outlives its killed parent for a while
    time.sleep(30)
    os._exit(0)
print("ready", flush=True)
time.sleep(30)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that has a run in ``held`` open."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "held")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        os.killpg(process.pid, signal.SIGKILL)


def test_paths(folder: RunFolder) -> None:
    names = {
        folder.config_file: "config.yaml",
        folder.run_file: "run.json",
        folder.metrics_file: "metrics.csv",
        folder.last_checkpoint: "checkpoints/last.ckpt",
        folder.previous_checkpoint: "checkpoints/previous.ckpt",
        folder.encoder_file: "encoder.safetensors",
        folder.decoder_file: "decoder.safetensors",
        folder.adapter: "adapter",
        folder.loss_plot: "plots/loss.png",
        folder.reconstruction_plot: "plots/reconstruction.png",
    }
    assert {path.relative_to(folder.path).as_posix() for path in names} == set(names.values())


def test_second_run_is_refused(folder: RunFolder) -> None:
    folder.write_config({"lr": 0.1})
    folder.close()
    with pytest.raises(RunError, match=r"already holds a run\n.*--resume.*--output"):
        RunFolder(folder.path).create()
    with RunFolder(folder.path).open() as again:  # the refusal has left it unlocked
        assert again.read_config() == {"lr": 0.1}


def test_folder_with_other_files_may_be_used(tmp_path: Path) -> None:
    (tmp_path / "slurm-1.out").touch()
    with RunFolder(tmp_path).create() as folder:
        assert not folder.holds_run


def test_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds no run to resume"):
        RunFolder(tmp_path / "none").open()
    assert list(tmp_path.iterdir()) == []


def test_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    for path in (tmp_path / "a", tmp_path / "a" / "b"):
        with pytest.raises(RunError, match="A file stands where a folder is needed"):
            RunFolder(path).create()


def test_same_process_twice(folder: RunFolder) -> None:
    with pytest.raises(RunError, match=f"in use by process {os.getpid()}"):
        RunFolder(folder.path).create()


def test_another_process(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    for refuse in (RunFolder(tmp_path / "held").open, RunFolder(tmp_path / "held").create):
        with pytest.raises(RunError, match=f"in use by process {holder.pid} on "):
            refuse()


def test_killed_process(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    """Its lock file stays, its worker still runs, and yet the run can be resumed at once."""
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "held" / ".lock").exists()
    with RunFolder(tmp_path / "held").open() as folder:
        assert json.loads((folder.path / ".lock").read_text())["pid"] == os.getpid()
    assert not (tmp_path / "held" / ".lock").exists()


def test_one_of_many_gets_the_folder(tmp_path: Path) -> None:
    """Processes that start at the same moment: exactly one creates the run."""
    read, write = os.pipe()
    start = time.time() + 0.2
    children = []
    for _ in range(8):
        child = os.fork()
        if child == 0:
            time.sleep(max(0, start - time.time()))
            try:
                RunFolder(tmp_path / "run").create()
                os.write(write, b"1")
            except RunError:
                os.write(write, b"0")
            finally:
                time.sleep(0.5)
                os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    assert sorted(os.read(read, 100)) == sorted(b"10000000")
    os.close(read)
    os.close(write)


def test_no_locks_on_the_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Some network file systems have none: the process id in the file decides."""

    def unsupported(descriptor: int, operation: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", unsupported)
    first = RunFolder(tmp_path).create()
    assert "cannot be locked" in caplog.text
    with pytest.raises(RunError, match="in use by"):
        RunFolder(tmp_path).create()
    first.close()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    owner = json.loads('{"pid": 0, "host": ""}') | {"pid": dead.pid, "host": os.uname().nodename}
    (tmp_path / ".lock").write_text(json.dumps(owner))
    RunFolder(tmp_path).create().close()


def test_leftovers_of_a_killed_run_are_removed(folder: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
    folder.write_config({})
    folder.close()
    left = folder.checkpoints / ".last.ckpt.1-a.tmp"
    left.write_bytes(b"part")
    with caplog.at_level(logging.INFO), RunFolder(folder.path).open():
        assert not left.exists()
    assert ".last.ckpt.1-a.tmp" in caplog.text


def test_config_keeps_order_and_types(folder: RunFolder) -> None:
    config = {"model": "vit_base", "bands": ["B2", "B11"], "lr": 1e-4, "init": None, "root": "ö", "amp": True}
    folder.write_config(config)
    assert list(folder.read_config().items()) == list(config.items())


@pytest.mark.parametrize("text", ["a: [", "just text", "\xff"])
def test_broken_config(folder: RunFolder, text: str) -> None:
    folder.config_file.write_bytes(text.encode("latin-1"))
    with pytest.raises(RunError, match=r"config\.yaml"):
        folder.read_config()


def test_run_json(folder: RunFolder) -> None:
    folder.update_run_json(source={"sha256": "a"}, bands=["B2"])
    folder.update_run_json(metrics={"loss": 0.5}, bands=["B3"])
    record = folder.read_run_json()
    assert (record["source"], record["bands"], record["metrics"]) == ({"sha256": "a"}, ["B3"], {"loss": 0.5})
    assert record["environment"]["packages"]["torch"]
    assert {"python", "platform", "commit"} <= record["environment"].keys()
    folder.run_file.write_text("{")
    with pytest.raises(RunError, match=r"cannot read .*run.json"):
        folder.update_run_json(a=1)


def test_the_environment_is_looked_up_once(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("geoexplora.runs.folder._commit", lambda: asked.append(1))
    _environment.cache_clear()
    try:
        for step in range(3):
            folder.update_run_json(step=step)
    finally:
        _environment.cache_clear()
    assert len(asked) == 1
    assert folder.read_run_json()["environment"]["commit"] is None
