from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from geoexplora.errors import WeightsError
from geoexplora.weights.inspect import describe
from geoexplora.weights.spec import EncoderSpec
from geoexplora.weights.write import save_decoder, save_encoder

from .conftest import meta_mae, plain_vit


@pytest.fixture
def run(tmp_path: Path, group_spec: EncoderSpec) -> Path:
    tensors = {"cls_token": torch.zeros(1, 1, 128), "norm.weight": torch.zeros(128, dtype=torch.float16)}
    save_encoder(tmp_path / "encoder.safetensors", tensors, group_spec, step=20)
    save_decoder(tmp_path / "decoder.safetensors", {"norm.weight": torch.zeros(64)}, group_spec, {"width": 64}, step=20)
    record = {"source": {"name": "mae.pth", "sha256": "abc"}, "parameters": [{"part": "LoRA", "trained": 123456}]}
    (tmp_path / "run.json").write_text(json.dumps(record))
    (tmp_path / "metrics.csv").write_text("step\n")
    return tmp_path


def test_run(run: Path) -> None:
    description = describe(run)
    assert json.loads(json.dumps(description)) == description
    weights = description["weights"]
    assert description["kind"] == "run"
    assert weights["encoder"]["groups"] == [["B2", "B3", "B4", "B8"], ["B5", "B6", "B7", "B8A"], ["B11", "B12"]]
    assert weights["encoder"]["normalization"]["method"] == "clip-uint8"
    assert weights["decoder"] == {"width": 64}
    assert weights["values"] == {"encoder": 256, "decoder": 64}
    assert weights["dtypes"] == {"float32": 192, "float16": 128}
    assert weights["step"] == 20
    assert description["run"]["source"]["sha256"] == "abc"
    assert set(description["files"]) == {"encoder.safetensors", "decoder.safetensors", "run.json", "metrics.csv"}
    assert "tensors" not in weights


def test_tensors_of_both_parts(run: Path) -> None:
    tensors = describe(run, tensors=True)["weights"]["tensors"]
    assert list(tensors) == ["cls_token", "norm.weight", "decoder_norm.weight"]
    assert tensors["norm.weight"] == {"shape": [128], "dtype": "float16"}


def test_file(tmp_path: Path) -> None:
    torch.save(meta_mae(decoder=True), tmp_path / "mae.pth")
    description = describe(tmp_path / "mae.pth", tensors=True)
    weights = description["weights"]
    assert description["kind"] == "file"
    assert weights["format"] == "meta-mae"
    assert weights["bytes"] == (tmp_path / "mae.pth").stat().st_size
    assert weights["values"]["encoder"] == sum(value.numel() for value in plain_vit().state_dict().values())
    assert weights["tensors"]["cls_token"] == {"shape": [1, 1, 128], "dtype": "float32"}


def test_run_before_its_first_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    assert describe(tmp_path)["weights"] is None


def test_refuses(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"has no encoder.safetensors"):
        describe(tmp_path)
    with pytest.raises(WeightsError, match="no such file"):
        describe(tmp_path / "none")
    (tmp_path / "run.json").write_text("[1")
    with pytest.raises(WeightsError, match=r"cannot read .*run.json"):
        describe(tmp_path)
