"""Learning rates of the parts, and the schedule."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import timm
import torch
from torch import nn

from geoexplora.bands import FMOW_SENTINEL_BANDS, FMOW_SENTINEL_GROUPS, FMOW_SENTINEL_STATISTICS
from geoexplora.explora import ExploraConfig, apply_explora
from geoexplora.objectives.dinov2 import Heads, HeadSizes
from geoexplora.tasks.optimization import cosine, parameter_groups, warmup_cosine
from geoexplora.tasks.pretrain.mae import ExPLoRAPretrain
from geoexplora.tasks.schedule import Schedule


def task(**settings):
    small = {
        "model": "vit_pico", "image_size": 16, "patch_size": 8, "rank": 4, "decoder_width": 32, "decoder_depth": 1,
        "decoder_heads": 4, "bands": FMOW_SENTINEL_BANDS, "groups": FMOW_SENTINEL_GROUPS,
        "normalization": FMOW_SENTINEL_STATISTICS.select(FMOW_SENTINEL_BANDS).normalization("clip-uint8"),
    }  # fmt: skip
    return ExPLoRAPretrain(**(small | settings))


def test_every_trained_parameter_has_one_group_and_its_rate():
    student = task()
    groups = parameter_groups(student.model.encoder, student.model.decoder, (1, 8), 1.0, 0.1, 0.05)
    rates = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    trained = {name: p for name, p in student.model.named_parameters() if p.requires_grad}
    assert len(rates) == sum(len(group["params"]) for group in groups) == len(trained)
    expected = {
        "encoder.blocks.0.mlp.fc1.weight": (0.1, 0.05),
        "encoder.blocks.7.attn.qkv.bias": (0.1, 0.0),
        "encoder.blocks.3.norm1.weight": (0.1, 0.0),
        "encoder.blocks.3.attn.q_proj.lora_A.default.weight": (1.0, 0.05),
        "encoder.patch_embed.0.proj.weight": (1.0, 0.05),
        "encoder.pos_embed": (1.0, 0.0),
        "encoder.channel_embed": (1.0, 0.0),
        "encoder.cls_token": (1.0, 0.0),
        "decoder.mask_token": (1.0, 0.0),
        "decoder.pred.0.weight": (1.0, 0.05),
    }
    assert {name: rates[id(trained[name])] for name in expected} == expected


def test_one_rate_where_all_is_trained():
    optimizer = task(mode="full", lr=0.5, whole_blocks_lr_scale=0.1, total_steps=10).configure_optimizers()["optimizer"]
    assert {group["initial_lr"] for group in optimizer.param_groups} == {0.5}


DEPTH = 3


def encoder(explora=False, **kwargs):
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=16, depth=DEPTH, num_heads=2, num_classes=0,
        init_values=1.0, **kwargs,
    )  # fmt: skip
    if explora:
        apply_explora(model, ExploraConfig((DEPTH,), 2, embeddings=True))
    return model


def settings_of(model, head, *args, **kwargs):
    """Rate, decay and group name of every trained parameter."""
    named = {f"encoder.{name}": p for name, p in model.named_parameters()}
    named |= {f"head.{name}": p for name, p in head.named_parameters()}
    groups = parameter_groups(model, head, *args, **kwargs)
    found = {id(p): (group["lr"], group["weight_decay"], group["name"]) for group in groups for p in group["params"]}
    assert len(found) == sum(len(group["params"]) for group in groups)
    return {name: found[id(p)] for name, p in named.items() if p.requires_grad}


def slow_rate(name, slow_scale, layer_decay, patch_scale, new_embeddings):
    """The rate relative to what starts anew, written from the papers' words."""
    if name.startswith("head.") or ".lora_" in name:
        return 1.0
    embedding = "patch_embed" in name or name.endswith("pos_embed")
    norm = ".norm" in name
    whole = f".blocks.{DEPTH - 1}." in name
    rate = slow_scale if norm or whole else 1.0
    if embedding and new_embeddings:
        return rate
    layer = 0
    for number in range(DEPTH):
        if f".blocks.{number}." in name:
            layer = number + 1
    if name.startswith("encoder.norm."):
        layer = DEPTH + 1
    for _ in range(DEPTH + 1 - layer):
        rate *= layer_decay
    return rate * patch_scale if "patch_embed" in name else rate


