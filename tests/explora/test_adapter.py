"""What was trained, on disk: complete, minimal, and open to stock peft."""

from __future__ import annotations

import json
import os
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import timm
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from geoexplora.errors import ConfigError, RunError, WeightsError
from geoexplora.explora import (
    ExploraConfig,
    SplitAttention,
    apply_explora,
    load_adapted_encoder,
    load_adapter,
    merge_lora,
    save_adapter,
)
from geoexplora.explora.adapter import CONFIG_FILE, LORA_FILE, TRAINED_FILE
from geoexplora.models.linear import use_fast_linears
from geoexplora.registry import Style
from geoexplora.weights.files import read_weights
from geoexplora.weights.load import build_encoder, load_into
from geoexplora.weights.source_weights import SourceWeights
from geoexplora.weights.spec import EncoderSpec

from .conftest import ENCODERS, PLAIN, SIZES, fill_lora, images_for, plain_encoder, randomize, trainable

SOURCE = {"name": "weights.pth", "sha256": "0" * 64}
SPEC = EncoderSpec.of(
    "custom", sizes=(32, 4, 4), image_size=16, patch_size=4, sensor="rgb", bands=("R", "G", "B"), normalization={},
    style=Style(layer_scale=True), source=SOURCE,
)  # fmt: skip
CONFIGS = [
    ExploraConfig((4,), 3, alpha=5.0),
    ExploraConfig((1, 4), 2, embeddings=True),
    ExploraConfig((4,), 0),
    ExploraConfig((), 2, norms=False, class_token=False),
]


def weights(digest: str = "0" * 64) -> SourceWeights:
    """Source weights of that digest, without their file."""
    source = SourceWeights(Path("weights.pth"), "timm", None, {})
    vars(source)["sha256"] = digest
    return source


