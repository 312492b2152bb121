from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

import geoexplora.runs.checkpoint as checkpoint
from geoexplora.errors import RunError
from geoexplora.runs.checkpoint import AtomicCheckpointIO, RunCheckpoint, find_checkpoint
from geoexplora.runs.folder import RunFolder
from geoexplora.runs.metrics import Metrics


class Task(pl.LightningModule):
    """Data and loss depend on the batch's number only, as in a resumable training."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)
        torch.nn.init.ones_(self.layer.weight)
        torch.nn.init.zeros_(self.layer.bias)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(batch_idx))
        return (self.layer(x) - x.sum(1, keepdim=True) ** 2).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.1)


class Log(pl.Callback):
    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
        if trainer.global_step != self.metrics.last_step:
            self.metrics.append({"step": trainer.global_step, "loss": outputs["loss"]})


class StopAt(pl.Callback):
    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.batch:
            raise ZeroDivisionError


def train(folder: RunFolder, *callbacks: pl.Callback, steps: int = 10, every: int = 4, **options: Any) -> Task:
    metrics = Metrics(folder.metrics_file)
    found = find_checkpoint(folder)
    metrics.truncate_after(torch.load(found)["global_step"] if found else -1)
    saving = [callback for callback in callbacks if isinstance(callback, RunCheckpoint)]
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            *([] if saving else [RunCheckpoint(folder, every, before_save=metrics.sync)]),
            Log(metrics),
            *callbacks,
        ],
        **options,
    )
    task = Task()
    trainer.fit(task, DataLoader(range(30), batch_size=1), ckpt_path=found)
    return task


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def step_of(path: Path) -> int:
    return int(torch.load(path)["global_step"])


def test_every_few_steps_and_at_the_end(folder: RunFolder) -> None:
    train(folder)
    assert step_of(folder.last_checkpoint) == 10
    assert step_of(folder.previous_checkpoint) == 8
    assert {path.name for path in folder.checkpoints.iterdir()} == {"last.ckpt", "previous.ckpt"}


def test_only_at_the_end(folder: RunFolder) -> None:
    train(folder, every=0)
    assert step_of(folder.last_checkpoint) == 10
    assert not folder.previous_checkpoint.exists()


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 3}])
@pytest.mark.parametrize("stop", [3, 13, 14, 23, 24])
def test_resumed_equals_uninterrupted(tmp_path: Path, stop: int, options: dict[str, int]) -> None:
    whole, cut = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "cut")
    steps = 9 if options else 25
    one = train(whole, steps=steps, **options)
    with pytest.raises(ZeroDivisionError):
        train(cut, StopAt(stop), steps=steps, **options)
    other = train(cut, steps=steps, **options)
    assert cut.metrics_file.read_text() == whole.metrics_file.read_text()
    assert other.layer.weight.equal(one.layer.weight)


def test_the_rest_of_the_folder_follows_each_checkpoint(folder: RunFolder) -> None:
    seen: list[tuple[int, int]] = []
    saving = RunCheckpoint(
        folder, 4, on_saved=lambda trainer, task: seen.append((trainer.global_step, step_of(folder.last_checkpoint)))
    )
    train(folder, saving)
    assert seen == [(4, 4), (8, 8), (10, 10)]


def test_a_run_killed_before_its_last_export_makes_up_for_it(folder: RunFolder) -> None:
    def killed(trainer: pl.Trainer, task: pl.LightningModule) -> None:
        if trainer.global_step == 10:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(folder, RunCheckpoint(folder, 4, on_saved=killed))
    assert step_of(folder.last_checkpoint) == 10
    seen: list[int] = []
    train(folder, RunCheckpoint(folder, 4, on_saved=lambda trainer, task: seen.append(trainer.global_step)))
    assert seen == [10]


def test_full_disk_keeps_the_last_good_one(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    train(folder, steps=4)
    original = torch.save

    def full(content: Any, file: Any) -> None:
        file.write(b"part")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint.torch, "save", full)
    with pytest.raises(RunError, match=r"cannot write .*last.ckpt: No space left on device\nFree some space"):
        train(folder)
    assert [path.name for path in folder.checkpoints.iterdir()] == ["last.ckpt"]
    assert find_checkpoint(folder) == folder.last_checkpoint
    monkeypatch.setattr(checkpoint.torch, "save", original)
    train(folder)
    assert step_of(folder.last_checkpoint) == 10


def test_failure_of_an_export_stops_the_run(folder: RunFolder) -> None:
    def full(trainer: pl.Trainer, task: pl.LightningModule) -> None:
        raise RunError("cannot write encoder.safetensors")

    with pytest.raises(RunError, match=r"encoder.safetensors"):
        train(folder, RunCheckpoint(folder, 4, on_saved=full))
    assert step_of(folder.last_checkpoint) == 4


DISTRIBUTED = """
import sys, torch
import lightning.pytorch as pl
from torch.utils.data import DataLoader
from geoexplora.errors import RunError
from geoexplora.runs.checkpoint import RunCheckpoint, find_checkpoint
from geoexplora.runs.folder import RunFolder

