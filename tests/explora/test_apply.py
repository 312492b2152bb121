"""What is trained, what is frozen, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from timm.layers import Attention
from timm.models.vision_transformer import Block

from geoexplora.errors import ConfigError
from geoexplora.explora import (
    ExploraConfig,
    SplitAttention,
    apply_explora,
    apply_explora_to_decoder,
    merge_lora,
)
from geoexplora.models.linear import use_fast_linears

from .conftest import SIZES, WIDTH, decoder_for, group_encoder, images_for, loss_of, plain_encoder, trainable

CONFIGS = [
    ExploraConfig((4,), 3),
    ExploraConfig((1, 4), 2, alpha=8.0, embeddings=True),
    ExploraConfig((), 4, targets=("q_proj", "k_proj", "v_proj")),
    ExploraConfig((2,), 0),
    ExploraConfig((), 2, norms=False, class_token=False),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
@pytest.mark.parametrize("training", [True, False])
def test_initial_output_equals_the_base(encoder: Any, config: ExploraConfig, training: bool) -> None:
    images = images_for(encoder)
    expected = encoder.train(training)(images)
    apply_explora(encoder, config)
    assert encoder.training == training
    torch.testing.assert_close(encoder(images), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_initial_output_in_double_precision(encoder: Any, training: bool) -> None:
    encoder.double().train(training)
    images = images_for(encoder)
    expected = encoder(images)
    apply_explora(encoder, ExploraConfig((4,), 3))
    torch.testing.assert_close(encoder(images), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_the_exact_trainable_set(encoder: Any, config: ExploraConfig) -> None:
    names = {name for name, _ in encoder.named_parameters()}
    apply_explora(encoder, config)
    expected = set()
    for name in names:
        parts = name.split(".")
        whole = parts[0] == "blocks" and int(parts[1]) + 1 in config.whole_blocks
        norm = config.norms and any(part in {"norm", "norm1", "norm2"} for part in parts)
        token = config.class_token and name == "cls_token"
        embedding = config.embeddings and parts[0] in {"patch_embed", "pos_embed", "channel_embed"}
        if whole or norm or token or embedding:
            expected.add(name)
    if config.rank:
        for number in range(4):
            if number + 1 not in config.whole_blocks:
                for target in config.targets:
                    prefix = f"blocks.{number}.attn.{target}"
                    expected |= {f"{prefix}.lora_A.default.weight", f"{prefix}.lora_B.default.weight"}
    assert trainable(encoder) == expected


def test_lora_stays_out_of_whole_blocks_keys_outputs_and_mlps(encoder: Any) -> None:
    apply_explora(encoder, ExploraConfig((4,), 3))
    assert type(encoder.blocks[3].attn) is Attention
    for name, parameter in encoder.named_parameters():
        if ".lora_" in name:
            assert ".attn.q_proj." in name or ".attn.v_proj." in name
            assert parameter.shape in {(3, WIDTH), (WIDTH, 3)}


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_a_step_changes_all_that_is_trained_and_nothing_else(encoder: Any, config: ExploraConfig, fast: bool) -> None:
    decoder = decoder_for(encoder)
    apply_explora(encoder, config)
    apply_explora_to_decoder(decoder, config, pretrained=True, new_bands=False)
    if fast:
        use_fast_linears(encoder)
        use_fast_linears(decoder)
    state = {**encoder.state_dict(prefix="encoder."), **decoder.state_dict(prefix="decoder.")}
    before = {name: value.clone() for name, value in state.items()}
    trained = [p for module in (encoder, decoder) for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.05)
    for _ in range(2):  # LoRA's A has no gradient until B has left zero
        optimizer.zero_grad()
        loss_of(encoder, decoder).backward()
        optimizer.step()
    wanted = {f"encoder.{name}" for name in trainable(encoder)} | {f"decoder.{name}" for name in trainable(decoder)}
    after = {**encoder.state_dict(prefix="encoder."), **decoder.state_dict(prefix="decoder.")}
    changed = {name for name in after if not after[name].equal(before[name])}
    assert changed == wanted
    frozen = [p for module in (encoder, decoder) for p in module.parameters() if not p.requires_grad]
    assert all(parameter.grad is None for parameter in frozen)


def unchanged(encoder: Any, before: Any) -> bool:
    state, flags = encoder.state_dict(), trainable(encoder)
    return flags == trainable(before) and all(state[name].equal(value) for name, value in before.state_dict().items())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ExploraConfig((5,), 3), "whole block 5 is out of range: the model has 4 blocks"),
        (ExploraConfig((0,), 3), "whole block 0 is out of range"),
        (ExploraConfig((4,), WIDTH + 1), "LoRA rank 33 exceeds the width 32"),
        (ExploraConfig((1, 2, 3, 4), 3), "none is left for LoRA"),
    ],
)
def test_refused_before_anything_changes(encoder: Any, config: ExploraConfig, message: str) -> None:
    before = copy.deepcopy(encoder)
    with pytest.raises(ConfigError, match=message):
        apply_explora(encoder, config)
    assert unchanged(encoder, before)
    assert type(encoder.blocks[0].attn) is Attention


def test_the_largest_rank_is_the_width(encoder: Any) -> None:
    apply_explora(encoder, ExploraConfig((4,), WIDTH))


@pytest.mark.parametrize("rank", [3, 0])
def test_lora_twice_is_refused_and_keeps_the_first(encoder: Any, rank: int) -> None:
    """Injecting again would silently zero what was trained."""
    config = ExploraConfig((4,), 3)
    apply_explora(encoder, config)
    before = copy.deepcopy(encoder)
    with pytest.raises(ConfigError, match=r"already carries LoRA\n.*merge_lora"):
        apply_explora(encoder, ExploraConfig((4,), rank))
    assert unchanged(encoder, before)
    merge_lora(encoder)
    apply_explora(encoder, config)  # after merging it may be applied again


def test_all_blocks_whole_without_lora() -> None:
    encoder = plain_encoder()
    apply_explora(encoder, ExploraConfig((1, 2, 3, 4), 0))
    assert all(parameter.requires_grad for parameter in encoder.blocks.parameters())
    assert not encoder.patch_embed.proj.weight.requires_grad


def test_attention_that_cannot_be_split_is_refused() -> None:
    class Other(Attention):
        pass

    encoder = timm.create_model("vit_tiny_patch16_224", **SIZES, attn_layer=Other)
    before = copy.deepcopy(encoder)
    with pytest.raises(ConfigError, match="cannot split Other in block 1"):
        apply_explora(encoder, ExploraConfig((4,), 3))
    assert unchanged(encoder, before)


def test_gated_attention_is_refused_before_anything_changes() -> None:
    encoder = plain_encoder()
    encoder.blocks[2].attn.gate = torch.nn.Linear(WIDTH, WIDTH)
    before = copy.deepcopy(encoder)
    with pytest.raises(ConfigError, match="cannot split the gated attention in block 3"):
        apply_explora(encoder, ExploraConfig((4,), 3))
    assert unchanged(encoder, before)
    assert type(encoder.blocks[0].attn) is Attention


def test_a_model_built_with_split_attention_is_taken_as_it_is() -> None:
    encoder = timm.create_model("vit_tiny_patch16_224", **SIZES, attn_layer=SplitAttention)
    images = images_for(encoder)
    expected = encoder(images)
    apply_explora(encoder, ExploraConfig((4,), 3))
    torch.testing.assert_close(encoder(images), expected)
    assert "blocks.3.attn.k_proj.weight" in trainable(encoder)
    assert "blocks.2.attn.k_proj.base_layer.weight" not in trainable(encoder)


def test_alpha_scales_the_update(encoder: Any) -> None:
    apply_explora(encoder, ExploraConfig((4,), 4))
    assert encoder.blocks[0].attn.q_proj.scaling == {"default": 1.0}
    merge_lora(encoder)
    apply_explora(encoder, ExploraConfig((4,), 4, alpha=6.0))
    assert encoder.blocks[0].attn.q_proj.scaling == {"default": 1.5}


def test_module_type_and_names_stay(encoder: Any) -> None:
    kind = type(encoder)
    apply_explora(encoder, ExploraConfig((4,), 3))
    assert type(encoder) is kind
    assert isinstance(encoder.blocks[0], Block)
    assert "blocks.0.attn.proj.weight" in encoder.state_dict()


# The decoder's rules.


@pytest.mark.parametrize("build", [plain_encoder, group_encoder])
def test_a_new_decoder_is_trained_whole_but_for_its_encodings(build: Any) -> None:
    decoder = decoder_for(build())
    decoder.requires_grad_(False)
    apply_explora_to_decoder(decoder, ExploraConfig((4,), 3), pretrained=False, new_bands=True)
    frozen = {name for name, _ in decoder.named_parameters()} - trainable(decoder)
    assert frozen == {"pos_embed"} | ({"channel_embed"} if decoder.groups else set())
    assert not hasattr(decoder, "peft_config")


@pytest.mark.parametrize("new_bands", [False, True])
@pytest.mark.parametrize("build", [plain_encoder, group_encoder])
def test_a_source_decoder_gets_lora_norms_and_new_outputs(build: Any, new_bands: bool) -> None:
    decoder = decoder_for(build())
    names = {name for name, _ in decoder.named_parameters()}
    apply_explora_to_decoder(decoder, ExploraConfig((4,), 3, decoder_rank=5), pretrained=True, new_bands=new_bands)
    trained = trainable(decoder)
    lora = {name for name in trained if ".lora_" in name}
    assert len(lora) == 2 * 2 * 2  # two blocks, Q and V, A and B
    assert {min(decoder.get_parameter(name).shape) for name in lora} == {5}
    expected = {name for name in names if "norm" in name}
    if new_bands:
        expected |= {name for name in names if name.startswith("pred.")}
    assert trained - lora == expected


def test_a_source_decoder_without_lora_or_norms() -> None:
    decoder = decoder_for(plain_encoder())
    config = ExploraConfig((4,), 3, decoder_rank=0, norms=False)
    apply_explora_to_decoder(decoder, config, pretrained=True, new_bands=False)
    assert trainable(decoder) == set()


def test_a_decoder_s_rank_is_checked_before_anything_changes() -> None:
    decoder = decoder_for(plain_encoder())
    before = copy.deepcopy(decoder)
    with pytest.raises(ConfigError, match="LoRA rank 25 exceeds the width 24"):
        apply_explora_to_decoder(decoder, ExploraConfig((4,), 3, decoder_rank=25), pretrained=True, new_bands=False)
    assert unchanged(decoder, before)


@pytest.mark.parametrize("pretrained", [True, False])
def test_a_decoder_with_lora_is_refused(pretrained: bool) -> None:
    decoder = decoder_for(plain_encoder())
    apply_explora_to_decoder(decoder, ExploraConfig((4,), 3), pretrained=True, new_bands=False)
    with pytest.raises(ConfigError, match="already carries LoRA"):
        apply_explora_to_decoder(decoder, ExploraConfig((4,), 3), pretrained=pretrained, new_bands=False)


def test_decoder_output_does_not_change() -> None:
    encoder = group_encoder()
    decoder = decoder_for(encoder)
    expected = loss_of(encoder, decoder)
    apply_explora(encoder, ExploraConfig((4,), 3))
    apply_explora_to_decoder(decoder, ExploraConfig((4,), 3), pretrained=True, new_bands=False)
    torch.testing.assert_close(loss_of(encoder, decoder), expected)
