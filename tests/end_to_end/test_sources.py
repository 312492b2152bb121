"""`pretrain --dataset fmow-sentinel --init` from every kind of weights that users have."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file

import geoexplora.models  # noqa: F401  registers the group-channel ViTs
from geoexplora.models.decoder import MAEDecoder
from geoexplora.weights.load import load_encoder

from ..weights.reference import State, random_state, split_projections, to_huggingface

PICO = {"width": 128, "depth": 8}
PLAIN = PICO | {"patch": 16, "layer_scale": False, "mask_token": False}
GROUPS = ((0, 1, 2, 6), (3, 4, 5, 7), (8, 9))


def randomized(model: torch.nn.Module) -> State:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(value.shape, generator=generator) * 0.05 for name, value in model.state_dict().items()}


def group_channel(decoder: bool = False, **kwargs: Any) -> State:
    sizes: dict[str, Any] = {"img_size": 24, "patch_size": 8, "groups": GROUPS}
    state = randomized(timm.create_model("group_channel_vit_pico", **(sizes | kwargs)))
    if decoder:
        part = randomized(MAEDecoder(128, (3, 3), 8, GROUPS, 10, width=32, depth=1, heads=4, channel_width=8))
        state |= {name if name == "mask_token" else f"decoder_{name}": value for name, value in part.items()}
    return state


def mae(decoder: bool) -> State:
    state = random_state(**PICO, patch=16, grid=2, layer_scale=False, mask_token=False)
    if decoder:
        part = randomized(MAEDecoder(128, (2, 2), 16, None, 3, width=32, depth=1, heads=4))
        state |= {name if name == "mask_token" else f"decoder_{name}": value for name, value in part.items()}
    return state


def temporal() -> State:
    state = random_state(width=448, depth=3, patch=16, grid=2, layer_scale=False, mask_token=False)
    return state | {"pos_embed": state["pos_embed"][:, :, : 448 - 384].contiguous()}


def save(content: Any) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        torch.save(content, folder / "weights.pth")
        return folder / "weights.pth"

    return write


def hub_folder(folder: Path) -> Path:
    from safetensors.torch import save_file

    (folder / "hub").mkdir(exist_ok=True)
    save_file(to_huggingface(random_state(**PICO)), folder / "hub" / "model.safetensors")
    (folder / "hub" / "config.json").write_text(json.dumps({"model_type": "dinov2", "num_attention_heads": 4}))
    return folder / "hub"


ROWS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "dinov2": (save(random_state(**PICO)), "meta-dinov2"),
    "dinov2 with registers": (save(random_state(**PICO, registers=4)), "meta-dinov2"),
    "dinov2 giant's mlp": (save(random_state(**PICO, swiglu=True)), "meta-dinov2"),
    "mae_pretrain": (save({"model": mae(decoder=False)}), "meta-mae"),
    "mae_visualize": (save({"model": mae(decoder=True)}), "meta-mae"),
    "satmae rgb": (save({"model": mae(decoder=True), "args": argparse.Namespace(dataset_type="rgb")}), "satmae-rgb"),
    "satmae sentinel": (save({"model": group_channel(decoder=True)}), "satmae"),
    "satmae sentinel, fine-tuned": (
        save({"model": group_channel(class_token_encoding=True, global_pool="avg", num_classes=62)}),
        "satmae",
    ),
    "satmae temporal": (save({"model": temporal()}), "satmae-temporal"),
    "explora encoder only": (save({"teacher": (whole := random_state(**PICO))}), "explora"),
    "explora full": (
        save({"teacher": {f"backbone.{k}": v for k, v in (whole | split_projections(whole)).items()}}),
        "explora",
    ),
    "explora multispectral full": (
        save({"model": (state := group_channel(decoder=True)) | split_projections(state)}),
        "explora",
    ),
    "timm": (save(random_state(**PLAIN)), "timm"),
    "torchgeo": (
        save({
            "hyper_parameters": {"model": "vit_tiny_patch16_224"},
            "state_dict": {f"model.{k}": v for k, v in random_state(**PLAIN).items()},
        }),
        "torchgeo",
    ),
    "hugging face": (hub_folder, "huggingface-dinov2"),
}  # fmt: skip


@pytest.mark.parametrize("row", ROWS)
def test_pretraining_starts_from(tmp_path: Path, pretrain: Any, row: str) -> None:
    write, name = ROWS[row]
    init = write(tmp_path)
    more = ("--model", "source") if row == "satmae temporal" else ()
    outcome = pretrain(tmp_path / "run", "--init", init, "--max-steps", 1, "--effective-batch-size", 4, *more)
    assert outcome.status == 0, outcome.err
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["source"]["source"]["format"] == name
    report = record["source"]["encoder"]
    assert not report["missing"]
    assert not report["unexpected"]
    encoder, spec = load_encoder(tmp_path / "run")
    assert spec.groups is not None
    assert torch.isfinite(encoder(torch.rand(1, 10, 16, 16))).all()
    # What was frozen is the source's, bit by bit
    frozen = load_file(tmp_path / "run" / "encoder.safetensors")["blocks.1.attn.proj.weight"]
    source = write(tmp_path)
    stored = load_file(source / "model.safetensors") if source.is_dir() else torch.load(source, weights_only=False)
    values = list(_tensors(stored))
    assert any(value.shape == frozen.shape and value.equal(frozen) for value in values)
    if "decoder_loaded" in record["source"] and row in {"mae_visualize", "satmae rgb", "satmae sentinel"}:
        assert record["source"]["decoder_loaded"]
    # A run from any source can be gone on with, and started from
    outcome = pretrain(
        tmp_path / "next", "--init", tmp_path / "run", "--max-steps", 1, "--effective-batch-size", 4, *more
    )
    assert outcome.status == 0, outcome.err


def _tensors(content: Any) -> Any:
    for value in content.values():
        if isinstance(value, dict):
            yield from _tensors(value)
        elif isinstance(value, torch.Tensor):
            yield value


def test_resuming_keeps_the_style_of_a_source_that_is_gone(tmp_path: Path, pretrain: Any, geoexplora: Any) -> None:
    init = save(random_state(**PICO, registers=2))(tmp_path)
    words = ("--init", init, "--model", "source", "--max-steps", 2, "--checkpoint-every", 1)
    assert pretrain(tmp_path / "run", *words).status == 0
    init.unlink()
    outcome = geoexplora("pretrain", "--resume", tmp_path / "run", "--max-steps", 3)
    assert outcome.status == 0, outcome.err
    assert load_encoder(tmp_path / "run")[1].style.registers == 2


def test_probe_of_foreign_weights(tmp_path: Path, geoexplora: Any, fmow_tree: Path) -> None:
    """SatMAE's fine-tuned encoder takes the ten bands of fMoW-Sentinel as it was trained on them."""
    init = save({"model": group_channel(class_token_encoding=True, global_pool="avg", num_classes=62)})(tmp_path)
    words = ("--init", init, "--dataset", "fmow-sentinel", "--root", fmow_tree, "--num-workers", 0, "--k", 3)
    outcome = geoexplora("probe", *words)
    assert outcome.status == 0, outcome.err
    outcome = geoexplora("probe", "--init", save(random_state(**PICO))(tmp_path), *words[2:])
    assert outcome.status == 2
    assert "the encoder was trained on rgb, fmow-sentinel is sentinel-2" in outcome.err


