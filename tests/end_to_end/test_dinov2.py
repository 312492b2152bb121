"""DINOv2 through the command line: RGB and multispectral, what it leaves behind, resuming, collapse, bad input."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file

from geoexplora.datamodules.views import TrainView
from geoexplora.runs.metrics import read_metrics
from geoexplora.tasks.pretrain.dinov2 import ExPLoRADINOv2
from geoexplora.weights.files import read_weights

TINY = (
    "--objective", "dinov2", "--model", "vit_pico", "--image-size", "16", "--patch-size", "4", "--local-size", "8",
    "--local-crops", "2", "--prototypes", "32", "--head-hidden", "16", "--head-bottleneck", "8", "--rank", "4",
    "--batch-size", "4", "--effective-batch-size", "8", "--max-steps", "4", "--warmup-steps", "1", "--lr", "1e-2",
    "--freeze-last-steps", "1", "--teacher-warmup-steps", "2", "--drop-path", "0.1", "--weight-decay", "0.04",
    "--weight-decay-end", "0.4", "--log-every", "1", "--checkpoint-every", "2", "--probe-every", "0",
    "--accelerator", "cpu", "--precision", "32", "--num-workers", "0",
)  # fmt: skip

FILES = {
    "config.yaml", "run.json", "metrics.csv", "checkpoints/last.ckpt", "checkpoints/previous.ckpt",
    "encoder.safetensors", "heads.safetensors", "adapter/adapter_config.json", "adapter/adapter_model.safetensors",
    "adapter/trained.safetensors", "plots/loss.png", "plots/health.png", "plots/features.png",
    "plots/features-before.npz",
}  # fmt: skip

COLUMNS = {
    "loss", "dino_loss", "ibot_loss", "koleo_loss", "teacher_entropy", "teacher_mean_entropy", "teacher_student_kl",
    "teacher_temperature", "teacher_momentum", "lr", "weight_decay", "grad_norm", "feature_std", "feature_rank",
    "images_per_second",
}  # fmt: skip

Distill = Callable[..., Any]


@pytest.fixture(scope="session")
def dinov2(geoexplora, fmow_tree) -> Distill:
    """A tiny DINOv2 training on ten bands of the labelled tree; further words change the settings."""

    def run(output: Path, *more: object, root: Path = fmow_tree) -> Any:
        return geoexplora("pretrain", "--dataset", "fmow-sentinel", "--root", root, "--output", output, *TINY, *more)

    return run


@pytest.fixture(scope="session")
def rgb(geoexplora) -> Distill:
    """The same on photographs."""

    def run(output: Path, *more: object) -> Any:
        return geoexplora("pretrain", "--dataset", "photographs", "--mode", "explora", "--output", output, *TINY, *more)

    return run


@pytest.fixture(scope="module")
def spectral_run(dinov2, photo_run, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("dinov2") / "run"
    got = dinov2(output, "--init", photo_run, "--probe-every", "2")
    assert got.status == 0, got.err
    (output / "stderr.txt").write_text(got.err)
    return output


def files(run: Path) -> set[str]:
    return {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()} - {"stderr.txt"}


def without_clock(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "images_per_second"} for row in read_metrics(run / "metrics.csv")]


def test_multispectral(spectral_run):
    assert files(spectral_run) == FILES
    rows = read_metrics(spectral_run / "metrics.csv")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert set(rows[0]) == {"step", "knn"}
    assert all(row.keys() >= COLUMNS for row in rows[1:])
    assert [row["teacher_temperature"] for row in rows[1:]] == pytest.approx([0.04, 0.055, 0.07, 0.07])
    assert all(row["ibot_loss"] > 0 for row in rows[1:]), "tokens are hidden"
    assert rows[1]["teacher_momentum"] == pytest.approx(0.992)
    assert rows[1]["weight_decay"] == pytest.approx(0.04)
    parts = {part["part"]: part for part in json.loads((spectral_run / "run.json").read_text())["parameters"]}
    assert parts["heads"]["trainable"] == (128 * 16 + 16) + (16 * 16 + 16) + (16 * 8 + 8) + 32 * (8 + 1) + 128
    assert parts["patch embedding"]["trainable"] > 0, "new bands"
    assert "Warning" not in (spectral_run / "stderr.txt").read_text()


def test_the_exported_encoder_is_the_teachers(spectral_run, photo_run):
    saved = torch.load(spectral_run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    encoder = load_file(spectral_run / "encoder.safetensors")
    teacher = saved["model.teacher.encoder.blocks.7.mlp.fc1.weight"]
    assert encoder["blocks.7.mlp.fc1.weight"].equal(teacher)
    assert not teacher.equal(saved["model.student.encoder.blocks.7.mlp.fc1.weight"])
    frozen = load_file(photo_run / "encoder.safetensors")["blocks.3.mlp.fc1.weight"]
    assert encoder["blocks.3.mlp.fc1.weight"].equal(frozen)
    assert saved["model.student.encoder.blocks.3.mlp.fc1.weight"].data_ptr() == (
        saved["model.teacher.encoder.blocks.3.mlp.fc1.weight"].data_ptr()
    ), "a checkpoint holds what is frozen once"


def test_the_adapter_gives_the_same_encoder(spectral_run, photo_run, geoexplora, tmp_path):
    target = tmp_path / "merged.safetensors"
    got = geoexplora("export", spectral_run / "adapter", "--base", photo_run, "--format", "safetensors", "--output",
                     target)  # fmt: skip
    assert got.status == 0, got.err
    one, other = load_file(target), load_file(spectral_run / "encoder.safetensors")
    assert one.keys() == other.keys()
    assert all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)


def test_an_rgb_encoder_loads_into_stock_timm(rgb, photo_run, tmp_path):
    got = rgb(tmp_path / "r", "--init", photo_run)
    assert got.status == 0, got.err
    stock = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=128, depth=8, num_heads=4, num_classes=0
    )
    stock.load_state_dict(load_file(tmp_path / "r/encoder.safetensors"), strict=True)
    parts = {part["part"]: part for part in json.loads((tmp_path / "r/run.json").read_text())["parameters"]}
    assert parts["patch embedding"]["trainable"] == 0, "known bands keep their embedding"
    assert all(row["ibot_loss"] > 0 for row in read_metrics(tmp_path / "r/metrics.csv")), "tokens are hidden"


@pytest.mark.parametrize("words", [(), ("--centering", "sinkhorn", "--separate-heads"), ("--local-crops", "0")])
def test_resuming_repeats_the_whole_run(dinov2, geoexplora, photo_run, tmp_path, words):
    run, whole = tmp_path / "part", tmp_path / "whole"
    for output in (run, whole):
        got = dinov2(output, "--init", photo_run, *words)
        assert got.status == 0, got.err
    (run / "checkpoints/previous.ckpt").replace(run / "checkpoints/last.ckpt")
    got = geoexplora("pretrain", "--resume", run)
    assert got.status == 0, got.err
    assert without_clock(run) == without_clock(whole)
    one, other = (load_file(path / "encoder.safetensors") for path in (run, whole))
    assert all(one[name].equal(other[name]) for name in one)
    saved = [torch.load(path / "checkpoints/last.ckpt", weights_only=True)["state_dict"] for path in (run, whole)]
    assert all(saved[0][name].equal(saved[1][name]) for name in saved[0]), "heads and centers too"


@pytest.mark.parametrize("mode", ["full", "scratch"])
def test_other_modes(dinov2, photo_run, tmp_path, mode):
    source = () if mode == "scratch" else ("--init", photo_run)
    got = dinov2(tmp_path / "r", "--mode", mode, *source, "--max-steps", "1")
    assert got.status == 0, got.err
    parts = json.loads((tmp_path / "r/run.json").read_text())["parameters"]
    assert sum(part["frozen"] for part in parts) == 0
    assert not (tmp_path / "r/adapter").exists()


def test_the_source_brings_its_mask_token(rgb, tmp_path):
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=128, depth=8, num_heads=4,
                            num_classes=0, init_values=1.0)  # fmt: skip
    token = torch.randn(1, 128)
    torch.save(dict(vit.state_dict()) | {"mask_token": token}, tmp_path / "dinov2.pth")
    got = rgb(tmp_path / "r", "--init", tmp_path / "dinov2.pth", "--max-steps", "1", "--lr", "1e-9")
    assert got.status == 0, got.err
    saved = torch.load(tmp_path / "r/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert torch.allclose(saved["model.student.heads.mask_token"], token, atol=1e-5)


def test_a_run_brings_its_heads(dinov2, spectral_run, tmp_path):
    """Meta never released DINOv2's: what continues from a run of ours need not start anew."""
    heads = load_file(spectral_run / "heads.safetensors")
    assert {name.split(".")[0] for name in heads} == {"dino", "mask_token"}
    words = ("--init", spectral_run, "--max-steps", "1", "--lr", "1e-9")
    got = dinov2(tmp_path / "r", *words)
    assert got.status == 0, got.err
    assert "projection heads have other sizes" not in got.err
    again = load_file(tmp_path / "r/heads.safetensors")
    assert all(torch.allclose(again[name], heads[name], atol=1e-5) for name in heads)
    got = dinov2(tmp_path / "other", *words, "--prototypes", "64")
    assert got.status == 0, got.err
    assert "warning: the source's projection heads have other sizes" in got.err
    damaged = shutil.copytree(spectral_run, tmp_path / "damaged")
    (damaged / "heads.safetensors").write_bytes(b"cut off")
    assert read_weights(damaged).described().width == 128, "what needs no heads reads none"
    got = dinov2(tmp_path / "wrong", "--init", damaged)
    assert got.status == 2
    assert "heads.safetensors" in got.err
    got = dinov2(tmp_path / "wrong", "--init", spectral_run / "heads.safetensors")
    assert got.status == 2
    assert "holds the projection heads of a run" in got.err


