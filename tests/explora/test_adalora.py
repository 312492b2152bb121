"""AdaLoRA: penalty, budget and masks against loops by hand, and across a checkpoint."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from geoexplora.errors import RunError
from geoexplora.explora import FinetuneConfig, FineTuning, apply_finetuning, merged_state_dict
from geoexplora.explora.adalora import adalora_settings, orthogonality

from .conftest import fill_lora, images_for, plain_encoder
from .finetuning_helpers import KINDS, STEPS, optimizer_for, train

CONFIG = FinetuneConfig("adalora", 4, total_steps=STEPS)
START = 6


def tuned(config: FinetuneConfig = CONFIG, kind: str = "LayerScale") -> tuple[Any, FineTuning, torch.optim.Optimizer]:
    encoder = KINDS[kind]()
    torch.manual_seed(0)
    tuning = apply_finetuning(encoder, config)
    return encoder, tuning, optimizer_for(encoder)


# The penalty.


def penalty_by_hand(encoder: Any) -> Tensor:
    norms = []
    for block in encoder.blocks:
        for layer in (block.attn.q_proj, block.attn.v_proj):
            for vectors in (layer.lora_A["default"], layer.lora_B["default"].T):
                total = vectors.new_zeros(())
                for i, one in enumerate(vectors):
                    for j, other in enumerate(vectors):
                        total = total + ((one * other).sum() - (1.0 if i == j else 0.0)) ** 2
                norms.append(total.sqrt())
    return sum(norms, start=torch.tensor(0.0)) / len(norms)


@pytest.mark.parametrize("kind", KINDS)
def test_the_penalty_and_its_gradient_by_hand(kind: str) -> None:
    encoder, tuning, _ = tuned(kind=kind)
    fill_lora(encoder.double())
    vectors = [p for name, p in encoder.named_parameters() if "lora_A" in name or "lora_B" in name]
    penalty, expected = tuning.regularization(), 0.5 * penalty_by_hand(encoder)
    assert penalty is not None
    torch.testing.assert_close(penalty, expected, rtol=1e-12, atol=0)
    ours, theirs = torch.autograd.grad(penalty, vectors), torch.autograd.grad(expected, vectors)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)


def test_orthonormal_vectors_cost_nothing_and_have_a_finite_gradient() -> None:
    encoder, _, _ = tuned()
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                torch.nn.init.eye_(parameter)
    penalty = orthogonality(encoder)
    assert penalty.item() == 0
    penalty.backward()
    assert all(p.grad.isfinite().all() for name, p in encoder.named_parameters() if "lora_A" in name)


def test_autocast_does_not_blur_the_penalty() -> None:
    _, tuning, _ = tuned()
    expected = tuning.regularization()
    with torch.autocast("cpu", torch.bfloat16):
        penalty = tuning.regularization()
    assert penalty is not None
    assert expected is not None
    assert penalty.dtype == torch.float32
    assert penalty.equal(expected)


# The budget.


@pytest.mark.parametrize(("rank", "start"), [(1, 2), (2, 3), (3, 5), (8, 12), (16, 24)])
def test_the_rank_at_the_start(rank: int, start: int) -> None:
    settings = adalora_settings(rank, None, 100)
    assert (settings.target_r, settings.init_r, settings.lora_alpha) == (rank, start, start)


@pytest.mark.parametrize(
    ("steps", "first", "last"), [(1, 0, 0), (2, 0, 0), (3, 0, 1), (16, 2, 8), (85_904, 10_738, 42_952)]
)
def test_the_plan_for_runs_of_any_length(steps: int, first: int, last: int) -> None:
    settings = adalora_settings(8, None, steps)
    assert (settings.tinit, settings.tfinal, settings.total_step) == (first, last, max(2, steps))


def budget_by_hand(step: int, total: int, start: int, end: int) -> int:
    first, last = total // 8, max(2, total - total // 2)
    if step <= first:
        return start
    if step >= last:
        return end
    return int(end + (start - end) * (1 - (step - first) / (last - first)) ** 3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("total", [STEPS, 1, 2, 5])
def test_the_budget_falls_to_the_rank_asked_for_and_stays(kind: str, total: int) -> None:
    encoder, tuning, optimizer = tuned(FinetuneConfig("adalora", 4, total_steps=total), kind)
    assert set(tuning.ranks().values()) == {START}
    final = None
    for step in range(1, total + 3):  # a run may go on beyond its plan
        train(encoder, tuning, optimizer, [step])
        ranks = tuning.ranks()
        assert sum(ranks.values()) == budget_by_hand(step, total, 8 * START, 8 * 4)
        for name, rank in ranks.items():
            values = encoder.get_submodule(name).lora_E["default"]
            assert (values != 0).sum() == rank
        if step == max(2, total - total // 2):
            final = masks(encoder)
        elif final is not None:
            assert masks(encoder).equal(final)
    assert math.isclose(sum(ranks.values()) / len(ranks), 4)
    if total == STEPS:
        assert len(set(ranks.values())) > 1  # projections are not all alike


def masks(encoder: Any) -> Tensor:
    return torch.cat([p.flatten() != 0 for name, p in encoder.named_parameters() if ".lora_E." in name])


def test_the_least_important_values_are_taken_away() -> None:
    """Importance by hand: the paper's equations of sensitivity and uncertainty, and of a triplet's score."""
    encoder, tuning, optimizer = tuned()
    mean: dict[str, Tensor] = {}
    spread: dict[str, Tensor] = {}
    for step in range(1, 5):
        optimizer.zero_grad()
        encoder(images_for(encoder, seed=step)).square().mean().backward()
        optimizer.step()
        for name, p in encoder.named_parameters():
            if ".lora_" in name:
                now = (p * p.grad).abs().detach()
                mean[name] = 0.85 * mean.get(name, torch.zeros(())) + 0.15 * now
                spread[name] = 0.85 * spread.get(name, torch.zeros(())) + 0.15 * (now - mean[name]).abs()
        tuning.after_step(step)
    scores = []
    for name in mean:
        if ".lora_E." in name:
            a, b, e = (name.replace("lora_E", kind) for kind in ("lora_A", "lora_B", "lora_E"))
            for i in range(START):
                score = mean[e][i, 0] * spread[e][i, 0]
                score += (mean[a][i] * spread[a][i]).mean() + (mean[b][:, i] * spread[b][:, i]).mean()
                scores.append(score)
    kept = budget_by_hand(4, STEPS, 8 * START, 8 * 4)
    expected = torch.zeros(len(scores), dtype=torch.bool)
    expected[torch.stack(scores).argsort(descending=True)[:kept]] = True
    assert masks(encoder).equal(expected)


def test_a_step_that_overflowed_in_fp16_does_no_harm() -> None:
    encoder, tuning, optimizer = tuned()
    train(encoder, tuning, optimizer, [1])
    for parameter in encoder.parameters():
        if parameter.requires_grad:
            parameter.grad.fill_(float("inf"))
    tuning.after_step(2)
    train(encoder, tuning, optimizer, range(3, STEPS + 1))
    assert sum(tuning.ranks().values()) == 8 * 4


@pytest.mark.parametrize("step", [0, 1, 3])
def test_steps_left_out_or_told_twice_are_refused(step: int) -> None:
    encoder, tuning, optimizer = tuned()
    train(encoder, tuning, optimizer, [1])
    with pytest.raises(ValueError, match=f"follow every step: {step} came after 1"):
        tuning.after_step(step)


def test_cleared_gradients_are_refused() -> None:
    encoder, tuning, optimizer = tuned()
    train(encoder, tuning, optimizer, [1])
    optimizer.zero_grad()
    with pytest.raises(ValueError, match=r"blocks\.0.*has no gradient"):
        tuning.after_step(2)


# Across a checkpoint.


@pytest.mark.parametrize("stop", [2, 4, 8, 12])
def test_a_resumed_run_goes_on_to_the_bit(tmp_path: Path, stop: int) -> None:
    encoder, tuning, optimizer = tuned()
    train(encoder, tuning, optimizer, range(1, stop + 1))
    state = {"encoder": encoder.state_dict(), "optimizer": optimizer.state_dict(), "tuning": tuning.state_dict()}
    torch.save(state, tmp_path / "last.ckpt")
    merged_state_dict(encoder)  # as runs do at a checkpoint; it changes nothing

    resumed = plain_encoder()
    torch.manual_seed(99)
    again = apply_finetuning(resumed, CONFIG)
    stored = torch.load(tmp_path / "last.ckpt", weights_only=True)
    resumed.load_state_dict(stored["encoder"])
    again.load_state_dict(stored["tuning"])
    other = optimizer_for(resumed)
    other.load_state_dict(stored["optimizer"])
    assert again.ranks() == tuning.ranks()
    for step in range(stop + 1, STEPS + 1):
        train(encoder, tuning, optimizer, [step])
        train(resumed, again, other, [step])
        assert again.ranks() == tuning.ranks()
        assert masks(resumed).equal(masks(encoder))
    state = resumed.state_dict()
    assert all(state[name].equal(value) for name, value in encoder.state_dict().items())


def test_a_state_is_a_snapshot() -> None:
    encoder, tuning, optimizer = tuned()
    train(encoder, tuning, optimizer, range(1, 5))
    state = tuning.state_dict()
    before = copy.deepcopy(state)
    train(encoder, tuning, optimizer, range(5, STEPS + 1))
    tuning.load_state_dict(state)
    assert tuning.state_dict()["budget"]["step"] == 4
    for key in ("ipt", "exp_avg_ipt", "exp_avg_unc", "masks"):
        assert state["budget"][key].keys() == before["budget"][key].keys()
        assert all(value.equal(before["budget"][key][name]) for name, value in state["budget"][key].items())


def test_the_state_of_another_rank_is_refused() -> None:
    encoder, tuning, optimizer = tuned()
    train(encoder, tuning, optimizer, range(1, 5))
    other = apply_finetuning(plain_encoder(), FinetuneConfig("adalora", 2, total_steps=STEPS))
    with pytest.raises(RunError, match=r"state does not fit the encoder: blocks\.0\.attn\.q_proj\.lora_A"):
        other.load_state_dict(tuning.state_dict())
    assert other.state_dict()["budget"]["step"] == 0
