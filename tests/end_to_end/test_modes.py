"""The three modes on one code path, and every kind of source for ``--init``."""

from __future__ import annotations

import json
import shutil

import pytest
import timm
import torch
from safetensors.torch import load_file

from geoexplora.models.decoder import MAEDecoder

WIDTH = 128
LORA_BLOCKS = range(1, 7)
"""0-based numbers of the blocks that carry LoRA in vit_pico with whole blocks 1 and L."""


@pytest.fixture
def meta_mae(tmp_path):
    """Writes a file as Meta's: a plain ViT at another image and patch size, with or without a decoder."""

    def write(decoder):
        torch.manual_seed(3)
        encoder = timm.create_model(
            "vit_tiny_patch16_224", img_size=64, embed_dim=WIDTH, depth=8, num_heads=4, num_classes=0
        )
        state = dict(encoder.state_dict())
        if decoder:
            parts = MAEDecoder(WIDTH, (4, 4), 16, None, 3, width=32, depth=1, heads=4).state_dict()
            state |= {name if name == "mask_token" else f"decoder_{name}": value for name, value in parts.items()}
        path = tmp_path / "mae.pth"
        torch.save({"model": state}, path)
        return path

    return write


def table(run):
    rows = json.loads((run / "run.json").read_text())["parameters"]
    return {row["part"]: (row["trainable"], row["frozen"]) for row in rows}


def test_frozen_tensors_are_those_of_the_source(explora_run, photo_run):
    before, after = (load_file(run / "encoder.safetensors") for run in (photo_run, explora_run))
    for block in LORA_BLOCKS:
        for part in ("attn.proj", "mlp.fc1", "mlp.fc2"):
            for kind in ("weight", "bias"):
                name = f"blocks.{block}.{part}.{kind}"
                assert after[name].equal(before[name]), name
        (q, k, v), (old_q, old_k, old_v) = (t[f"blocks.{block}.attn.qkv.weight"].chunk(3) for t in (after, before))
        assert k.equal(old_k)
        assert not q.equal(old_q)
        assert not v.equal(old_v)
        assert after[f"blocks.{block}.attn.qkv.bias"].equal(before[f"blocks.{block}.attn.qkv.bias"])
    trained = ["norm.weight", "cls_token", "blocks.3.norm1.weight", *(f"blocks.{b}.mlp.fc1.weight" for b in (0, 7))]
    assert not any(after[name].equal(before[name]) for name in trained)


def test_modes_train_what_they_say(pretrain, explora_run, photo_run, tmp_path):
    words = ("--max-steps", "1")
    assert pretrain(tmp_path / "full", "--mode", "full", "--init", photo_run, *words).status == 0
    assert pretrain(tmp_path / "scratch", "--mode", "scratch", *words).status == 0
    full, scratch, explora = table(tmp_path / "full"), table(tmp_path / "scratch"), table(explora_run)
    assert full == scratch
    assert "LoRA" not in full
    assert full["whole blocks"][1] == 0
    assert full["position encoding"][0] == full["channel encoding"][0] == 0, "fixed sin-cos, as in MAE"
    assert explora["LoRA"] == (6 * 2 * 2 * WIDTH * 4, 0)
    assert explora["other block weights"][0] == 0
    assert sum(row[0] for row in explora.values()) < sum(row[0] for row in full.values())
    assert not (tmp_path / "full/adapter").exists()
    first, second = (load_file(tmp_path / mode / "encoder.safetensors") for mode in ("full", "scratch"))
    assert not first["blocks.3.mlp.fc1.weight"].equal(second["blocks.3.mlp.fc1.weight"])


def test_no_lora_and_no_whole_blocks(pretrain, photo_run, tmp_path):
    words = ("--init", photo_run, "--max-steps", "1")
    assert pretrain(tmp_path / "a", *words, "--rank", "0", "--decoder-rank", "0", "--whole-blocks", "L").status == 0
    assert pretrain(tmp_path / "b", *words, "--whole-blocks", "none").status == 0
    assert "LoRA" not in table(tmp_path / "a")
    assert "whole blocks" not in table(tmp_path / "b")


def test_a_run_folder_brings_its_decoder(explora_run, pretrain, tmp_path, photo_run):
    record = json.loads((explora_run / "run.json").read_text())["source"]
    assert record["decoder_loaded"]
    assert record["new_outputs"], "ten bands instead of three"
    assert record["new_bands"]
    got = pretrain(tmp_path / "r", "--init", explora_run, "--max-steps", "1")
    assert got.status == 0, got.err
    again = json.loads((tmp_path / "r/run.json").read_text())["source"]
    assert again["decoder_loaded"]
    assert not again["new_outputs"]
    assert not again["new_bands"]
    assert again["band_init"] is None


