"""Several processes: gradients are synchronized, runs resume, and an error of one ends all with its message."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from geoexplora.runs.metrics import read_metrics
from geoexplora.tasks.pretrain.mae import ExPLoRAPretrain

FORKED = ("--strategy", "ddp_fork", "--devices", "2")


@pytest.fixture
def ranks(monkeypatch, tmp_path):
    """Makes each process write its weights and gradients at the end of training; reads them."""

    def write(self):
        # The last gradients are those of the whole step; without synchronization they differ.
        grads = {f"grad {name}": p.grad for name, p in self.named_parameters() if p.grad is not None}
        torch.save(dict(self.state_dict()) | grads, tmp_path / f"rank{self.global_rank}.pt")

    monkeypatch.setattr(ExPLoRAPretrain, "on_train_end", write, raising=False)
    monkeypatch.setattr(ExPLoRAPretrain, "optimizer_zero_grad", lambda *_: None)
    return lambda: [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("mode", ["explora", "full"])
def test_both_processes_end_with_the_same_weights(pretrain, photo_run, tmp_path, ranks, mode):
    words = ("--init", photo_run, "--mode", mode, "--max-steps", "2", "--probe-every", "2")
    got = pretrain(tmp_path / "r", *words, *FORKED)
    assert got.status == 0, got.err
    assert "2 of 2 steps done" in got.err
    assert got.err.count("warning") == 0
    first, second = ranks()
    assert first.keys() == second.keys()
    assert all(first[name].equal(second[name]) for name in first)
    trained = {name for name in first if name.startswith("grad ")}
    parts = json.loads((tmp_path / "r/run.json").read_text())["parameters"]
    assert sum(first[name].numel() for name in trained) == sum(part["trainable"] for part in parts)
    assert [row["step"] for row in read_metrics(tmp_path / "r/metrics.csv")] == [0, 1, 2]


def test_resuming(pretrain, geoexplora, photo_run, tmp_path, comparable):
    words = ("--init", photo_run, "--max-steps", "4", *FORKED)
    assert pretrain(tmp_path / "whole", *words).status == 0
    run = tmp_path / "part"
    assert pretrain(run, *words).status == 0
    (run / "checkpoints/previous.ckpt").replace(run / "checkpoints/last.ckpt")
    got = geoexplora("pretrain", "--resume", run)
    assert got.status == 0, got.err
    assert comparable(run) == comparable(tmp_path / "whole")
    one, other = (load_file(path / "encoder.safetensors") for path in (run, tmp_path / "whole"))
    assert all(one[name].equal(other[name]) for name in one)


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_one_process_ends_all(pretrain, tmp_path, monkeypatch, rank):
    from geoexplora.errors import DataError

    step = ExPLoRAPretrain.training_step

    def fail(self, batch, batch_idx):
        if self.global_rank == rank:
            raise DataError("tile 7 has 3 bands, not 13", "Remove it.")
        return step(self, batch, batch_idx)

    monkeypatch.setattr(ExPLoRAPretrain, "training_step", fail)
    got = pretrain(tmp_path / "r", *FORKED)
    assert got.status == 2, got.err
    assert got.err.endswith("geoexplora pretrain: tile 7 has 3 bands, not 13\nRemove it.\n")
    assert "Traceback" not in got.err
    assert not (tmp_path / "r/.failure").exists()


@pytest.mark.slow
def test_the_console_command_starts_its_processes(console, command, photo_run, tmp_path, comparable, pretrain):
    words = ("--init", photo_run, "--max-steps", "2")
    got = console(*command(tmp_path / "r", *words, "--strategy", "ddp", "--devices", "2"))
    assert got.returncode == 0, got.stderr
    assert got.stderr.count("what is trained") == 1
    assert got.stderr.count("2 of 2 steps done") == 1
    assert "Warning" not in got.stderr
    assert "GLOBAL_RANK" not in got.stderr
    assert pretrain(tmp_path / "forked", *words, *FORKED).status == 0
    assert comparable(tmp_path / "r") == comparable(tmp_path / "forked")


@pytest.mark.slow
def test_bad_data_in_a_process_of_its_own(console, command, own_tree, photo_run, tmp_path):
    for tile in list((own_tree / "fmow-sentinel/train").rglob("*.tif"))[10:]:
        tile.write_bytes(tile.read_bytes()[:200])
    words = ("--init", photo_run, "--strategy", "ddp", "--devices", "2")
    got = console(*command(tmp_path / "r", *words, root=own_tree))
    assert got.returncode == 2, got.stderr
    assert got.stderr.count("more than the bearable share of 10.0%") == 1
    assert "Traceback" not in got.stderr
