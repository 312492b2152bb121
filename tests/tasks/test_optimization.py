"""Learning rates of the parts, and the schedule."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from geoexplora.bands import FMOW_SENTINEL_BANDS, FMOW_SENTINEL_GROUPS
from geoexplora.tasks.mae_task import ExPLoRAPretrain
from geoexplora.tasks.optimization import parameter_groups, warmup_cosine
from geoexplora.tasks.schedule import Schedule


def task(**settings):
    small = {
        "model": "vit_pico", "image_size": 16, "patch_size": 8, "rank": 4, "decoder_width": 32, "decoder_depth": 1,
        "decoder_heads": 4, "bands": FMOW_SENTINEL_BANDS, "groups": FMOW_SENTINEL_GROUPS,
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
