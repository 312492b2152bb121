from __future__ import annotations

import argparse
import contextlib
import hashlib
import logging
import os
import pickle
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from geoexplora.bands import IMAGENET_STATISTICS
from geoexplora.errors import WeightsError
from geoexplora.transforms.normalization import Normalization
from geoexplora.weights.files import read_weights
from geoexplora.weights.load import load_encoder
from geoexplora.weights.spec import EncoderSpec
from geoexplora.weights.write import save_decoder, save_encoder

from .conftest import meta_mae, plain_vit


def test_meta_mae_is_described(tmp_path: Path) -> None:
    torch.save(meta_mae(decoder=True), tmp_path / "any_name.bin")
    source = read_weights(tmp_path / "any_name.bin")
    assert source.format == "meta-mae"
    assert source.sha256 == hashlib.sha256((tmp_path / "any_name.bin").read_bytes()).hexdigest()
    spec = source.spec
    assert spec is not None
    assert (spec.model, spec.image_size, spec.patch_size, spec.groups) == ("vit_pico", 64, 16, None)
    assert (spec.sensor, spec.bands) == ("rgb", ("R", "G", "B"))
    assert Normalization.from_dict(spec.normalization) == Normalization.from_statistics(
        "standardize", IMAGENET_STATISTICS
    )
    assert source.decoder == {"width": 64, "depth": 2}
    assert set(source.encoder_tensors) == set(plain_vit().state_dict())
    assert "mask_token" in source.decoder_tensors
    assert source.record() == {"name": "any_name.bin", "sha256": source.sha256, "format": "meta-mae"}


def test_meta_mae_without_decoder(tmp_path: Path) -> None:
    torch.save(meta_mae(decoder=False), tmp_path / "mae_pretrain.pth")
    source = read_weights(tmp_path / "mae_pretrain.pth")
    assert source.decoder is None
    assert source.decoder_tensors == {}


def test_training_checkpoint_with_its_command_line(tmp_path: Path) -> None:
    """MAE's own training checkpoints hold an argparse.Namespace, an optimizer and an epoch."""
    content = meta_mae(decoder=True) | {"args": argparse.Namespace(lr=0.1), "epoch": 3, "optimizer": {"state": {}}}
    torch.save(content, tmp_path / "checkpoint-3.pth")
    assert read_weights(tmp_path / "checkpoint-3.pth").format == "meta-mae"


def test_old_pickle_format(tmp_path: Path) -> None:
    torch.save(meta_mae(decoder=False), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert read_weights(tmp_path / "old.pth").format == "meta-mae"


def test_run_folder_brings_its_decoder(tmp_path: Path, rgb_spec: EncoderSpec) -> None:
    save_encoder(tmp_path / "encoder.safetensors", plain_vit().state_dict(), rgb_spec, step=7)
    save_decoder(tmp_path / "decoder.safetensors", {"mask_token": torch.ones(1, 1, 4)}, rgb_spec, {"width": 4}, step=7)
    run, file = read_weights(tmp_path), read_weights(tmp_path / "encoder.safetensors")
    assert list(run.decoder_tensors) == ["mask_token"]
    assert file.decoder_tensors == {}
    assert (run.step, run.decoder, file.decoder) == (7, {"width": 4}, None)
    assert run.sha256 == file.sha256
    assert run.record()["name"] == f"{tmp_path.name}/encoder.safetensors"


def test_parts_of_different_steps_are_told(
    tmp_path: Path, rgb_spec: EncoderSpec, caplog: pytest.LogCaptureFixture
) -> None:
    save_encoder(tmp_path / "encoder.safetensors", plain_vit().state_dict(), rgb_spec, step=8)
    save_decoder(tmp_path / "decoder.safetensors", {"mask_token": torch.ones(1, 1, 4)}, rgb_spec, {}, step=7)
    with caplog.at_level(logging.WARNING):
        read_weights(tmp_path)
    assert "encoder of step 8 beside decoder of step 7" in caplog.text


def test_code_in_a_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "attacked"),)

    torch.save({"model": Attack()}, tmp_path / "attack.pth")
    with pytest.raises(WeightsError, match=r"running code stored in it \(posix.mkdir\), which is refused"):
        read_weights(tmp_path / "attack.pth")
    (tmp_path / "bare.pkl").write_bytes(pickle.dumps({"model": Attack()}))
    with pytest.raises(WeightsError):
        read_weights(tmp_path / "bare.pkl")
    assert not (tmp_path / "attacked").exists()


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.999])
def test_truncated(tmp_path: Path, rgb_spec: EncoderSpec, share: float) -> None:
    torch.save(meta_mae(decoder=False), tmp_path / "whole.pth")
    save_encoder(tmp_path / "whole.safetensors", plain_vit().state_dict(), rgb_spec)
    for name in ("whole.pth", "whole.safetensors"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / f"cut-{name}").write_bytes(content[: int(share * len(content))])
        with pytest.raises(WeightsError, match=f"cut-{name}"):
            read_weights(tmp_path / f"cut-{name}")