class Task(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
    def training_step(self, batch):
        return self.layer(batch.float()).mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

def full(trainer, task):
    if trainer.global_step == 4:
        raise RunError("no room")

folder = RunFolder(sys.argv[1])
trainer = pl.Trainer(
    max_steps=10, accelerator="cpu", devices=2, strategy="ddp_fork", logger=False, enable_progress_bar=False,
    enable_model_summary=False, callbacks=[RunCheckpoint(folder, 2, on_saved=full)],
)
try:
    trainer.fit(Task(), DataLoader(torch.arange(100)[:, None], batch_size=2))
except Exception as problem:
    print("stopped", "no room" in str(problem))
print(torch.load(find_checkpoint(folder))["global_step"])
"""


def test_two_processes_stop_together(tmp_path: Path) -> None:
    answer = subprocess.run(
        [sys.executable, "-c", DISTRIBUTED, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert answer.stdout.split() == ["stopped", "True", "4"], answer.stderr


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from geoexplora.runs.checkpoint import AtomicCheckpointIO, find_checkpoint
from geoexplora.runs.folder import RunFolder
from geoexplora.weights.files import read_weights
from geoexplora.weights.spec import EncoderSpec
from geoexplora.weights.write import save_encoder

torch.set_num_threads(1)  # a pool of threads does not survive a fork
random.seed(0)
os.fsync = lambda descriptor: None  # of use in a power cut only, and slow
spec = EncoderSpec.of("vit_pico", image_size=64, patch_size=16, sensor="rgb", bands="RGB", normalization={})
folder = RunFolder(sys.argv[1])
folder.create().write_config({})
plugin = AtomicCheckpointIO(folder)
plugin.save_checkpoint({"step": 0, "state": {"a": torch.zeros(1)}}, folder.last_checkpoint)  # imports what it needs
save_encoder(folder.encoder_file, {"a": torch.zeros(1)}, spec, step=0)
folder.close()
step, moments = 0, 0
for trial in range(20):
    child = os.fork()
    if child == 0:
        folder.open()
        while True:
            step += 1
            tensors = {"a": torch.full((400_000,), float(step))}
            plugin.save_checkpoint({"step": step, "state": tensors}, folder.last_checkpoint)
            assert plugin.failure is None
            save_encoder(folder.encoder_file, tensors, spec, step=step)
    time.sleep(random.uniform(0.02, 0.15))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    moments += any(folder.path.rglob(".*.tmp"))
    found = find_checkpoint(folder)
    assert found == folder.last_checkpoint, "last.ckpt must exist and be whole at every moment"
    content = torch.load(found)
    assert content["step"] >= step and content["state"]["a"].eq(content["step"]).all()
    if folder.previous_checkpoint.exists():
        previous = torch.load(folder.previous_checkpoint)
        assert previous["step"] in {content["step"], content["step"] - 1}, (previous["step"], content["step"])
    encoder = read_weights(folder.path)
    assert encoder.step <= content["step"]
    assert encoder.tensors["a"].eq(encoder.step).all()
    step = content["step"]
folder.open().close()
assert not list(folder.path.rglob(".*"))
print("steps", step, "kills in the middle of writing", moments)
"""


def test_kill_at_any_moment(tmp_path: Path) -> None:
    answer = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "run")], capture_output=True, text=True, timeout=120
    )
    assert answer.returncode == 0, answer.stderr
    words = answer.stdout.split()
    assert int(words[1]) > 3, answer.stdout
    assert int(words[-1]) > 0, answer.stdout


def test_damaged_checkpoint(folder: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
    assert find_checkpoint(folder) is None
    weight = train(folder).layer.weight
    last = folder.last_checkpoint
    whole = last.read_bytes()
    flipped = bytearray(whole)
    flipped[whole.index(weight.detach().numpy().tobytes())] ^= 0xFF
    for broken in (whole[: len(whole) // 2], b"", b"x" * 1000, bytes(flipped)):
        last.write_bytes(broken)
        caplog.clear()
        assert find_checkpoint(folder) == folder.previous_checkpoint
        assert "last.ckpt is damaged" in caplog.text
    folder.previous_checkpoint.write_bytes(whole[:100])
    with pytest.raises(RunError, match=r"no checkpoint can be read: .*last.ckpt.*previous.ckpt"):
        find_checkpoint(folder)
    last.unlink()
    folder.previous_checkpoint.write_bytes(whole)
    assert find_checkpoint(folder) == folder.previous_checkpoint


def test_no_hard_links(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: Any, **__: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", unsupported)
    train(folder)
    assert step_of(folder.last_checkpoint) == 10
    assert step_of(folder.previous_checkpoint) == 8


def test_same_file_twice(folder: RunFolder) -> None:
    """A kill between keeping the previous and replacing the last leaves two names of one file."""
    plugin = AtomicCheckpointIO(folder)
    for step in (1, 2):
        plugin.save_checkpoint({"global_step": step}, folder.last_checkpoint)
    folder.previous_checkpoint.unlink()
    folder.previous_checkpoint.hardlink_to(folder.last_checkpoint)
    plugin.save_checkpoint({"global_step": 3}, folder.last_checkpoint)
    assert (step_of(folder.previous_checkpoint), step_of(folder.last_checkpoint)) == (2, 3)
    assert {path.name for path in folder.checkpoints.iterdir()} == {"last.ckpt", "previous.ckpt"}


def test_quiet_logging(folder: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="geoexplora"):
        train(folder, steps=2)
    assert not [record for record in caplog.records if record.name.startswith("geoexplora")]
