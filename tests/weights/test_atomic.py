from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from geoexplora.errors import RunError
from geoexplora.weights.atomic import atomic_path, remove_leftovers, write_text

TINY_DISK = """
import os, sys, torch
from pathlib import Path
from geoexplora.errors import RunError
from geoexplora.runs.checkpoint import AtomicCheckpointIO, find_checkpoint
from geoexplora.runs.folder import RunFolder
from geoexplora.runs.metrics import Metrics, read_metrics
from geoexplora.weights.opening import open_file
from geoexplora.weights.spec import EncoderSpec
from geoexplora.weights.write import save_encoder

disk = Path(sys.argv[1])
def files():
    return sorted(str(p.relative_to(disk)) for p in disk.rglob("*") if p.is_file())
def refused(action):
    before = files()
    try:
        action()
    except RunError as problem:
        assert files() == before, files()
        return str(problem)
    raise SystemExit("not refused")

folder = RunFolder(disk / "run").create()
folder.write_config({"lr": 0.1})
metrics = Metrics(folder.metrics_file)
metrics.append({"step": 1, "loss": 0.5})
spec = EncoderSpec.of("vit_pico", image_size=64, patch_size=16, sensor="rgb", bands="RGB", normalization={})
small, large = {"a": torch.ones(50_000)}, {"a": torch.ones(600_000)}
save_encoder(folder.encoder_file, small, spec)
plugin = AtomicCheckpointIO(folder)
plugin.save_checkpoint(small, folder.last_checkpoint)
assert plugin.failure is None
assert "No space left" in refused(lambda: save_encoder(folder.encoder_file, large, spec))
plugin.save_checkpoint(large, folder.last_checkpoint)
assert "No space left" in str(plugin.failure), plugin.failure
assert find_checkpoint(folder) == folder.last_checkpoint
assert torch.load(folder.last_checkpoint)["a"].equal(small["a"])
assert open_file(folder.encoder_file).content["a"].equal(small["a"])
fill = (disk / "fill").open("wb", buffering=0)
try:
    while True:
        fill.write(b"x" * 512)
except OSError:
    fill.close()
assert "No space left" in refused(lambda: folder.update_run_json(text="x" * 100_000))
def many():
    for step in range(2, 10_000):
        metrics.append({"step": step, "loss": 0.123456789})
assert "No space left" in refused(many)
rows = read_metrics(folder.metrics_file)
assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
os.remove(disk / "fill")
metrics.append({"step": metrics.last_step + 1, "loss": 0.1})
assert folder.read_config() == {"lr": 0.1}
folder.close()
os.system(f"mount -o remount,ro {disk}")
for action in (
    lambda: RunFolder(disk / "other").create(),
    lambda: RunFolder(disk / "run").open(),
    lambda: save_encoder(folder.encoder_file, small, spec),
    lambda: metrics.append({"step": 10**6}),
    lambda: folder.update_run_json(a=1),
):
    assert "Make the folder writable" in refused(action)
print("all refused")
"""


def test_replaces_whole(tmp_path: Path) -> None:
    target = tmp_path / "new folder" / "file.txt"
    write_text(target, "old")
    with atomic_path(target) as temporary:
        temporary.write_text("new")
        assert target.read_text() == "old"
        assert temporary.parent == target.parent
    assert target.read_text() == "new"
    assert list(target.parent.iterdir()) == [target]


def test_follows_the_umask(tmp_path: Path) -> None:
    """A temporary file's private mode must not stick to what others of the group are to read."""
    old = os.umask(0o027)
    try:
        write_text(tmp_path / "file", "x")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


@pytest.mark.parametrize("problem", [ValueError("bug"), KeyboardInterrupt(), RuntimeError("bug")])
def test_other_failures_pass_through(tmp_path: Path, problem: BaseException) -> None:
    write_text(tmp_path / "file", "old")
    with pytest.raises(type(problem)), atomic_path(tmp_path / "file") as temporary:
        temporary.write_text("part")
        raise problem
    assert (tmp_path / "file").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_file_in_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"(Not a directory|File exists)\nA file stands where a folder is needed"):
        write_text(tmp_path / "file" / "run.json", "x")


def test_leftovers(tmp_path: Path) -> None:
    left = [tmp_path / ".last.ckpt.123-abcd.tmp", tmp_path / ".tmpX0lQ7c"]
    others = [tmp_path / "last.ckpt", tmp_path / "a.tmp", tmp_path / ".lock"]
    for path in (*left, *others):
        path.touch()
    assert sorted(remove_leftovers(tmp_path)) == left
    assert set(tmp_path.iterdir()) == set(others)


def test_unwritable_folder(tmp_path: Path) -> None:
    """As an ordinary user: root may write anywhere."""
    folder = tmp_path / "locked"
    folder.mkdir()
    folder.chmod(0o555)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            if os.geteuid() == 0:
                for parent in (folder, *folder.parents[:3]):
                    parent.chmod(parent.stat().st_mode | 0o055)
                os.setuid(65534)
            write_text(folder / "file", "x")
        except RunError as problem:
            code = 0 if "Permission denied\nMake the folder writable" in str(problem) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_really_full_and_a_really_read_only_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=1m tmpfs {disk}"
    # Without root, a user namespace is tried; where neither is allowed (some containers) there is no such disk.
    enter = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-rm"]
    try:
        subprocess.run([*enter, "sh", "-c", mount], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no small disk can be mounted here")
    script = tmp_path / "script.py"
    script.write_text(TINY_DISK)
    answer = subprocess.run(
        [*enter, "sh", "-c", f"{mount} && {sys.executable} {script} {disk}"], capture_output=True, text=True
    )
    assert answer.stdout == "all refused\n", answer.stderr