def trained(encoder: Any, config: ExploraConfig) -> Any:
    """The encoder as after training: every trainable tensor changed."""
    apply_explora(encoder, config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in encoder.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return encoder.eval()


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_round_trip(tmp_path: Path, config: ExploraConfig, kind: str, fast: bool) -> None:
    encoder = trained(ENCODERS[kind](), config)
    if fast:
        use_fast_linears(encoder)
    save_adapter(tmp_path / "adapter", encoder, config, SPEC)
    other = ENCODERS[kind]().eval()
    assert load_adapter(tmp_path / "adapter", other, weights()) == config
    assert trainable(other) == trainable(encoder)
    state = other.state_dict()
    assert all(state[name].equal(value) for name, value in encoder.state_dict().items())
    images = images_for(encoder)
    torch.testing.assert_close(other(images), encoder(images))
    merge_lora(other)


def test_only_what_was_trained_is_stored(tmp_path: Path) -> None:
    config = CONFIGS[0]
    encoder = trained(plain_encoder(), config)
    save_adapter(tmp_path, encoder, config, SPEC)
    assert {path.name for path in tmp_path.iterdir()} == {CONFIG_FILE, LORA_FILE, TRAINED_FILE}
    lora, rest = load_file(tmp_path / LORA_FILE), load_file(tmp_path / TRAINED_FILE)
    stored = sum(tensor.numel() for tensor in (*lora.values(), *rest.values()))
    assert stored == sum(p.numel() for p in encoder.parameters() if p.requires_grad)
    assert "blocks.3.attn.qkv.weight" in rest  # whole blocks stay fused, as in stock timm
    assert all(name.startswith("base_model.model.blocks.") and "lora_" in name for name in lora)
    with safe_open(tmp_path / TRAINED_FILE, "pt") as file:
        header = file.metadata()
    assert json.loads(header["source"]) == SOURCE
    assert json.loads(header["explora"])["rank"] == 3


def test_without_lora_there_is_no_peft_file(tmp_path: Path) -> None:
    config = ExploraConfig((4,), 0)
    save_adapter(tmp_path, trained(plain_encoder(), config), config, SPEC)
    assert {path.name for path in tmp_path.iterdir()} == {TRAINED_FILE}


def split_state(encoder: Any) -> dict[str, Tensor]:
    """A fused state dict as ``attn_layer=SplitAttention`` names it."""
    state: dict[str, Tensor] = {}
    for name, value in encoder.state_dict().items():
        if ".qkv." in name:
            for part, chunk in zip(("q_proj", "k_proj", "v_proj"), value.chunk(3), strict=True):
                state[name.replace("qkv", part)] = chunk.clone()
        else:
            state[name] = value.clone()
    return state


@pytest.mark.parametrize(
    ("depth", "config"),
    [
        (4, ExploraConfig((), 3, alpha=5.0, norms=False, class_token=False)),
        (4, ExploraConfig((1, 4), 3)),
        (12, ExploraConfig((12,), 3)),  # peft shortens target lists of 20 names and more
        (12, ExploraConfig((1, 12), 3, targets=("q_proj", "k_proj", "v_proj"))),
    ],
)
def test_stock_peft_opens_it(tmp_path: Path, depth: int, config: ExploraConfig) -> None:
    source = plain_encoder(depth=depth)
    encoder = trained(plain_encoder(depth=depth), config)
    save_adapter(tmp_path, encoder, config, SPEC)

    base = timm.create_model(PLAIN, **(SIZES | {"depth": depth}), init_values=1.0, attn_layer=SplitAttention)
    base.load_state_dict(split_state(source), strict=True)
    opened: Any = peft.PeftModel.from_pretrained(base, str(tmp_path)).eval()
    layers = [name for name, module in opened.named_modules() if isinstance(module, BaseTunerLayer)]
    assert len(layers) == (depth - len(config.whole_blocks)) * len(config.targets)  # none in the whole blocks
    for name, value in encoder.named_parameters():
        if ".lora_" in name:
            assert opened.get_parameter(f"base_model.model.{name}").equal(value)

    # LoRA alone over the source weights gives the same output, ...
    expected = plain_encoder(depth=depth)
    apply_explora(expected, config)
    expected.load_state_dict({n: v for n, v in encoder.state_dict().items() if ".lora_" in n}, strict=False)
    images = images_for(encoder)
    torch.testing.assert_close(opened(images), expected.eval()(images), rtol=1e-4, atol=1e-4)
    # ... and together with the other trained tensors that of the trained encoder.
    rest = load_file(tmp_path / TRAINED_FILE)
    names: dict[str, Tensor] = {}
    for name, value in rest.items():
        parts = value.chunk(3) if ".qkv." in name else (value,)
        for part, chunk in zip(("q_proj", "k_proj", "v_proj"), parts, strict=False):
            names[f"base_model.model.{name.replace('qkv', part)}"] = chunk
    assert not opened.load_state_dict(names, strict=False).unexpected_keys
    torch.testing.assert_close(opened(images), encoder(images), rtol=1e-4, atol=1e-4)


def test_peft_goes_on_training_it(tmp_path: Path) -> None:
    config = ExploraConfig((), 3)
    encoder = trained(plain_encoder(), config)
    save_adapter(tmp_path, encoder, config, SPEC)
    base = timm.create_model(PLAIN, **SIZES, init_values=1.0, attn_layer=SplitAttention)
    opened: Any = peft.PeftModel.from_pretrained(base, str(tmp_path), is_trainable=True).train()
    images = images_for(encoder)
    trained_output = opened(images)
    trained_output.square().sum().backward()
    assert all(p.grad is not None for name, p in opened.named_parameters() if ".lora_" in name)
    torch.testing.assert_close(trained_output, opened.eval()(images), rtol=1e-4, atol=1e-4)


def test_the_config_is_plain_json(tmp_path: Path) -> None:
    config = CONFIGS[0]
    save_adapter(tmp_path, trained(plain_encoder(), config), config, SPEC)
    stored = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert (stored["r"], stored["lora_alpha"], stored["lora_dropout"], stored["bias"]) == (3, 5.0, 0.0, "none")
    assert stored["inference_mode"] is True
    assert stored["target_modules"] == sorted(
        f"blocks.{number}.attn.{target}" for number in range(3) for target in ("q_proj", "v_proj")
    )


# Adapters that do not fit.


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    config = CONFIGS[0]
    save_adapter(tmp_path / "adapter", trained(plain_encoder(), config), config, SPEC)
    return tmp_path / "adapter"


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"cannot read the adapter .*nowhere"):
        load_adapter(tmp_path / "nowhere", plain_encoder(), weights())


@pytest.mark.parametrize("name", [TRAINED_FILE, LORA_FILE])
def test_a_damaged_file(saved: Path, name: str) -> None:
    (saved / name).write_bytes((saved / name).read_bytes()[:50])
    with pytest.raises(WeightsError, match="cannot read the adapter"):
        load_adapter(saved, plain_encoder(), weights())


def test_a_file_that_is_not_ours(saved: Path) -> None:
    save_file({"norm.weight": torch.ones(32)}, saved / TRAINED_FILE)
    with pytest.raises(WeightsError, match="does not say what was trained"):
        load_adapter(saved, plain_encoder(), weights())


def test_missing_lora_is_an_error(saved: Path) -> None:
    (saved / LORA_FILE).unlink()
    with pytest.raises(WeightsError, match=r"12 tensors differ, such as blocks\.0\.attn\.q_proj\.lora_A"):
        load_adapter(saved, plain_encoder(), weights())


def test_wrong_lora_keys_are_an_error(saved: Path) -> None:
    """peft itself would pass over them."""
    lora = load_file(saved / LORA_FILE)
    save_file({name.replace("base_model.model.", "model."): value for name, value in lora.items()}, saved / LORA_FILE)
    with pytest.raises(WeightsError, match="24 tensors differ"):
        load_adapter(saved, plain_encoder(), weights())


