"""``geoexplora inspect`` of runs, of their files, and of others' files."""

from __future__ import annotations

import json

import pytest
import timm
import torch


def test_a_run(geoexplora, explora_run):
    got = geoexplora("inspect", explora_run)
    assert got.status == 0
    assert got.err == ""
    for text in ("group_channel_vit_pico", "B2, B3, B4, B8; B5, B6, B7, B8A; B11, B12", "clip-uint8", "rgb-by-name"):
        assert text in got.out


def test_as_json(geoexplora, explora_run):
    found = json.loads(geoexplora("inspect", explora_run, "--json").out)
    assert found["kind"] == "run"
    assert found["weights"]["step"] == 4
    assert found["weights"]["decoder"]["width"] == 32
    assert found["run"]["metrics"]["step"] == 4
    assert found["files"].keys() >= {"config.yaml", "adapter/trained.safetensors"}


def test_a_file_and_its_tensors(geoexplora, photo_run):
    file = photo_run / "encoder.safetensors"
    assert "blocks.0.attn.qkv.weight" not in geoexplora("inspect", file).out
    got = geoexplora("inspect", file, "--tensors")
    assert got.status == 0
    assert any("blocks.0.attn.qkv.weight" in line and "384 x 128" in line for line in got.out.splitlines())
    assert "R, G, B" in got.out


@pytest.mark.parametrize("words", [(), ("--json",), ("--tensors",)])
def test_metas_mae(geoexplora, tmp_path, words):
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    torch.save({"model": model.state_dict()}, tmp_path / "mae_pretrain_vit_tiny.pth")
    got = geoexplora("inspect", tmp_path / "mae_pretrain_vit_tiny.pth", *words)
    assert got.status == 0, got.err
    assert "meta-mae" in got.out
    assert "vit_tiny" in got.out


def test_what_is_no_weights(geoexplora, tmp_path):
    (tmp_path / "text").write_text("hello")
    for path, text in [
        ("text", "is not a weights file"),
        ("nowhere", "no such file"),
        (".", "has no encoder.safetensors"),
    ]:
        got = geoexplora("inspect", tmp_path / path)
        assert got.status == 2
        assert text in got.err
        assert got.out == ""