@pytest.mark.parametrize("devices", ["2"])
def test_two_processes(dinov2, photo_run, tmp_path, monkeypatch, devices):
    def write(self: Any) -> None:
        torch.save(dict(self.state_dict()), tmp_path / f"rank{self.global_rank}.pt")

    monkeypatch.setattr(ExPLoRADINOv2, "on_train_end", write, raising=False)
    got = dinov2(tmp_path / "r", "--init", photo_run, "--strategy", "ddp_fork", "--devices", devices,
                 "--max-steps", "2", "--separate-heads")  # fmt: skip
    assert got.status == 0, got.err
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    assert all(first[name].equal(second[name]) for name in first), "students, teachers and centers agree"


def test_pixels_that_are_not_finite_are_named(dinov2, photo_run, tmp_path, monkeypatch):
    sample = TrainView.__getitem__

    def spoil(self: Any, key: Any) -> Any:
        found = sample(self, key)
        if found["index"] == 5:
            found["image"][0, 0, 0] = float("nan")
        return found

    monkeypatch.setattr(TrainView, "__getitem__", spoil)
    got = dinov2(tmp_path / "r", "--init", photo_run, "--max-steps", "9", "--log-every", "9", "--checkpoint-every", "9")
    assert got.status == 2, got.err
    assert "the loss is nan: pixels are NaN or infinite in " in got.err
    assert ".tif" in got.err
    assert "Traceback" not in got.err