def test_torchgeos_enum_by_name(tmp_path: Path, pretrain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    state = random_state(384, 12, patch=16, grid=2, channels=13, layer_scale=False, mask_token=False)
    torch.save(state, tmp_path / "fetched.pth")
    _instead_of_fetching(monkeypatch, tmp_path / "fetched.pth")
    outcome = pretrain(
        tmp_path / "run", "--init", "ViTSmall16_Weights.SENTINEL2_ALL_MOCO", "--model", "source", "--max-steps", 1
    )
    assert outcome.status == 0, outcome.err
    record = json.loads((tmp_path / "run" / "run.json").read_text())["source"]
    assert record["source"]["name"] == "ViTSmall16_Weights.SENTINEL2_ALL_MOCO"
    assert "B1,B2,B3" in record["encoder"]["converted"]["patch_embed.0.proj.weight"]


def test_shortcut(tmp_path: Path, pretrain: Any, geoexplora: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _instead_of_fetching(monkeypatch, save(random_state(384, 12, grid=2))(tmp_path))
    words = ("--init", "dinov2-vits14", "--model", "source", "--max-steps", 1)
    outcome = pretrain(tmp_path / "run", *words)
    assert outcome.status == 0, outcome.err
    shown = json.loads(geoexplora("inspect", "dinov2-vits14", "--json").out)["weights"]
    assert (shown["format"], shown["licence"]) == ("meta-dinov2", "Apache-2.0")
    assert geoexplora("inspect", tmp_path / "run").out.count("dinov2-vits14") >= 1


def _instead_of_fetching(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    monkeypatch.setattr("geoexplora.weights.sources.locate.fetch", lambda address: file)


# What cannot be used: exit status 2, one message with the remedy, no traceback.


def refuses(outcome: Any, *parts: str) -> None:
    assert outcome.status == 2, outcome.err
    assert "Traceback" not in outcome.err
    for part in parts:
        assert part in outcome.err
    assert outcome.out == ""


def test_few_matches_name_the_nearest_format(tmp_path: Path, pretrain: Any) -> None:
    torch.save({"cls_token": torch.zeros(1, 1, 128), "blocks.0.attn.wq": torch.zeros(2)}, tmp_path / "odd.pth")
    refuses(pretrain(tmp_path / "run", "--init", tmp_path / "odd.pth"), "lacks pos_embed", "it is nearest to")
    torch.save({"conv1.weight": torch.zeros(2), "layer1.0.bn1.weight": torch.zeros(2)}, tmp_path / "resnet.pth")
    refuses(
        pretrain(tmp_path / "run", "--init", tmp_path / "resnet.pth"), "first keys are: conv1.weight", "Nearest are"
    )
    assert not (tmp_path / "run").exists()


def test_shape_conflict(tmp_path: Path, pretrain: Any) -> None:
    state = random_state(**PICO, layer_scale=False, mask_token=False)
    state["blocks.2.mlp.fc1.weight"] = torch.zeros(7, 128)
    refuses(pretrain(tmp_path / "run", "--init", save(state)(tmp_path)), "blocks.2.mlp.fc1.weight ((7, 128)")


def test_missing_block(tmp_path: Path, pretrain: Any) -> None:
    state = {k: v for k, v in random_state(**PICO).items() if not k.startswith("blocks.3.norm1")}
    refuses(pretrain(tmp_path / "run", "--init", save(state)(tmp_path)), "missing: blocks.3.norm1.weight")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite(tmp_path: Path, pretrain: Any, value: float) -> None:
    state = random_state(**PICO)
    state["blocks.5.norm2.bias"][3] = value
    refuses(pretrain(tmp_path / "run", "--init", save(state)(tmp_path)), "NaN or Inf: blocks.5.norm2.bias")


def test_adapter_without_its_base(tmp_path: Path, pretrain: Any, geoexplora: Any, explora_run: Path) -> None:
    for init in (explora_run / "adapter", *(explora_run / "adapter").glob("*.safetensors")):
        refuses(pretrain(tmp_path / "run", "--init", init), "without the weights that it adapts", "--base")
    shown = json.loads(geoexplora("inspect", explora_run / "adapter", "--json").out)
    assert shown["kind"] == "adapter"
    assert shown["base"]["sha256"]
    assert shown["adapter"]["rank"] == 4


def test_unknown_shortcut_names_the_nearest(tmp_path: Path, pretrain: Any) -> None:
    refuses(pretrain(tmp_path / "run", "--init", "dinov2-vitl41"), "unknown weights dinov2-vitl41", "dinov2-vitl14")


def test_no_network(tmp_path: Path, pretrain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    init = "https://weights.invalid/encoder.pth"  # a name that never resolves (RFC 2606)
    refuses(pretrain(tmp_path / "run", "--init", init), "no network", "Download the file elsewhere")


def test_other_bands_and_normalization(tmp_path: Path, pretrain: Any, geoexplora: Any, explora_run: Path) -> None:
    words = ("--init", explora_run, "--max-steps", 1, "--effective-batch-size", 4)
    other = ("--normalization", "clip-float")
    refuses(
        pretrain(tmp_path / "a", *words, *other), "method clip-uint8, now clip-float", "--allow-normalization-mismatch"
    )
    outcome = pretrain(tmp_path / "a", *words, *other, "--allow-normalization-mismatch")
    assert outcome.status == 0, outcome.err
    assert "another normalization than asked for" in outcome.err
    refuses(
        pretrain(tmp_path / "b", *words, "--bands", "B2,B3,B4", "--groups", "B2,B3,B4"),
        "--bands B2,B3,B4,B5,B6,B7,B8,B8A,B11,B12",
    )
    plain = ("--groups", "none", "--image-size", "16")
    exported = geoexplora("export", explora_run, "--format", "torchgeo", "--output", tmp_path / "a.ckpt")
    assert exported.status == 0, exported.err
    assert "left out: the source's decoder" in exported.out
    refuses(pretrain(tmp_path / "d", "--init", tmp_path / "a.ckpt", *other), "--allow-normalization-mismatch")
    first = pretrain(tmp_path / "plain", "--mode", "scratch", "--bands", "B2,B3,B4", *plain, "--max-steps", 1)
    assert first.status == 0, first.err
    words = ("--init", tmp_path / "plain", "--bands", "B4,B8", *plain, "--max-steps", 1)
    refuses(pretrain(tmp_path / "c", *words), "it does not know B8", "--bands B2,B3,B4", "--allow-band-mismatch")
    outcome = pretrain(tmp_path / "c", *words, "--allow-band-mismatch")
    assert outcome.status == 0, outcome.err
    kernel = load_file(tmp_path / "plain" / "encoder.safetensors")["patch_embed.proj.weight"].numpy()
    assert np.isfinite(kernel).all()
