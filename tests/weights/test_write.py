from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import geoexplora.weights.write as write
from geoexplora.errors import RunError, WeightsError
from geoexplora.weights.files import read_weights
from geoexplora.weights.spec import EncoderSpec

from .conftest import plain_vit


def test_header(tmp_path: Path, group_spec: EncoderSpec) -> None:
    write.save_encoder(tmp_path / "e.safetensors", {"cls_token": torch.ones(1)}, group_spec, step=12)
    with safe_open(tmp_path / "e.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata["step"] == "12"
    assert metadata["groups"].startswith('[["B2", "B3", "B4", "B8"]')
    assert {"model", "image_size", "patch_size", "bands", "normalization", "units"} <= metadata.keys()


def test_views_transposed_and_16_bit_tensors(tmp_path: Path, rgb_spec: EncoderSpec) -> None:
    fused = torch.randn(6, 4)
    tensors = {
        "q": fused[:2],
        "k": fused[2:4],
        "t": fused.T,
        "parameter": torch.nn.Parameter(fused),
        "bf16": fused.bfloat16(),
        "count": torch.tensor(3),
    }
    write.save_encoder(tmp_path / "e.safetensors", tensors, rgb_spec)
    stored = read_weights(tmp_path / "e.safetensors").tensors
    assert all(stored[name].equal(value) for name, value in tensors.items())
    write.save_encoder(tmp_path / "h.safetensors", tensors, rgb_spec, dtype=torch.float16)
    stored = read_weights(tmp_path / "h.safetensors").tensors
    assert stored["q"].dtype == torch.float16
    assert stored["count"].dtype == torch.int64


def test_others_may_read_it(tmp_path: Path, rgb_spec: EncoderSpec) -> None:
    """safetensors makes private files, which the colleagues of a shared cluster could not open."""
    old = os.umask(0o022)
    try:
        write.save_encoder(tmp_path / "e.safetensors", {"a": torch.ones(1)}, rgb_spec)
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "e.safetensors").stat().st_mode) == 0o644


def test_nan_is_not_written(tmp_path: Path, rgb_spec: EncoderSpec) -> None:
    with pytest.raises(WeightsError, match=r"NaN or Inf, such as norm"):
        write.save_encoder(tmp_path / "e.safetensors", {"norm": torch.tensor([float("nan")])}, rgb_spec)
    with pytest.raises(WeightsError, match="NaN or Inf"):  # too large for half precision
        write.save_encoder(tmp_path / "e.safetensors", {"norm": torch.tensor([1e6])}, rgb_spec, dtype=torch.float16)
    assert list(tmp_path.iterdir()) == []


def test_no_room(
    tmp_path: Path, rgb_spec: EncoderSpec, file_size_limit: Callable[[int], AbstractContextManager[None]]
) -> None:
    path = tmp_path / "encoder.safetensors"
    model = plain_vit()
    write.save_encoder(path, model.state_dict(), rgb_spec, step=1)
    before = path.read_bytes()
    with file_size_limit(100_000), pytest.raises(RunError, match=r"cannot write .*encoder.safetensors: File too large"):
        write.save_encoder(path, model.state_dict(), rgb_spec, step=2)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["encoder.safetensors"]


def test_full_disk(tmp_path: Path, rgb_spec: EncoderSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"part")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(write, "save_file", full)
    with pytest.raises(RunError, match=r"No space left on device\nFree some space"):
        write.save_encoder(tmp_path / "e.safetensors", plain_vit().state_dict(), rgb_spec)
    assert list(tmp_path.iterdir()) == []