@pytest.mark.parametrize(
    "content", [b"", b"not weights at all", b"\x80\x02garbage", b"\xff" * 8 + b"{", b"PK\x03\x04junk"]
)
def test_not_weights(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file.pth").write_bytes(content)
    with pytest.raises(WeightsError, match=r"file\.pth"):
        read_weights(tmp_path / "file.pth")


def test_damaged_pickles_never_crash(tmp_path: Path) -> None:
    """Bytes changed at random, by seed: refused or read, never an error that is not ours."""
    torch.save(meta_mae(decoder=False, image_size=16), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "short.pth").write_bytes(b"\x80\x02.")
    with pytest.raises(WeightsError, match=r"short\.pth"):
        read_weights(tmp_path / "short.pth")
    whole = (tmp_path / "old.pth").read_bytes()
    for seed in range(60):
        draw = random.Random(seed)
        content = bytearray(whole)
        for _ in range(20):
            content[draw.randrange(4000)] = draw.randrange(256)
        (tmp_path / "odd.pth").write_bytes(content)
        with contextlib.suppress(WeightsError):
            read_weights(tmp_path / "odd.pth")


def test_a_file_that_holds_itself(tmp_path: Path) -> None:
    content: dict[str, object] = {}
    content["model"] = content
    torch.save(content, tmp_path / "loop.pth")
    with pytest.raises(WeightsError, match="no known format"):
        read_weights(tmp_path / "loop.pth")


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.float8_e4m3fn])
def test_tensors_that_are_no_weights(tmp_path: Path, dtype: torch.dtype) -> None:
    content = meta_mae(decoder=False)
    content["model"]["norm.bias"] = torch.zeros(128).to(dtype)
    torch.save(content, tmp_path / "odd.pth")
    with pytest.raises(WeightsError, match=r"1 tensors of .*odd.pth are of type \w+: norm.bias"):
        load_encoder(tmp_path / "odd.pth")


def test_parts_of_a_run_that_are_no_encoder(tmp_path: Path, rgb_spec: EncoderSpec) -> None:
    save_decoder(tmp_path / "decoder.safetensors", {"mask_token": torch.ones(1, 1, 4)}, rgb_spec, {"width": 4})
    with pytest.raises(WeightsError, match=r"is the decoder of a run\nName the run's folder"):
        read_weights(tmp_path / "decoder.safetensors")
    torch.save({"geoexplora_source": None, "state_dict": {}}, tmp_path / "last.ckpt")
    with pytest.raises(WeightsError, match=r"is a checkpoint of a run(.|\n)*Name the run's folder"):
        read_weights(tmp_path / "last.ckpt")
    (tmp_path / "a.onnx").write_bytes(b"\x08\x08anything")
    with pytest.raises(WeightsError, match="graph of ONNX"):
        read_weights(tmp_path / "a.onnx")


def test_what_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "is_dir", forbidden)
    with pytest.raises(WeightsError, match=r"cannot read .*: Permission denied"):
        read_weights(tmp_path)


def test_corrupt_header(tmp_path: Path, rgb_spec: EncoderSpec) -> None:
    save_encoder(tmp_path / "a.safetensors", plain_vit().state_dict(), rgb_spec)
    content = bytearray((tmp_path / "a.safetensors").read_bytes())
    content[20:40] = b"}" * 20
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(WeightsError, match="is damaged"):
        read_weights(tmp_path / "a.safetensors")


def test_unknown_format_names_the_keys(tmp_path: Path) -> None:
    save_file({"conv1.weight": torch.zeros(1), "fc.bias": torch.zeros(1)}, tmp_path / "resnet.safetensors")
    with pytest.raises(WeightsError, match=r"first keys are: conv1.weight, fc.bias(.|\n)*mae_pretrain_vit"):
        read_weights(tmp_path / "resnet.safetensors")
    torch.save({"epoch": 3}, tmp_path / "odd.pth")
    with pytest.raises(WeightsError, match="first keys are: epoch"):
        read_weights(tmp_path / "odd.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(WeightsError, match="holds a list"):
        read_weights(tmp_path / "list.pth")


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no such file"):
        read_weights(tmp_path / "none.pth")
    with pytest.raises(WeightsError, match=r"has no encoder.safetensors"):
        read_weights(tmp_path)


def test_strange_entries_in_a_mae_file(tmp_path: Path) -> None:
    content = meta_mae(decoder=False)
    content["model"]["blocks.0.norm1.weight"] = "text"
    torch.save(content, tmp_path / "strange.pth")
    with pytest.raises(WeightsError, match=r"blocks.0.norm1.weight is no tensor"):
        read_weights(tmp_path / "strange.pth")
    content = meta_mae(decoder=False)
    content["model"]["pos_embed"] = torch.zeros(1, 12, 128)
    torch.save(content, tmp_path / "grid.pth")
    with pytest.raises(WeightsError, match="11 positions are no square grid"):
        read_weights(tmp_path / "grid.pth")
