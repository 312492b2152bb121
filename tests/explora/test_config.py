from __future__ import annotations

from typing import Any

import pytest

from geoexplora.errors import ConfigError
from geoexplora.explora import ExploraConfig, FinetuneConfig, resolve_blocks


@pytest.mark.parametrize(
    ("blocks", "numbers"),
    [(["L"], (24,)), ([1, "L"], (1, 24)), (["L", "l-1", "1"], (1, 23, 24)), ([], ()), ([3], (3,))],
)
def test_blocks(blocks: list[int | str], numbers: tuple[int, ...]) -> None:
    assert resolve_blocks(blocks, 24) == numbers


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([0], "out of range"),
        ([25], "the model has 24 blocks"),
        (["L-24"], "out of range"),
        (["M"], "cannot read block 'M'"),
        ([-1], "cannot read block -1"),
        (["L", 24], "name a block twice"),
    ],
)
def test_wrong_blocks(blocks: list[int | str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_blocks(blocks, 24)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": ("q_proj", "qkv")}, "unknown LoRA targets"),
        ({"targets": ("proj",)}, "Choose among q_proj, k_proj and v_proj"),
        ({"targets": ()}, "none or repeated"),
        ({"targets": ("q_proj", "q_proj")}, "none or repeated"),
        ({"rank": -1}, "negative LoRA rank -1"),
        ({"decoder_rank": -2}, "negative LoRA rank -2"),
        ({"alpha": 0.0}, "not positive"),
        ({"alpha": -4.0}, "not positive"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ExploraConfig(**settings)


def test_frozen_and_named() -> None:
    config = ExploraConfig((1, 24), 32)
    assert config.name == "[1,24]-r32"
    with pytest.raises(AttributeError):
        config.rank = 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "ladora"}, r"unknown method 'ladora'\nChoose among linear, lora, adalora, dora, full\."),
        ({"method": "lora", "targets": ("proj",)}, "unknown LoRA targets"),
        ({"method": "lora", "targets": ("q_proj", "q_proj")}, "none or repeated"),
        ({"method": "lora", "rank": 0}, "LoRA rank 0 is not positive"),
        ({"method": "dora", "alpha": 0.0}, "alpha 0.0 is not positive"),
        ({"method": "adalora"}, "total_steps is None"),
        ({"method": "adalora", "total_steps": 0}, "total_steps is 0"),
    ],
)
def test_wrong_fine_tuning(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FinetuneConfig(**settings)


@pytest.mark.parametrize(
    ("method", "name", "has_adapters"),
    [
        ("linear", "linear", False),
        ("full", "full", False),
        ("lora", "lora-r8", True),
        ("dora", "dora-r8", True),
        ("adalora", "adalora-r8", True),
    ],
)
def test_names_of_fine_tuning(method: Any, name: str, has_adapters: bool) -> None:
    config = FinetuneConfig(method, total_steps=10)
    assert (config.name, config.has_adapters) == (name, has_adapters)
