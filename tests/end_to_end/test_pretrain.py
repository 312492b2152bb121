"""``geoexplora pretrain``: the shipped recipe, the run folder, and repeating a run."""

from __future__ import annotations

import json

import peft
import pytest
import timm
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

from geoexplora.explora.attention import SplitAttention
from geoexplora.runs.metrics import TIMING_COLUMNS, read_metrics
from geoexplora.tasks.pretrain.exports import RunExport
from geoexplora.weights.load import load_encoder

FILES = {
    "config.yaml",
    "run.json",
    "metrics.csv",
    "checkpoints/last.ckpt",
    "encoder.safetensors",
    "decoder.safetensors",
    "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
    "adapter/trained.safetensors",
    "plots/loss.png",
    "plots/health.png",
    "plots/features.png",
    "plots/features-before.npz",
    "plots/reconstruction.png",
}


def files(run):
    return {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}


def test_shipped_recipe_with_a_few_overrides(geoexplora, varied_tree, tmp_path):
    few = ("--model", "vit_tiny", "--max-steps", "2", "--batch-size", "4", "--image-size", "32")
    got = geoexplora("pretrain", "--dataset", "fmow-sentinel", "--root", varied_tree, "--output", tmp_path / "r", *few)
    assert got.status == 0, got.err
    assert "warning: the effective batch size is lowered from 1024 to" in got.err
    config = yaml.safe_load((tmp_path / "r/config.yaml").read_text())
    assert (config["precision"], config["whole_blocks"], config["rank"]) == ("bf16", [1, "L"], 32)
    assert files(tmp_path / "r") >= FILES
    assert [row["step"] for row in read_metrics(tmp_path / "r/metrics.csv")] == [0, 1, 2]


def test_the_command_of_the_design(geoexplora, unlabelled_tree, tmp_path):
    words = ("--model", "vit_base", "--whole-blocks", "1,L", "--rank", "32", "--output", tmp_path / "a")
    small = ("--max-steps", "1", "--batch-size", "2", "--effective-batch-size", "2", "--decoder-depth", "1")
    got = geoexplora("pretrain", "--dataset", "fmow-sentinel", "--root", unlabelled_tree, *words, *small)
    assert got.status == 0, got.err
    parts = {row["part"]: row["trainable"] for row in json.loads((tmp_path / "a/run.json").read_text())["parameters"]}
    assert parts["LoRA"] == 10 * 2 * 2 * 768 * 32
    assert parts["whole blocks"] == 2 * 7_087_872
    assert [row["step"] for row in read_metrics(tmp_path / "a/metrics.csv")] == [1], "no labels, no probe"
    (tmp_path / "a/checkpoints/last.ckpt").unlink()  # several hundred MB


def test_a_warm_up_longer_than_the_run_is_cut(pretrain, tmp_path, comparable):
    got = pretrain(tmp_path / "r", "--warmup-steps", "100", "--max-steps", "2")
    assert got.status == 0
    assert got.err.count("the warm-up of 100 steps is cut to 1: there are only 2 steps") == 1
    assert [row["lr"] for row in comparable(tmp_path / "r")] == [1e-2 * 8 / 256] * 2


def test_the_run_folder_is_complete_after_each_checkpoint(pretrain, photo_run, tmp_path, monkeypatch):
    seen = []
    export = RunExport.__call__

    def watch(self, trainer, task):
        export(self, trainer, task)
        with safe_open(tmp_path / "r/encoder.safetensors", "pt") as file:
            step = int(file.metadata()["step"])
        saved = torch.load(tmp_path / "r/checkpoints/last.ckpt", weights_only=True)["global_step"]
        seen.append((step, saved, json.loads((tmp_path / "r/run.json").read_text())["step"], files(tmp_path / "r")))

    monkeypatch.setattr(RunExport, "__call__", watch)
    assert pretrain(tmp_path / "r", "--init", photo_run).status == 0
    assert [entry[:3] for entry in seen] == [(2, 2, 2), (4, 4, 4)]
    assert all(entry[3] >= FILES for entry in seen)
    assert files(tmp_path / "r") == FILES | {"checkpoints/previous.ckpt"}, "nothing is left over"