@pytest.mark.parametrize(
    ("build", "error"),
    [
        (lambda: plain_encoder(embed_dim=16), WeightsError),
        (lambda: plain_encoder(depth=5), WeightsError),
        (lambda: plain_encoder(init_values=None), WeightsError),
        (lambda: plain_encoder(depth=3), ConfigError),
    ],
)
def test_another_architecture(saved: Path, build: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        load_adapter(saved, build(), weights())


def test_an_encoder_that_carries_lora_is_refused(saved: Path) -> None:
    encoder = fill_lora(trained(plain_encoder(), CONFIGS[0]))
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    with pytest.raises(ConfigError, match="already carries LoRA"):
        load_adapter(saved, encoder, weights())
    assert all(value.equal(before[name]) for name, value in encoder.state_dict().items())


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(RunError):
        save_adapter(tmp_path, trained(plain_encoder(), CONFIGS[0]), CONFIGS[0], SPEC)


def test_a_file_in_the_way_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "adapter").write_text("")
    with pytest.raises(RunError):
        save_adapter(tmp_path / "adapter", trained(plain_encoder(), CONFIGS[0]), CONFIGS[0], SPEC)


def test_saving_again_replaces(tmp_path: Path) -> None:
    encoder = trained(plain_encoder(), CONFIGS[0])
    save_adapter(tmp_path, encoder, CONFIGS[0], SPEC)
    randomize(encoder, seed=9)
    save_adapter(tmp_path, encoder, CONFIGS[0], SPEC)
    assert {path.name for path in tmp_path.iterdir()} == {CONFIG_FILE, LORA_FILE, TRAINED_FILE}
    stored = load_file(tmp_path / TRAINED_FILE)
    assert stored["norm.weight"].equal(encoder.norm.weight)


# The source weights that an adapter was trained on.


def test_other_source_weights_are_refused(saved: Path) -> None:
    encoder = plain_encoder()
    with pytest.raises(WeightsError, match=r"other weights: weights.pth \(sha256 0{64}\), not on .*sha256 1{64}"):
        load_adapter(saved, encoder, weights("1" * 64))
    with pytest.raises(WeightsError, match="not on random ones"):
        load_adapter(saved, encoder, None)
    assert not hasattr(encoder, "peft_config")


def test_an_adapter_of_random_weights_fits_no_file(tmp_path: Path) -> None:
    config = CONFIGS[0]
    save_adapter(tmp_path, trained(plain_encoder(), config), config, replace(SPEC, source=None))
    with pytest.raises(WeightsError, match="trained on random weights"):
        load_adapter(tmp_path, plain_encoder(), weights())
    assert load_adapter(tmp_path, plain_encoder(), None) == config


def test_source_and_adapter_together_give_the_trained_encoder(tmp_path: Path) -> None:
    """DINOv2 at another patch and image size: what is resampled and frozen comes from the source again."""
    from ..weights.reference import random_state

    torch.save(random_state(width=128, depth=3, patch=14, grid=4), tmp_path / "dinov2.pth")
    source = read_weights(tmp_path / "dinov2.pth")
    spec = EncoderSpec.of(
        "custom", sizes=(128, 3, 2), image_size=48, patch_size=8, sensor="rgb", bands=("R", "G", "B"),
        normalization=source.described().normalization, style=source.described().style,
    )  # fmt: skip
    encoder: Any = build_encoder(spec)
    report = load_into(encoder, source, spec=spec, patch_resize="bilinear")
    spec = replace(spec, source=source.record(), patch_resize=report.patch_resize)
    config = ExploraConfig((3,), 4)
    save_adapter(tmp_path / "adapter", trained(encoder, config), config, spec)
    restored, told = load_adapted_encoder(tmp_path / "adapter", tmp_path / "dinov2.pth")
    assert told == spec
    images = torch.randn(2, 3, 48, 48)
    torch.testing.assert_close(restored(images), encoder(images), rtol=1e-5, atol=1e-5)
    torch.save(random_state(width=128, depth=3, patch=14, grid=4, seed=1), tmp_path / "other.pth")
    with pytest.raises(WeightsError, match=r"trained on other weights: dinov2\.pth"):
        load_adapted_encoder(tmp_path / "adapter", tmp_path / "other.pth")


def test_room_of_the_papers_adapter(tmp_path: Path) -> None:
    """D-[L]-r64 of ViT-L/14 takes 4 bytes for each of its 18.7 M trained parameters, and its headers."""
    with torch.device("meta"):
        encoder: Any = timm.create_model("vit_large_patch14_dinov2", num_classes=0)
        config = ExploraConfig((24,), 64)
        apply_explora(encoder, config)
    for name, parameter in list(encoder.named_parameters()):
        if parameter.requires_grad:
            owner, _, last = name.rpartition(".")
            setattr(encoder.get_submodule(owner), last, torch.nn.Parameter(torch.zeros(parameter.shape)))
    spec = EncoderSpec.of(
        "vit_large", image_size=518, patch_size=14, sensor="rgb", bands=("R", "G", "B"), normalization={},
        style=Style(layer_scale=True), source=SOURCE,
    )  # fmt: skip
    save_adapter(tmp_path, encoder, config, spec)
    room = sum(file.stat().st_size for file in tmp_path.iterdir())
    assert 0 <= room - 4 * (18_723_840 + 1_024) < 64_000
