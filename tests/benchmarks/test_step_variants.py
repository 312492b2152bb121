"""Training steps that ``benchmarks/training_step.py`` measures, at a tiny size."""

from __future__ import annotations

import gc
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from geoexplora.objectives.dinov2 import HeadSizes

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TINY = {"embed_dim": 64, "depth": 3, "num_heads": 2}


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import step_variants_dinov2

    monkeypatch.setattr(step_variants_dinov2, "HEADS", HeadSizes(32, 2, 24, 8))
    monkeypatch.setattr(step_variants_dinov2, "LOCAL_CROPS", 2)


def modules() -> tuple[ModuleType, Any]:
    import step_measure
    from step_variants_dinov2 import DINOv2Variant

    return step_measure, DINOv2Variant


def two_steps(mode: str, precision: str = "fp32") -> tuple[list[float], dict[str, int]]:
    """Losses of two steps, and the bytes that were held at the second."""
    measure, kind = modules()
    variant = kind(mode, precision)
    built = variant.build("vit_small", **TINY)
    optimizer = measure.adamw(built)
    held: dict[str, int] = {}
    optimizer.register_step_post_hook(
        lambda *_: held.update(measure.distinct_bytes(measure.held_tensors(built, optimizer)))
    )
    step = variant.step(built, variant.inputs(2), optimizer)
    torch.manual_seed(0)
    return [float(step()) for _ in range(2)], held


def test_sharing_frozen_weights_changes_no_loss_and_saves_exactly_one_copy_of_them() -> None:
    kind = modules()[1]
    runs = {mode: two_steps(mode) for mode in kind.modes}
    (shared_losses, shared), (copied_losses, copied) = runs["explora"], runs["explora, copied"]
    assert shared_losses == pytest.approx(copied_losses, rel=1e-6)
    assert shared_losses[0] != pytest.approx(shared_losses[1], rel=1e-6)
    assert sum(shared.values()) < sum(copied.values()) < sum(runs["full"][1].values())
    student = kind("explora", "fp32").build("vit_small", **TINY).student
    frozen = sum(p.numel() * p.element_size() for p in student.parameters() if not p.requires_grad)
    assert copied["weights"] - shared["weights"] == frozen
    assert copied["moments"] == shared["moments"] and copied["gradients"] == shared["gradients"]
    assert runs["full"][1]["weights"] == 2 * runs["full"][1]["gradients"]


@pytest.mark.parametrize("mode", ["full", "explora, copied", "explora"])
def test_counting_without_values_finds_the_bytes_of_a_real_step(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    measure, kind = modules()
    build = kind.build
    monkeypatch.setattr(kind, "build", lambda self, *args, **others: build(self, *args, **(TINY | others)))
    cost = measure.count(kind(mode, "bf16"), "vit_small", 2)
    assert cost.held_bytes == sum(two_steps(mode)[1].values())
    assert cost.flops > 0


def test_losses_that_differ_stop_the_benchmark() -> None:
    import training_step

    kind = modules()[1]
    losses = {variant.name: 2.0 for variant in kind.all()}
    training_step.check_losses(kind, losses)
    with pytest.raises(SystemExit, match="losses differ"):
        training_step.check_losses(kind, losses | {"explora fp32": 2.001})


def test_live_bytes_follow_births_and_deaths_of_storages() -> None:
    from step_memory import LiveBytes

    start = torch.ones(1000)
    with LiveBytes([start]) as live:
        a = start + 1
        b = (a * 2).view(10, 100)  # a view takes nothing
        del a
        c = b.double()
        assert live.now == 4 * 1000 + 4 * 1000 + 8 * 1000
        del b, c
    gc.collect()
    assert live.now == 4 * 1000
    assert live.peak == 4 * 1000 + 4 * 1000 + 8 * 1000


def test_saved_bytes_count_each_storage_once_and_no_weights() -> None:
    from step_memory import SavedBytes

    weight, x = torch.ones(50, 40, requires_grad=True), torch.ones(30, 40)
    saved = SavedBytes([weight])
    with saved:
        y = (x @ weight.T).sigmoid()  # saves x, the weight and the result
        (y.t() @ y).sum().backward()  # saves the result twice more
    assert saved.take_total() == 4 * (30 * 40 + 30 * 50)
    assert saved.take_total() == 0


def test_a_line_through_small_batches_meets_a_larger_one(monkeypatch: pytest.MonkeyPatch) -> None:
    import step_memory

    kind = modules()[1]
    build = kind.build
    monkeypatch.setattr(kind, "build", lambda self, *args, **others: build(self, *args, **(TINY | others)))
    found = step_memory.estimate("vit_small", 6)
    for checkpointing, key in ((False, "off"), (True, "on")):
        real = step_memory.count_step("vit_small", 6, checkpointing)
        for what in ("activations", "peak"):
            assert found["checkpointing"][key][what]["at_batch"] == pytest.approx(real[what], rel=0.05)
        assert real["peak"] > sum(real["held"].values()) - real["held"]["gradients"] + real["activations"]
    off, on = (found["checkpointing"][key] for key in ("off", "on"))
    assert on["activations"]["at_batch"] < 0.6 * off["activations"]["at_batch"]
    assert on["held"] == off["held"]
    assert "| left of 16 GiB |" in step_memory.memory_table("vit_small", found)