def test_a_file_alone_has_no_decoder(pretrain, photo_run, tmp_path):
    got = pretrain(tmp_path / "r", "--init", photo_run / "encoder.safetensors", "--max-steps", "1")
    assert got.status == 0, got.err
    assert "the source has no decoder: it starts from random weights and is trained whole" in got.err
    assert table(tmp_path / "r")["decoder"][0] > table(tmp_path / "r")["decoder"][1]


def test_a_decoder_of_another_size_is_not_taken(pretrain, photo_run, tmp_path):
    got = pretrain(tmp_path / "r", "--init", photo_run, "--decoder-depth", "2", "--max-steps", "1")
    assert got.status == 0, got.err
    assert "warning: the source's decoder has another size (width 32, depth 1, heads 4" in got.err


@pytest.mark.parametrize("decoder", [False, True])
def test_metas_mae(pretrain, meta_mae, tmp_path, decoder):
    got = pretrain(tmp_path / "r", "--init", meta_mae(decoder), "--max-steps", "1")
    assert got.status == 0, got.err
    state = json.loads((tmp_path / "r/run.json").read_text())["source"]
    assert state["source"]["name"] == "mae.pth"
    assert state["source"]["format"] == "meta-mae"
    assert state["decoder_loaded"] is decoder
    assert state["encoder"]["resampled"]["patch_embed.0.proj.weight"] == "patch 16 to 8 (pseudo-inverse)"
    assert "rgb-by-name" in state["encoder"]["converted"]["patch_embed.0.proj.weight"]
    frozen = torch.load(tmp_path / "mae.pth", weights_only=True)["model"]["blocks.3.mlp.fc1.weight"]
    assert load_file(tmp_path / "r/encoder.safetensors")["blocks.3.mlp.fc1.weight"].equal(frozen)


def test_metas_mae_on_rgb(geoexplora, meta_mae, photo_run, tmp_path):
    words = ("--config", photo_run / "config.yaml", "--mode", "explora", "--rank", "4", "--max-steps", "1")
    got = geoexplora("pretrain", *words, "--init", meta_mae(True), "--patch-size", "8", "--output", tmp_path / "r")
    assert got.status == 0, got.err
    state = json.loads((tmp_path / "r/run.json").read_text())["source"]
    assert not state["new_bands"]
    assert state["encoder"]["resampled"].keys() == {"patch_embed.proj.weight", "pos_embed"}
    assert table(tmp_path / "r")["patch embedding"][0] == 0, "known bands keep their embedding"


@pytest.mark.parametrize("policy", ["mean", "nearest-wavelength", "random"])
def test_policies_for_new_bands(pretrain, photo_run, tmp_path, policy):
    got = pretrain(tmp_path / "r", "--init", photo_run, "--band-init", policy, "--max-steps", "1")
    assert got.status == 0, got.err
    record = json.loads((tmp_path / "r/run.json").read_text())
    assert record["source"]["band_init"] == policy
    assert record["source"]["encoder"]["converted"]["patch_embed.2.proj.weight"].startswith(policy)


def test_sources_that_do_not_fit(pretrain, photo_run, tmp_path, explora_run):
    for name, words, text in [
        ("depth", ("--model", "vit_tiny"), "--model vit_pico"),
        ("groups", ("--init", explora_run, "--groups", "B2,B3,B4,B5,B6;B7,B8,B8A,B11,B12"), "channel groups"),
    ]:
        got = pretrain(tmp_path / name, "--init", photo_run, *words)
        assert got.status == 2, got.err
        assert text in got.err
        assert "Traceback" not in got.err
        assert not (tmp_path / name).exists(), "wrong input leaves nothing behind"


def test_damaged_sources(pretrain, photo_run, tmp_path):
    broken = tmp_path / "encoder.safetensors"
    broken.write_bytes((photo_run / "encoder.safetensors").read_bytes()[:5000])
    got = pretrain(tmp_path / "r", "--init", broken)
    assert got.status == 2
    assert "encoder.safetensors is damaged" in got.err
    (tmp_path / "notes.txt").write_text("not weights")
    got = pretrain(tmp_path / "r", "--init", tmp_path / "notes.txt")
    assert got.status == 2
    assert "notes.txt is not a weights file" in got.err
    shutil.copytree(photo_run, tmp_path / "empty", ignore=shutil.ignore_patterns("*.safetensors"))
    got = pretrain(tmp_path / "r", "--init", tmp_path / "empty")
    assert got.status == 2
    assert "has no encoder.safetensors" in got.err
