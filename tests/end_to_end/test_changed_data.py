from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from geoexplora.cli.main import main

SETTINGS = (
    *("--dataset", "fmow-sentinel", "--config", "pretrain/fmow-sentinel-cpu", "--model", "vit_pico"),
    *("--image-size", "16", "--batch-size", "4", "--effective-batch-size", "4", "--max-steps", "3"),
    *("--checkpoint-every", "2", "--num-workers", "0", "--mode", "scratch"),
)


@pytest.fixture
def own_copy(fmow_tree: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(fmow_tree, tmp_path / "tree"))


def test_resuming_on_other_rows_is_refused(own_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert main(["pretrain", *SETTINGS, "--root", str(own_copy), "--output", str(run), "--probe-every", "0"]) == 0
    before = (run / "metrics.csv").read_text()
    table = own_copy / "train.csv"
    table.write_text("\n".join(table.read_text().splitlines()[:-1]) + "\n")
    assert main(["pretrain", "--resume", str(run), "--max-steps", "5"]) == 2
    assert "the training data have changed since this run was started" in capsys.readouterr().err
    assert (run / "metrics.csv").read_text() == before


def test_validation_split_without_files_only_turns_the_probe_off(
    own_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(own_copy / "fmow-sentinel" / "val")
    output = str(tmp_path / "run")
    assert main(["pretrain", *SETTINGS, "--root", str(own_copy), "--output", output, "--probe-every", "2"]) == 0
    assert "no kNN probe" in capsys.readouterr().err


def test_missing_gpu_is_an_error_of_the_user(
    fmow_tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["pretrain", *SETTINGS, "--root", str(fmow_tree), "--output", str(tmp_path / "run")]
    assert main([*words, "--accelerator", "gpu"]) == 2
    assert "these devices cannot be used" in capsys.readouterr().err
