"""Bad input: one clear message with the remedy, exit status 2, nothing lost."""

from __future__ import annotations

import resource
import shutil
from contextlib import contextmanager

import numpy as np
import pytest
import rasterio
import torch
import yaml

from geoexplora.runs.metrics import read_metrics


@pytest.fixture
def refused(pretrain, tmp_path):
    """Run pretrain, expecting a message of the wanted words, and no folder."""

    def run(*words, root, contains):
        output = tmp_path / "refused"
        got = pretrain(output, *words, root=root)
        assert got.status == 2, got.err
        assert "Traceback" not in got.err
        message = got.err[got.err.index("geoexplora pretrain: ") :]
        for text in contains:
            assert text in message
        assert len(message.splitlines()) > 1 or ". " in message, "a remedy follows"
        assert not output.exists()
        return message

    return run


def rewrite(path, image):
    """Replace a tile by another image (C, h, w)."""
    with rasterio.open(
        path, "w", driver="GTiff", width=image.shape[2], height=image.shape[1], count=len(image), dtype=image.dtype
    ) as file:
        file.write(image)


def tiles(root, split="train"):
    return sorted((root / "fmow-sentinel" / split).rglob("*.tif"))


def test_no_csv(refused, own_tree, tmp_path):
    for file in own_tree.glob("*.csv"):
        file.unlink()
    refused(root=own_tree, contains=["train.csv", str(own_tree)])
    refused(root=tmp_path / "nowhere", contains=["nowhere does not exist"])


def test_a_missing_column(refused, own_tree):
    text = (own_tree / "train.csv").read_text()
    (own_tree / "train.csv").write_text(text.replace("location_id", "place", 1))
    refused(root=own_tree, contains=["location_id", "place", "train.csv"])


def test_no_rows_after_filters(refused, own_tree):
    refused("--years", "2001,2002", root=own_tree, contains=["no tile is left of the 53 rows", "years 2001 to 2002"])


def test_missing_files(refused, own_tree, pretrain, tmp_path):
    gone = tiles(own_tree)[:7]
    for path in gone:
        path.unlink()
    message = refused(root=own_tree, contains=["7 of the 53 tiles", "--missing skip"])
    assert sum(str(path) in message for path in gone) == 5
    got = pretrain(tmp_path / "r", "--missing", "skip", "--max-steps", "1", root=own_tree)
    assert got.status == 0, got.err
    assert "warning: 7 of the 53 tiles" in got.err
    assert "46 images" in got.err


@pytest.mark.parametrize("workers", ["0", "2"])
def test_unreadable_tiles(pretrain, own_tree, tmp_path, workers):
    images = tiles(own_tree)
    images[0].write_bytes(images[0].read_bytes()[:300])
    rewrite(images[1], np.zeros((13, 16, 16), dtype=np.uint16))
    rewrite(images[2], np.full((13, 16, 16), np.nan, dtype=np.float32))
    words = ("--max-steps", "8", "--num-workers", workers)
    got = pretrain(tmp_path / "r", *words, root=own_tree)
    assert got.status == 0, got.err
    for path in images[:3]:
        assert got.err.count(f"warning: {path} cannot be used") == 1
    assert got.err.count("cannot be used") == 3
    got = pretrain(tmp_path / "s", *words, "--max-unreadable", "0.02", root=own_tree)
    assert got.status == 2
    assert "2 of 53 tiles" in got.err
    assert "more than the bearable share of 2.0%" in got.err
    assert "Traceback" not in got.err
    assert all(row["loss"] > 0 for row in read_metrics(tmp_path / "r/metrics.csv"))


@pytest.mark.parametrize("workers", ["0", "2"])
def test_the_wrong_number_of_bands(pretrain, own_tree, tmp_path, workers):
    rewrite(tiles(own_tree)[5], np.ones((3, 16, 16), dtype=np.uint16))
    got = pretrain(tmp_path / "r", "--max-steps", "8", "--num-workers", workers, root=own_tree)
    assert got.status == 2
    assert got.err.splitlines()[-2] == f"geoexplora pretrain: {tiles(own_tree)[5]} has 3 bands, not 13"
    assert "Traceback" not in got.err