def test_the_configuration_repeats_the_run(geoexplora, explora_run, tmp_path, comparable):
    got = geoexplora("pretrain", "--config", explora_run / "config.yaml", "--output", tmp_path / "again")
    assert got.status == 0, got.err
    assert comparable(tmp_path / "again") == comparable(explora_run)
    for name in ("encoder.safetensors", "decoder.safetensors", "adapter/adapter_model.safetensors"):
        first, second = load_file(explora_run / name), load_file(tmp_path / "again" / name)
        assert first.keys() == second.keys()
        assert all(first[key].equal(second[key]) for key in first)


def test_the_record(explora_run, photo_run):
    record = json.loads((explora_run / "run.json").read_text())
    assert record["environment"]["packages"].keys() >= {"torch", "timm", "peft", "torchgeo", "geoexplora"}
    source = record["source"]["source"]
    assert source["format"] == "geoexplora"
    assert len(source["sha256"]) == 64
    assert record["source"]["band_init"] == "rgb-by-name"
    assert record["bands"] == ["B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "B11", "B12"]
    assert record["groups"] == [["B2", "B3", "B4", "B8"], ["B5", "B6", "B7", "B8A"], ["B11", "B12"]]
    assert {row["part"] for row in record["parameters"]} >= {"whole blocks", "LoRA", "norms", "patch embedding"}
    assert record["metrics"]["step"] == 4
    assert record["metrics"].keys() >= {"loss", "lr", "grad_norm", "feature_std", "feature_rank", "knn"}


def test_the_metrics(explora_run):
    rows = read_metrics(explora_run / "metrics.csv")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert ["knn" in row for row in rows] == [True, False, True, False, True]
    header = (explora_run / "metrics.csv").read_text().splitlines()[0].split(",")
    assert header[-1] in TIMING_COLUMNS
    for row in rows[1:]:
        assert row["loss"] > 0
        assert row["grad_norm"] > 0
        assert 0 < row["feature_std"] <= 1.01
        assert 1 <= row["feature_rank"] <= 8, "eight images a step"
        assert row["images_per_second"] > 0


def test_the_header_of_the_encoder(explora_run, photo_run):
    with safe_open(explora_run / "encoder.safetensors", "pt") as file:
        header = file.metadata()
    assert header["timm_name"] == "group_channel_vit_pico"
    assert (header["image_size"], header["patch_size"], header["units"]) == ("16", "8", header["units"])
    assert json.loads(header["bands"])[0] == "B2"
    assert len(json.loads(header["groups"])) == 3
    assert json.loads(header["normalization"])["method"] == "clip-uint8"
    assert (
        json.loads(header["source"])["sha256"]
        == json.loads((explora_run / "run.json").read_text())["source"]["source"]["sha256"]
    )
    assert header["band_init"] == "rgb-by-name"


def test_an_rgb_encoder_loads_into_stock_timm(photo_run):
    with safe_open(photo_run / "encoder.safetensors", "pt") as file:
        header = file.metadata()
    assert header["timm_name"] == "vit_tiny_patch16_224"
    model = timm.create_model(header["timm_name"], **json.loads(header["timm_args"]))
    model.load_state_dict(load_file(photo_run / "encoder.safetensors"), strict=True)
    assert model(torch.zeros(1, 3, 16, 16)).shape == (1, 128)


def test_a_group_channel_encoder_loads_into_the_registered_model(explora_run):
    with safe_open(explora_run / "encoder.safetensors", "pt") as file:
        header = file.metadata()
    model = timm.create_model(header["timm_name"], **json.loads(header["timm_args"]))
    model.load_state_dict(load_file(explora_run / "encoder.safetensors"), strict=True)
    assert model(torch.zeros(1, 10, 16, 16)).shape == (1, 128)


def test_the_adapter_opens_with_stock_peft(geoexplora, photo_run, tmp_path):
    words = ("--dataset", "photographs", "--init", photo_run, "--config", photo_run / "config.yaml")
    change = ("--mode", "explora", "--rank", "4", "--output", tmp_path / "r")
    got = geoexplora("pretrain", *words, *change)
    assert got.status == 0, got.err
    _, spec = load_encoder(tmp_path / "r")
    plain = timm.create_model(spec.timm_name, attn_layer=SplitAttention, **spec.timm_args)
    adapted = peft.PeftModel.from_pretrained(plain, tmp_path / "r/adapter")
    lora = load_file(tmp_path / "r/adapter/adapter_model.safetensors")
    found = {name: value for name, value in adapted.state_dict().items() if ".lora_" in name}
    assert len(found) == len(lora) == 6 * 2 * 2
    assert all(found[name.replace(".weight", ".default.weight")].equal(value) for name, value in lora.items())
    trained = load_file(tmp_path / "r/adapter/trained.safetensors")
    assert not any(name.startswith("blocks.3.attn") for name in trained), "only what was trained"
    assert "blocks.0.attn.qkv.weight" in trained


def test_a_batch_of_one(pretrain, tmp_path):
    words = ("--batch-size", "1", "--effective-batch-size", "1", "--max-steps", "2")
    got = pretrain(tmp_path / "r", *words)
    assert got.status == 0, got.err
    assert "feature_std" not in read_metrics(tmp_path / "r/metrics.csv")[0], "there is no spread of one image"


def test_bf16(pretrain, photo_run, tmp_path, explora_run):
    got = pretrain(tmp_path / "r", "--init", photo_run, "--precision", "bf16", "--max-steps", "2")
    assert got.status == 0, got.err
    tensors = load_file(tmp_path / "r/encoder.safetensors")
    assert all(value.dtype == torch.float32 for value in tensors.values()), "weights stay in single precision"
    first = next(row["loss"] for row in read_metrics(tmp_path / "r/metrics.csv") if row["step"] == 1)
    reference = next(row["loss"] for row in read_metrics(explora_run / "metrics.csv") if row["step"] == 1)
    assert first == pytest.approx(reference, rel=0.02)
    assert first != reference


def test_gradient_checkpointing_changes_nothing(pretrain, photo_run, tmp_path, explora_run, comparable):
    assert pretrain(tmp_path / "r", "--init", photo_run, "--grad-checkpointing").status == 0
    losses = [[row["loss"] for row in comparable(run) if "loss" in row] for run in (tmp_path / "r", explora_run)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_spatial_masks_and_the_reference_pairing(pretrain, photo_run, tmp_path, comparable):
    words = ("--init", photo_run, "--max-steps", "2")
    losses = []
    for number, more in enumerate([(), ("--mask", "spatial"), ("--pairing", "reference"), ("--no-norm-pix-loss",)]):
        assert pretrain(tmp_path / str(number), *words, *more).status == 0
        losses.append(comparable(tmp_path / str(number))[0]["loss"])
    assert len(set(losses)) == 4


def test_the_probe_warns_when_features_get_worse(pretrain, photo_run, tmp_path, monkeypatch):
    falling = iter([0.9, 0.5, 0.95])
    monkeypatch.setattr("geoexplora.tasks.pretrain.callbacks.KNNProbe._accuracy", lambda *_: next(falling))
    got = pretrain(tmp_path / "r", "--init", photo_run, "--probe-every", "2")
    assert got.status == 0
    assert got.err.count("warning: the kNN probe fell to 0.5000 at step 2, below the 0.9000 of the start") == 1


def test_no_probe_without_labels(pretrain, unlabelled_tree, tmp_path):
    got = pretrain(tmp_path / "r", "--max-steps", "2", "--probe-every", "1", root=unlabelled_tree)
    assert got.status == 0, got.err
    assert "kNN" not in got.err
    assert "knn" not in (tmp_path / "r/metrics.csv").read_text()
