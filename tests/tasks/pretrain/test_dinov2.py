"""The DINOv2 task: schedules by step, seeds, what is trained and what exists twice."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from geoexplora.bands import FMOW_SENTINEL_BANDS, FMOW_SENTINEL_GROUPS, RGB
from geoexplora.tasks.pretrain.dinov2 import ExPLoRADINOv2

STEPS = 10
SMALL = {
    "model": "vit_pico", "image_size": 32, "patch_size": 8, "local_size": 16, "local_crops": 2, "rank": 4,
    "prototypes": 12, "head_layers": 2, "head_hidden": 16, "head_bottleneck": 8, "augmentation": "none",
    "whole_blocks": ["L"], "total_steps": STEPS,
}  # fmt: skip
SOURCE = {
    "source": {"name": "a file"}, "band_init": None, "patch_resize": None, "new_bands": False, "decoder_loaded": False,
    "new_outputs": True, "encoder": None, "decoder": None,
}  # fmt: skip
"""What a checkpoint keeps of source weights of the same bands."""


def normalization(bands: tuple[str, ...]) -> dict[str, Any]:
    return {"method": "standardize", "bands": bands, "mean": [0.0] * len(bands), "std": [1.0] * len(bands)}


def rgb(**settings: Any) -> ExPLoRADINOv2:
    bands = RGB.band_names
    given = {"sensor": "rgb", "bands": bands, "normalization": normalization(bands)}
    return ExPLoRADINOv2(**(SMALL | given | settings))


def multispectral(**settings: Any) -> ExPLoRADINOv2:
    bands = tuple(FMOW_SENTINEL_BANDS)
    given = {"bands": bands, "normalization": normalization(bands), "groups": FMOW_SENTINEL_GROUPS}
    return ExPLoRADINOv2(**(SMALL | given | settings))


def from_source(model: str = "vit_pico", style: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    return SOURCE | {"architecture": {"model": model, "sizes": None, "style": style or {}}} | changes


def at_step(task: ExPLoRADINOv2, step: int, rank: int = 0) -> ExPLoRADINOv2:
    """The task as if a trainer had come to that step."""
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(total_batch_idx=step))
    task._trainer = SimpleNamespace(global_step=step, global_rank=rank, fit_loop=loop)
    return task


def images_for(task: ExPLoRADINOv2, count: int = 2, side: int = 40) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, len(task.spec.bands), side, side, generator=generator)


def step_of(task: ExPLoRADINOv2, step: int, rank: int = 0, **batch: Any) -> dict[str, Any]:
    at_step(task, step, rank).on_train_batch_start(batch, 0)
    return task.training_step({"image": images_for(task)} | batch, 0)


def half_cosine(start: float, end: float, progress: float) -> float:
    return start + (end - start) * (1 - math.cos(math.pi * progress)) / 2


# Schedules


@pytest.mark.parametrize(("warmup", "step", "expected"), [
    (4, 0, 0.04), (4, 1, 0.0475), (4, 2, 0.055), (4, 4, 0.07), (4, 9, 0.07), (0, 0, 0.07), (0, 5, 0.07),
])  # fmt: skip
def test_temperature(warmup: int, step: int, expected: float) -> None:
    assert rgb(teacher_warmup_steps=warmup).temperature(step) == pytest.approx(expected)


def test_momentum() -> None:
    task = rgb(teacher_momentum=0.9)
    for step in range(STEPS + 1):
        assert task.momentum(step) == pytest.approx(half_cosine(0.9, 1.0, step / STEPS))
    assert task.momentum(0) == pytest.approx(0.9)
    assert task.momentum(STEPS) == task.momentum(2 * STEPS) == 1.0


def optimized(task: ExPLoRADINOv2) -> tuple[Any, Any]:
    made: Any = task.configure_optimizers()
    return made["optimizer"], made["lr_scheduler"]["scheduler"]


def test_weight_decay_rises_by_a_cosine_where_there_is_any() -> None:
    task = rgb(weight_decay=0.04, weight_decay_end=0.4)
    optimizer, _ = optimized(task)
    assert {group["weight_decay"] for group in optimizer.param_groups if group["decays"]} == {0.04}
    for step in (0, 3, 5, 9, 10):
        at_step(task, step).optimizer_step(0, 0, optimizer)
        expected = half_cosine(0.04, 0.4, step / STEPS)
        assert {group["decays"] for group in optimizer.param_groups} == {True, False}
        for group in optimizer.param_groups:
            assert group["weight_decay"] == (pytest.approx(expected) if group["decays"] else 0.0)


def test_weight_decay_stays_where_no_end_is_given() -> None:
    task = rgb(weight_decay=0.04)
    optimizer, _ = optimized(task)
    at_step(task, 9).optimizer_step(0, 0, optimizer)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.04, 0.0}


@pytest.mark.parametrize("frozen", [0, 3])
@pytest.mark.parametrize("separate", [False, True])
def test_prototypes_stay_for_the_first_steps(frozen: int, separate: bool) -> None:
    task = rgb(freeze_last_steps=frozen, separate_heads=separate, lr=0.5, warmup_steps=2, min_lr=0.1)
    optimizer, schedule = optimized(task)
    prototypes = {id(p) for name, p in task.model.student.named_parameters() if ".prototypes." in name}
    assert len(prototypes) == (4 if separate else 2)
    for step in range(STEPS + 1):
        usual = 0.5 * (step + 1) / 2 if step < 2 else half_cosine(0.5, 0.1, (step - 2) / (STEPS - 2))
        for group in optimizer.param_groups:
            last = {id(p) in prototypes for p in group["params"]}
            assert len(last) == 1
            assert group["name"].startswith("prototypes") == (True in last)
            assert group["lr"] == pytest.approx(0.0 if True in last and step < frozen else usual)
        optimizer.step()
        schedule.step()


def test_frozen_prototypes_do_not_move_and_all_else_does() -> None:
    task = rgb(freeze_last_steps=2, weight_decay=0.1, lr=0.01, augmentation="none")
    optimizer, schedule = optimized(task)
    student = dict(task.model.student.named_parameters())
    before = {name: p.detach().clone() for name, p in student.items()}
    for step in range(3):
        step_of(task, step)["loss"].backward()
        at_step(task, step).optimizer_step(0, 0, optimizer)
        schedule.step()
        optimizer.zero_grad()
        moved = {name for name, p in student.items() if not p.equal(before[name])}
        still = {name for name, p in student.items() if not p.requires_grad or (step < 2 and ".prototypes." in name)}
        # Without hidden tokens' gradients the mask token would stay; LoRA's A waits for B, which starts at zero.
        assert moved | {name for name in student if ".lora_A." in name and step == 0} >= student.keys() - still
        assert not moved & still


# Randomness


@pytest.mark.parametrize("build", [rgb, multispectral])
def test_masks_depend_on_the_seeds_only(build: Any) -> None:
    task = build(mask_range=(0.4, 0.5))  # of 16 tokens enough for a block
    torch.manual_seed(1)
    first = task.draw_mask(8, 7, 0)
    torch.manual_seed(2)
    assert first.shape == (8, task.num_groups * 16)
    assert int(first.any(1).sum()) == 4
    assert first.equal(task.draw_mask(8, 7, 0))
    for other in (
        task.draw_mask(8, 8, 0),
        task.draw_mask(8, 7, 1),
        build(mask_range=(0.4, 0.5), seed=1).draw_mask(8, 7, 0),
    ):
        assert not first.equal(other)


@pytest.mark.parametrize("build", [rgb, multispectral])
def test_a_step_depends_on_seed_batch_and_process_only(build: Any) -> None:
    def loss(step: int, rank: int = 0, **settings: Any) -> float:
        task = build(drop_path=0.5, centering="sinkhorn", **settings).train()
        return float(step_of(task, step, rank)["value"])

    torch.manual_seed(1)
    first = loss(3)
    torch.manual_seed(2)
    assert loss(3) == first
    assert len({first, loss(4), loss(3, 1), loss(3, seed=1)}) == 4


def test_building_a_task_leaves_the_random_state_alone() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first, second = rgb(), rgb()
    assert torch.random.get_rng_state().equal(before)
    assert all(a.equal(b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_square_tiles_need_no_sizes() -> None:
    task = rgb(centering="sinkhorn")
    plain = step_of(task, 0)["value"]
    assert plain.equal(step_of(task, 0, size=torch.tensor([[40, 40]] * 2))["value"])
    assert not plain.equal(step_of(task, 0, size=torch.tensor([[40, 80]] * 2))["value"])


# Steps


@pytest.mark.parametrize("build", [rgb, multispectral])
@pytest.mark.parametrize("settings", [{}, {"local_crops": 0}, {"local_size": 32}, {"separate_heads": True}])
def test_what_a_step_returns(build: Any, settings: dict[str, Any]) -> None:
    task = build(teacher_warmup_steps=5, **settings)
    result = step_of(task, 2)
    assert result["value"].equal(result["loss"].detach())
    assert result["loss"].requires_grad
    assert not result["value"].requires_grad
    assert result["features"].shape == (4, 128)
    parts = result["parts"]
    assert parts.keys() == {
        "dino_loss", "ibot_loss", "koleo_loss", "teacher_entropy", "teacher_mean_entropy", "teacher_student_kl",
        "teacher_temperature", "teacher_momentum",
    }  # fmt: skip
    assert float(parts["teacher_temperature"]) == pytest.approx(0.04 + 0.03 * 2 / 5)
    assert float(parts["teacher_momentum"]) == pytest.approx(task.momentum(2))
    total = parts["dino_loss"] + parts["ibot_loss"] + 0.1 * parts["koleo_loss"]
    torch.testing.assert_close(result["value"], total)
    result["loss"].backward()
    for name, parameter in task.model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_a_step_moves_the_student_then_the_teacher() -> None:
    task = rgb(lr=0.01, teacher_momentum=0.5)
    optimizer, _ = optimized(task)
    teacher, student = (dict(one.named_parameters()) for one in (task.model.teacher, task.model.student))
    before = {name: p.clone() for name, p in teacher.items()}
    step_of(task, 5)["loss"].backward()
    at_step(task, 5).optimizer_step(0, 0, optimizer)
    momentum = task.momentum(5)
    assert 0.5 < momentum < 1
    for name, parameter in teacher.items():
        torch.testing.assert_close(parameter, momentum * before[name] + (1 - momentum) * student[name])
    assert any(not p.equal(before[name]) for name, p in teacher.items())


def test_the_encoder_that_counts_is_the_teachers() -> None:
    task = rgb()
    assert task.encoder is task.model.teacher.encoder
    assert task.trained_encoder is task.model.student.encoder
    assert not any(p.requires_grad for p in task.encoder.parameters())


# What is trained


def trained(task: ExPLoRADINOv2) -> dict[str, int]:
    return {row.part: row.trainable for row in task.parameter_table() if row.trainable}


HEADS = 128 * 16 + 16 + 16 * 8 + 8 + 12 * 8 + 12
BLOCK = 12 * 128**2 + 9 * 128 + 4 * 128


@pytest.mark.parametrize("separate", [False, True])
def test_rows_of_the_table(separate: bool) -> None:
    task = rgb(source_state=from_source(), separate_heads=separate)
    assert trained(task) == {
        "whole blocks": BLOCK,
        "LoRA": 7 * 2 * 2 * 4 * 128,
        "norms": (7 * 2 + 1) * 2 * 128,
        "class token": 128,
        "heads": HEADS * (2 if separate else 1) + 128,
    }
    table = task.parameter_table()
    total = sum(row.trainable + row.frozen for row in table)
    assert total == sum(p.numel() for p in task.model.student.parameters())


def test_new_bands_train_the_embeddings_too() -> None:
    task = multispectral(source_state=from_source(new_bands=True))
    parts = trained(task)
    assert parts["patch embedding"] == 128 * (10 * 64 + 3)
    assert parts["position encoding"] == 17 * 96
    assert parts["channel encoding"] == 3 * 32


@pytest.mark.parametrize(("new_bands", "mode", "expected"), [
    (True, "explora", 1.0), (True, "full", 1.0), (False, "full", 0.5**9 * 0.2), (True, "scratch", 0.5**9 * 0.2),
])  # fmt: skip
def test_rates_of_patch_embeddings(new_bands: bool, mode: Any, expected: float) -> None:
    """At full rate where they start anew beside a source; from scratch all layers are alike in that."""
    state = from_source(new_bands=new_bands)
    task = rgb(source_state=state, mode=mode, lr=1.0, layer_decay=0.5, patch_embed_lr_scale=0.2)
    optimizer, _ = optimized(task)
    rates = {id(p): group["initial_lr"] for group in optimizer.param_groups for p in group["params"]}
    student = task.model.student
    assert rates[id(student.encoder.patch_embed.proj.weight)] == pytest.approx(expected)
    assert rates[id(student.encoder.blocks[7].mlp.fc1.weight)] == pytest.approx(0.5)
    assert rates[id(student.encoder.norm.weight)] == 1.0
    assert rates[id(student.heads.mask_token)] == 1.0


def test_only_the_student_is_optimized() -> None:
    task = rgb(mode="full")
    optimizer, _ = optimized(task)
    optimized_ids = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(optimized_ids) == len(set(optimized_ids))
    assert set(optimized_ids) == {id(p) for p in task.model.student.parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("blocks", "rank", "expected"), [(["L"], 64, 18_723_840), (["L"], 0, 12_694_528), ([1, "L-1", "L"], 64, 43_387_904)]
)
def test_dinov2_large(blocks: list[int | str], rank: int, expected: int) -> None:
    """The paper's counts through the task, on the meta device; the teacher adds only what is trained."""
    with torch.device("meta"):
        task = rgb(
            model="vit_large", image_size=224, patch_size=14, local_size=98, whole_blocks=blocks, rank=rank,
            source_state=from_source("vit_large", {"layer_scale": True}), prototypes=65536, head_layers=3,
            head_hidden=2048, head_bottleneck=256,
        )  # fmt: skip
    parts = trained(task)
    heads = parts.pop("heads")
    assert parts.pop("class token") == 1_024
    assert sum(parts.values()) == expected
    student, both = (sum(p.numel() for p in module.parameters()) for module in (task.model.student, task.model))
    assert both - student == expected + 1_024 + heads
    frozen = {id(p) for p in task.model.student.parameters() if not p.requires_grad}
    assert frozen <= {id(p) for p in task.model.teacher.parameters()}


def test_a_restored_task_still_shares() -> None:
    task, other = rgb(), rgb(seed=1)
    other.load_state_dict(task.state_dict())
    assert other.model.dino_center.equal(task.model.dino_center)
    for a, b, source in zip(
        other.model.student.parameters(), other.model.teacher.parameters(), task.model.student.parameters(), strict=True
    ):
        assert (a is b) == (not a.requires_grad)
        assert a.equal(source)