@pytest.mark.parametrize("explora", [False, True])
@pytest.mark.parametrize("slow_scale", [1.0, 0.1])
@pytest.mark.parametrize("layer_decay", [1.0, 0.9])
@pytest.mark.parametrize("patch_scale", [1.0, 0.2])
@pytest.mark.parametrize("new_embeddings", [False, True])
def test_rates_against_a_loop(explora, slow_scale, layer_decay, patch_scale, new_embeddings):
    head = Heads(16, HeadSizes(6, 2, 8, 4, separate=True))
    found = settings_of(
        encoder(explora), head, (DEPTH,), 2.0, slow_scale, 0.05, False, layer_decay=layer_decay,
        patch_embed_scale=patch_scale, new_embeddings=new_embeddings,
    )  # fmt: skip
    for name, (rate, _, _) in found.items():
        expected = 2.0 * slow_rate(name, slow_scale, layer_decay, patch_scale, new_embeddings)
        assert rate == pytest.approx(expected), name


def test_rates_of_dinov2_by_name():
    """Layer decay 0.9 and patch embeddings times 0.2, as DINOv2: whole numbers of layers above."""
    head = Heads(16, HeadSizes(6, 2, 8, 4))
    found = settings_of(
        encoder(), head, (1, 2, 3), 1.0, 1.0, 0.0, layer_decay=0.5, patch_embed_scale=0.2, new_embeddings=False
    )
    rates = {name: rate for name, (rate, _, _) in found.items()}
    assert rates["encoder.norm.weight"] == 1
    assert rates["encoder.blocks.2.mlp.fc1.weight"] == rates["encoder.blocks.2.ls1.gamma"] == 1 / 2
    assert rates["encoder.blocks.0.norm1.bias"] == 1 / 8
    assert rates["encoder.cls_token"] == rates["encoder.pos_embed"] == 1 / 16
    assert rates["encoder.patch_embed.proj.weight"] == pytest.approx(0.2 / 16)
    assert rates["head.dino.mlp.0.weight"] == rates["head.mask_token"] == 1


def test_what_decays():
    head = Heads(16, HeadSizes(6, 2, 8, 4))
    found = settings_of(encoder(explora=True), head, (DEPTH,), 1.0, 0.1, 0.05)
    still = {name for name, (_, decay, _) in found.items() if decay == 0}
    assert {decay for _, decay, _ in found.values()} == {0.0, 0.05}
    for name, parameter in [*encoder(explora=True).named_parameters(prefix="encoder"), *head.named_parameters("head")]:
        if name in found:
            assert (name in still) == (parameter.ndim == 1 or name.endswith(("_token", "pos_embed"))), name
    assert {"encoder.cls_token", "encoder.pos_embed", "head.mask_token", "head.dino.mlp.0.bias"} <= still
    assert "encoder.blocks.0.attn.q_proj.lora_A.default.weight" not in still


def test_groups_say_whether_they_decay_even_without_weight_decay():
    """A schedule may raise it from 0."""
    groups = parameter_groups(encoder(), Heads(16, HeadSizes(6, 2, 8, 4)), (DEPTH,), 1.0, 1.0, 0.0)
    assert {group["weight_decay"] for group in groups} == {0.0}
    for group in groups:
        assert group["decays"] == (not group["name"].endswith(" no decay"))
        assert group["decays"] or all(p.ndim < 2 or p.shape[0] == 1 for p in group["params"])
    assert {group["decays"] for group in groups} == {False, True}