def test_collapse_is_told(dinov2, photo_run, tmp_path, monkeypatch):
    from geoexplora.tasks import health

    monkeypatch.setattr(health, "SETTLED", 0)
    monkeypatch.setattr(health, "UNIFORM", 0.5)
    # A teacher at temperature 1 hardly prefers any prototype.
    hot = ("--teacher-temperature", "1", "--teacher-temperature-start", "1")
    got = dinov2(tmp_path / "r", "--init", photo_run, *hot)
    assert got.status == 0, got.err
    assert got.err.count("the teacher's outputs are almost uniform") == 1
    assert "lower --teacher-temperature" in got.err


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--image-size", "3"), "--image-size 3 is not a multiple of --patch-size 4. Near it: 4"),
        (("--local-size", "10"), "--local-size 10 is not a multiple of --patch-size 4. Near it: 8 or 12"),
        (("--local-size", "2"), "Near it: 4"),
        (("--local-size", "4"), "crops of 4 px are too small to be blurred"),
        (("--augmentation", "colour"), "--augmentation colour needs red, green and blue; fmow-sentinel is sentinel-2"),
        (("--local-crops", "-1"), "--local-crops -1 is negative"),
        (("--global-scale", "0.5,0.2"), "--global-scale 0.5,0.2: expected two shares"),
        (("--local-scale", "0,2"), "--local-scale 0,2: expected two shares"),
        (("--batch-size", "1"), "--batch-size 1 with KoLeo"),
        (("--teacher-temperature", "0"), "--teacher-temperature 0 must lie above 0"),
        (("--teacher-temperature-start", "-0.1"), "--teacher-temperature-start -0.1 must lie above 0"),
        (("--teacher-momentum", "1.1"), "--teacher-momentum 1.1 must lie between 0 and 1"),
        (("--mask-probability", "1.5"), "--mask-probability 1.5 is no share"),
        (("--mask-range", "0.5,0.1"), "--mask-range 0.5,0.1: expected two shares"),
        (("--prototypes", "1"), "--prototypes must be at least 2"),
        (("--head-hidden", "0"), "--head-hidden must be at least 1"),
        (("--drop-path", "1"), "--drop-path 1 must be at least 0 and below 1"),
        (("--layer-decay", "0"), "--layer-decay must be above 0"),
        (("--load-size", "0"), "--load-size 0 must be at least 1 pixel"),
        (("--centering", "batch"), "expected one of softmax, sinkhorn"),
    ],
)
def test_bad_settings(dinov2, photo_run, tmp_path, words, text):
    got = dinov2(tmp_path / "r", "--init", photo_run, *words)
    assert got.status == 2, got.err
    assert text in got.err
    assert "Traceback" not in got.err
    assert not (tmp_path / "r").exists()


