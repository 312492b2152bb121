"""The exact numbers of trainable parameters, at full size on the meta device."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch

from geoexplora.explora import (
    ExploraConfig,
    FinetuneConfig,
    apply_explora,
    apply_finetuning,
    parameter_table,
    resolve_blocks,
)


def trained(model: str, config: ExploraConfig, **kwargs: Any) -> dict[str, int]:
    with torch.device("meta"):
        encoder = timm.create_model(model, num_classes=0, **kwargs)
        apply_explora(encoder, config)
    table = parameter_table(encoder, config.whole_blocks)
    assert sum(row.trainable + row.frozen for row in table) == sum(p.numel() for p in encoder.parameters())
    return {row.part: row.trainable for row in table if row.trainable}


@pytest.mark.parametrize(
    ("blocks", "rank", "without_class_token"),
    [(["L"], 64, 18_723_840), (["L"], 0, 12_694_528), ([1, "L-1", "L"], 64, 43_387_904)],
)
def test_dinov2_large(blocks: list[int | str], rank: int, without_class_token: int) -> None:
    parts = trained("vit_large_patch14_dinov2", ExploraConfig(resolve_blocks(blocks, 24), rank), img_size=224)
    assert parts["class token"] == 1_024
    assert sum(parts.values()) - parts.pop("class token") == without_class_token
    assert parts.keys() == {"whole blocks", "norms"} | ({"LoRA"} if rank else set())


def test_multispectral_mae_large_by_part() -> None:
    config = ExploraConfig(resolve_blocks([1, "L"], 24), 32, embeddings=True)
    parts = trained("group_channel_vit_large", config, img_size=96, patch_size=8)
    assert parts == {
        "whole blocks": 25_192_448,
        "LoRA": 2_883_584,
        "norms": 92_160,
        "patch embedding": 658_432,
        "position encoding": 111_360,
        "channel encoding": 768,
        "class token": 1_024,
    }
    assert sum(parts.values()) == 28_939_776


def test_lora_on_all_blocks() -> None:
    config = ExploraConfig((), 8, norms=False, class_token=False)
    assert trained("vit_large_patch16_224", config) == {"LoRA": 786_432}


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("linear", {}),
        ("lora", {"LoRA": 786_432}),
        ("dora", {"LoRA": 835_584}),
        ("adalora", {"LoRA": 1_180_224}),
    ],
)
@pytest.mark.parametrize("model", ["vit_large_patch16_224", "vit_large_patch14_dinov2", "group_channel_vit_large"])
def test_fine_tuning_of_large(model: str, method: Any, expected: dict[str, int]) -> None:
    with torch.device("meta"):
        encoder = timm.create_model(model, num_classes=0, img_size=224)
        tuning = apply_finetuning(encoder, FinetuneConfig(method, 8, total_steps=100))
    table = parameter_table(encoder, tuning.whole_blocks)
    assert {row.part: row.trainable for row in table if row.trainable} == expected
    assert sum(row.trainable + row.frozen for row in table) == sum(p.numel() for p in encoder.parameters())


def test_full_fine_tuning_of_large() -> None:
    with torch.device("meta"):
        encoder = timm.create_model("vit_large_patch16_224", num_classes=0)
        tuning = apply_finetuning(encoder, FinetuneConfig("full"))
    table = {row.part: (row.trainable, row.frozen) for row in parameter_table(encoder, tuning.whole_blocks)}
    assert table == {
        "whole blocks": (24 * 12_596_224, 0),
        "norms": (2 * 1024, 0),
        "patch embedding": (769 * 1024, 0),
        "position encoding": (197 * 1024, 0),
        "class token": (1024, 0),
    }


def test_gammas_stay_frozen_outside_the_whole_blocks() -> None:
    with torch.device("meta"):
        encoder = timm.create_model("vit_large_patch14_dinov2", num_classes=0, img_size=224)
        apply_explora(encoder, ExploraConfig((24,), 64))
    gammas = {name: p.requires_grad for name, p in encoder.named_parameters() if name.endswith("gamma")}
    assert [name for name, trains in gammas.items() if trains] == ["blocks.23.ls1.gamma", "blocks.23.ls2.gamma"]


def test_register_tokens_and_masks_of_dinov2_stay_frozen() -> None:
    with torch.device("meta"):
        encoder = timm.create_model("vit_small_patch14_reg4_dinov2", num_classes=0, img_size=56)
        apply_explora(encoder, ExploraConfig((12,), 4))
    assert not encoder.reg_token.requires_grad
    assert not encoder.pos_embed.requires_grad
    assert encoder.cls_token.requires_grad