@pytest.mark.parametrize(
    ("words", "contains"),
    [
        (("--bands", "B2,B99"), ["B99"]),
        (("--bands", "B2,B3", "--groups", "B2,B3;B3"), ["--groups", "B3"]),
        (("--dataset", "fmow-sentinal"), ["Did you mean fmow-sentinel?"]),
        (("--rank", "200"), ["--rank 200 is above the width of vit_pico, 128"]),
        (("--whole-blocks", "1,9"), ["whole block 9 is out of range", "1 to 8"]),
        (("--image-size", "20"), ["--image-size 20 is not a multiple of --patch-size 8", "16 or 24"]),
        (("--accelerator", "gpu", "--devices", "63"), ["devices"]),
        (("--strategy", "telepathy"), ["--strategy"]),
        (("--decoder-width", "36", "--decoder-heads", "9"), ["decoder"]),
    ],
)
def test_settings(refused, fmow_tree, words, contains):
    refused(*words, root=fmow_tree, contains=contains)


def test_all_errors_of_a_recipe_at_once(refused, fmow_tree, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("rnak: 8\nepochs: many\nmask_ratio: 2\n")
    message = refused("--config", recipe, "--image-size", "17", root=fmow_tree, contains=["4 settings are wrong"])
    for text in ("mine.yaml line 1: unknown key 'rnak'", "Did you mean rank", "epochs", "--mask-ratio 2", "17"):
        assert text in message


def test_an_output_that_holds_a_run(pretrain, geoexplora, explora_run, tmp_path):
    run = shutil.copytree(explora_run, tmp_path / "run")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    got = pretrain(run)
    assert got.status == 2
    assert "already holds a run" in got.err
    assert "--resume" in got.err
    got = geoexplora("pretrain", "--resume", run, "--rank", "2")
    assert got.status == 2
    assert "--rank 2 differs from the run's 4" in got.err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_an_output_that_cannot_be_written(pretrain, tmp_path):
    (tmp_path / "file").write_text("")
    for output in ("/proc/geoexplora", tmp_path / "file", tmp_path / "file/run"):
        got = pretrain(output)
        assert got.status == 2
        assert str(output) in got.err
        assert "Traceback" not in got.err


@contextmanager
def file_size_limit(size):
    """The operating system refuses to write more than so many bytes to a file, as on a full disk."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_a_full_disk_during_a_checkpoint(pretrain, geoexplora, photo_run, tmp_path, comparable):
    words = ("--init", photo_run, "--max-steps", "6")
    assert pretrain(tmp_path / "whole", *words).status == 0
    run = tmp_path / "run"
    assert pretrain(run, *words).status == 0
    (run / "checkpoints/previous.ckpt").replace(run / "checkpoints/last.ckpt")  # as if stopped at step 4
    good = (run / "checkpoints/last.ckpt").read_bytes()
    with file_size_limit(100_000):
        got = geoexplora("pretrain", "--resume", run)
    assert got.status == 2, got.err
    assert "last.ckpt" in got.err
    assert "--resume" in got.err
    assert "Traceback" not in got.err
    assert (run / "checkpoints/last.ckpt").read_bytes() == good
    assert not [path for path in run.rglob("*") if path.name.endswith(".tmp")]
    got = geoexplora("pretrain", "--resume", run)
    assert got.status == 0, got.err
    assert comparable(run) == comparable(tmp_path / "whole")


def test_a_training_that_diverges(pretrain, geoexplora, photo_run, tmp_path, monkeypatch):
    run = tmp_path / "run"
    words = ("--init", photo_run, "--max-steps", "40", "--lr", "1e30", "--warmup-steps", "0")
    got = pretrain(run, *words)
    assert got.status == 2, got.err
    assert "the loss is" in got.err
    assert "lower --lr" in got.err
    got = pretrain(tmp_path / "unseen", *words, "--log-every", "40", "--checkpoint-every", "3")
    assert got.status == 2, got.err
    assert "the training diverged" in got.err
    checkpoints = list((tmp_path / "unseen").rglob("*.ckpt"))
    for path in checkpoints:
        weights = torch.load(path, weights_only=True)["state_dict"].values()
        assert all(value.isfinite().all() for value in weights if value.is_floating_point())


def test_config_is_kept_as_it_was_given(explora_run, photo_run):
    config = yaml.safe_load((explora_run / "config.yaml").read_text())
    assert config["init"] == str(photo_run)
    assert "resume" not in config