def test_a_batch_without_hidden_tokens(dinov2, photo_run, tmp_path):
    got = dinov2(tmp_path / "r", "--init", photo_run, "--mask-probability", "0", "--max-steps", "2")
    assert got.status == 0, got.err
    assert "warning: no token is ever hidden" in got.err
    rows = read_metrics(tmp_path / "r/metrics.csv")
    assert [row["ibot_loss"] for row in rows] == [0.0, 0.0]
    assert np.isfinite([row["loss"] for row in rows]).all()


def test_a_batch_of_one_without_koleo(dinov2, photo_run, tmp_path):
    got = dinov2(tmp_path / "r", "--init", photo_run, "--batch-size", "1", "--effective-batch-size", "1",
                 "--koleo-weight", "0", "--max-steps", "1")  # fmt: skip
    assert got.status == 0, got.err


@pytest.mark.parametrize("words", [("--prototypes", "64"), ("--head-hidden", "32"), ("--separate-heads",)])
def test_a_resumed_run_keeps_its_heads(geoexplora, spectral_run, words):
    got = geoexplora("pretrain", "--resume", spectral_run, *words)
    assert got.status == 2, got.err
    assert f"{words[0]} " in got.err
    assert "differs from the run's" in got.err


def test_the_objective_of_a_run_stays(geoexplora, spectral_run):
    got = geoexplora("pretrain", "--resume", spectral_run, "--objective", "mae")
    assert got.status == 2, got.err
    assert "--objective mae differs from the run's dinov2" in got.err