@pytest.mark.parametrize("separate", [False, True])
def test_prototypes_are_a_group_of_their_own(separate):
    head = Heads(16, HeadSizes(6, 2, 8, 4, separate))
    found = settings_of(encoder(), head, (DEPTH,), 1.0, 1.0, 0.05)
    prototypes = {name for name, (_, _, group) in found.items() if group.startswith("prototypes")}
    heads = ("dino", "ibot") if separate else ("dino",)
    assert prototypes == {f"head.{one}.prototypes.parametrizations.weight.original{i}" for one in heads for i in (0, 1)}


def test_prototypes_are_found_behind_a_dictionary_of_heads():
    head = nn.ModuleDict({"heads": Heads(16, HeadSizes(6, 2, 8, 4))})
    found = settings_of(encoder(), head, (DEPTH,), 1.0, 1.0, 0.05)
    assert sum(group.startswith("prototypes") for _, _, group in found.values()) == 2


@pytest.mark.parametrize(
    ("progress", "expected"), [(0.0, 0.2), (0.25, 0.2 + 0.8 * 0.146446609), (0.5, 0.6), (1.0, 1.0), (3.0, 1.0)]
)
def test_cosine(progress, expected):
    assert cosine(0.2, 1.0, progress) == pytest.approx(expected)
    assert cosine(1.0, 0.2, progress) == pytest.approx(1.2 - expected)
    assert cosine(0.3, 0.3, progress) == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("epochs", "steps", "expected"), [(3, None, 38), (0, None, 0), (0.5, None, 6), (3, 7, 7), (3, 0, 0)]
)
def test_lengths_in_steps(epochs, steps, expected):
    assert Schedule(100, 1, 8, 0, steps_per_epoch=12.5).in_steps(epochs, steps) == expected


def test_warm_up_and_cosine():
    factor = warmup_cosine(10, 4, 0.1)
    assert [factor(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert factor(4) == 1.0
    assert factor(7) == pytest.approx(0.55)
    assert factor(10) == factor(20) == pytest.approx(0.1)
    assert warmup_cosine(1, 0, 0.0)(0) == 1.0


@pytest.mark.parametrize(
    ("settings", "images", "expected"),
    [
        ({}, 6400, (1000, 1, 64, 100)),
        ({"effective_batch_size": 256}, 6400, (250, 4, 256, 25)),
        ({"effective_batch_size": 1024, "devices": 2, "num_nodes": 2}, 102_400, (1000, 4, 1024, 100)),
        ({"effective_batch_size": 1024}, 200, (11, 3, 192, 1)),
        ({"max_steps": 5}, 6400, (5, 1, 64, 4)),
        ({"max_steps": 5, "warmup_steps": 2}, 6400, (5, 1, 64, 2)),
        ({"epochs": 1, "warmup_epochs": 2}, 640, (10, 1, 64, 9)),
        ({}, 3, (1, 1, 64, 0)),
    ],
)
def test_how_long_a_training_takes(settings, images, expected):
    options = {
        "batch_size": 64, "devices": 1, "num_nodes": 1, "effective_batch_size": None, "epochs": 10, "max_steps": None,
        "warmup_epochs": 1.0, "warmup_steps": None,
    }  # fmt: skip
    schedule = Schedule.of(SimpleNamespace(**(options | settings)), images)
    assert (schedule.steps, schedule.accumulate, schedule.images_per_step, schedule.warmup_steps) == expected


def test_masks_depend_on_the_seeds_only():
    student = task()
    torch.manual_seed(1)
    first = student.draw_mask(3, 7, 0)
    torch.manual_seed(2)
    assert first.keep.equal(student.draw_mask(3, 7, 0).keep)
    for other in (student.draw_mask(3, 8, 0), student.draw_mask(3, 7, 1), task(seed=1).draw_mask(3, 7, 0)):
        assert not first.keep.equal(other.keep)


def test_building_a_task_leaves_the_random_state_alone():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first, second = task(), task()
    assert torch.random.get_rng_state().equal(before)
    assert all(a.equal(b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
