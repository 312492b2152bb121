"""Targets and losses of self-distillation against slow loops written from the papers, and against lightly's."""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightly.loss import DINOLoss, IBOTPatchLoss
from lightly.loss.swav_loss import sinkhorn
from torch import Tensor

from geoexplora.objectives.distillation import (
    centered_targets,
    dino_loss,
    ibot_loss,
    koleo_loss,
    sinkhorn_targets,
    sum_of_rows,
    target_health,
    token_weights,
    update_center,
)

SINGLE = {"rtol": 2e-5, "atol": 2e-6}
"""The package computes in fp32, the loops in fp64."""


def numbers(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def distributions(*shape: int, seed: int = 1) -> Tensor:
    return numbers(*shape, seed=seed, scale=3.0).softmax(-1)


def slow_cross_entropy(target: Tensor, scores: Tensor, temperature: float = 0.1) -> Tensor:
    """One pair of rows (K,), one prototype at a time, in fp64."""
    scaled = [score / temperature for score in scores]
    largest = max(score.item() for score in scaled)
    total = sum(torch.exp(score - largest) for score in scaled)
    logs = [score - largest - torch.log(total) for score in scaled]
    return -sum(t * log for t, log in zip(target.tolist(), logs, strict=True))


def slow_dino_loss(student: Tensor, targets: Tensor) -> Tensor:
    losses = []
    for image in range(student.shape[1]):
        for t in range(len(targets)):
            for v in range(len(student)):
                if t != v:
                    losses.append(slow_cross_entropy(targets[t, image].double(), student[v, image]))
    return sum(losses) / len(losses)


def slow_ibot_loss(student: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """The mean over crops of the mean over a crop's hidden tokens."""
    total, token = torch.zeros((), dtype=torch.float64), 0
    for crop in mask:
        losses = []
        for hidden in crop.tolist():
            if hidden:
                losses.append(slow_cross_entropy(targets[token].double(), student[token]))
                token += 1
        total = total + (sum(losses) / len(losses) if losses else 0.0)
    assert token == len(student)
    return total / len(mask)


def assert_equal_with_gradient(fast: Callable[[Tensor], Tensor], slow: Callable[[Tensor], Tensor], x: Tensor) -> None:
    single, double = x.clone().requires_grad_(), x.double().requires_grad_()
    value, expected = fast(single), slow(double)
    torch.testing.assert_close(value.double(), expected, **SINGLE)
    value.backward()
    expected.backward()
    assert single.grad is not None
    assert double.grad is not None
    torch.testing.assert_close(single.grad.double(), double.grad, **SINGLE)


@pytest.mark.parametrize("crops", [2, 3, 10])
@pytest.mark.parametrize("images", [1, 2, 5])
@pytest.mark.parametrize("prototypes", [2, 7, 64])
def test_dino_loss_against_a_loop(crops: int, images: int, prototypes: int) -> None:
    targets = distributions(2, images, prototypes)
    student = numbers(crops, images, prototypes)
    assert_equal_with_gradient(lambda x: dino_loss(x, targets), lambda x: slow_dino_loss(x, targets), student)


def test_dino_loss_in_autocast_computes_in_single() -> None:
    """Near the start scores are almost uniform: their gradient is a small difference, which bf16 would lose."""
    targets, student = distributions(2, 3, 4096), numbers(6, 3, 4096, scale=0.01).requires_grad_()
    plain = dino_loss(student, targets)
    (expected,) = torch.autograd.grad(plain, student)
    with torch.autocast("cpu", torch.bfloat16):
        loss = dino_loss(student, targets)
    assert loss.equal(plain)
    assert torch.autograd.grad(loss, student)[0].equal(expected)


@pytest.mark.parametrize("crops", [2, 4, 10])
@pytest.mark.parametrize("temperature", [0.04, 0.07, 1.0])
def test_dino_loss_and_center_equal_lightlys(crops: int, temperature: float) -> None:
    reference = DINOLoss(16, teacher_temp=temperature)
    center = numbers(16, seed=5)
    reference.center = center.clone().view(1, 1, -1)
    for step in range(3):
        teacher, student = numbers(2, 3, 16, seed=step, scale=0.3), numbers(crops, 3, 16, seed=9 + step)
        loss = dino_loss(student, centered_targets(teacher, center, temperature))
        update_center(center, sum_of_rows(teacher.flatten(0, 1)))
        expected = reference(list(teacher), list(student), teacher_temp=temperature)
        torch.testing.assert_close(loss, expected, **SINGLE)
        torch.testing.assert_close(center, reference.center.flatten())


MASKS = {
    "some": lambda shape: torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5,
    "all": lambda shape: torch.ones(shape, dtype=torch.bool),
    "one crop": lambda shape: (torch.arange(math.prod(shape)) < shape[1] // 2).view(shape),
    "one token": lambda shape: (torch.arange(math.prod(shape)) == 3).view(shape),
}


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("prototypes", [2, 33])
@pytest.mark.parametrize("crops", [1, 4])
def test_ibot_loss_against_a_loop(kind: str, prototypes: int, crops: int) -> None:
    mask = MASKS[kind]((crops, 6))
    tokens = int(mask.sum())
    targets, student = distributions(tokens, prototypes), numbers(tokens, prototypes)
    assert_equal_with_gradient(
        lambda x: ibot_loss(x, targets, token_weights(mask), len(mask)),
        lambda x: slow_ibot_loss(x, targets, mask),
        student,
    )


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("temperature", [0.04, 0.07])
def test_ibot_loss_and_center_equal_lightlys(kind: str, temperature: float) -> None:
    mask = MASKS[kind]((4, 6))
    tokens = int(mask.sum())
    reference = IBOTPatchLoss(16)
    center = numbers(16, seed=5)
    reference.center.center = center.clone().view(1, -1)
    teacher, student = numbers(tokens, 16, seed=1, scale=0.3), numbers(tokens, 16)
    loss = ibot_loss(student, centered_targets(teacher, center, temperature), token_weights(mask), 4)
    update_center(center, sum_of_rows(teacher))
    torch.testing.assert_close(loss, reference(teacher, student, mask.view(4, 2, 3), temperature), **SINGLE)
    torch.testing.assert_close(center, reference.center.value.flatten())


def test_no_hidden_tokens() -> None:
    """A loss of 0 whose gradients are defined, targets of no rows, a center that stays."""
    center = numbers(8)
    before = center.clone()
    student = torch.empty(0, 8, requires_grad=True)
    mask = torch.zeros(4, 6, dtype=torch.bool)
    weight = torch.ones(8, 8, requires_grad=True)
    for targets in (centered_targets(torch.empty(0, 8), center, 0.1), sinkhorn_targets(torch.empty(0, 8), 0.1)):
        assert targets.shape == (0, 8)
        loss = ibot_loss(student @ weight, targets, token_weights(mask), 4)
        assert loss == 0
        loss.backward()
    assert weight.grad is not None
    assert (weight.grad == 0).all()
    update_center(center, sum_of_rows(torch.empty(0, 8)))
    assert center.equal(before)


@pytest.mark.parametrize("seed", range(3))
def test_token_weights_against_a_loop(seed: int) -> None:
    mask = torch.rand(5, 7, generator=torch.Generator().manual_seed(seed)) < 0.4
    mask[2] = False
    expected = [1 / int(crop.sum()) for crop in mask for hidden in crop.tolist() if hidden]
    assert token_weights(mask).tolist() == pytest.approx(expected)


def slow_koleo(features: Tensor, eps: float = 1e-8) -> Tensor:
    rows = [row / row.square().sum().sqrt() for row in features]
    logs = []
    for i, row in enumerate(rows):
        distances = [(row - other + eps).square().sum().sqrt() for j, other in enumerate(rows) if j != i]
        logs.append(torch.log(min(distances, key=Tensor.item) + eps))
    return -sum(logs) / len(logs)


@pytest.mark.parametrize("images", [2, 3, 9])
@pytest.mark.parametrize("width", [2, 16])
def test_koleo_against_a_loop(images: int, width: int) -> None:
    assert_equal_with_gradient(koleo_loss, slow_koleo, numbers(images, width, seed=images))


def test_koleo_of_equal_features_stays_finite() -> None:
    features = torch.ones(3, 4, requires_grad=True)
    loss = koleo_loss(features)
    loss.backward()
    assert features.grad is not None
    assert torch.isfinite(loss)
    assert torch.isfinite(features.grad).all()


def test_koleo_computes_in_fp32_under_autocast() -> None:
    features = numbers(6, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert koleo_loss(features).equal(koleo_loss(features.clone()))
        under = koleo_loss(features)
    assert under.equal(koleo_loss(features))


@pytest.mark.parametrize("images", [0, 1])
def test_koleo_refuses_a_batch_without_neighbours(images: int) -> None:
    with pytest.raises(ValueError, match="batch of one"):
        koleo_loss(torch.randn(images, 4))


@pytest.mark.parametrize("temperature", [0.04, 0.5, 2.0])
@pytest.mark.parametrize("shape", [(1, 2), (4, 3), (2, 3, 9)])
def test_centered_targets_against_a_loop(temperature: float, shape: tuple[int, ...]) -> None:
    logits, center = numbers(*shape), numbers(shape[-1], seed=4)
    targets = centered_targets(logits, center, temperature)
    for row, given in zip(targets.flatten(0, -2), logits.flatten(0, -2), strict=True):
        exps = [math.exp((float(score) - float(c)) / temperature - 60) for score, c in zip(given, center, strict=True)]
        assert row.tolist() == pytest.approx([e / sum(exps) for e in exps], rel=1e-4, abs=1e-7)


def slow_sinkhorn(logits: Tensor, temperature: float, iterations: int) -> Tensor:
    rows, columns = logits.shape
    peak = float(logits.max())
    q = [[math.exp((float(score) - peak) / temperature) for score in row] for row in logits]
    for _ in range(iterations):
        used = [sum(q[r][k] for r in range(rows)) for k in range(columns)]
        q = [[q[r][k] / used[k] / columns for k in range(columns)] for r in range(rows)]
        q = [[value / sum(row) / rows for value in row] for row in q]
    return torch.tensor(q, dtype=torch.float64) * rows


@pytest.mark.parametrize("rows", [1, 2, 12])
@pytest.mark.parametrize("prototypes", [2, 5, 32])
@pytest.mark.parametrize("temperature", [0.04, 0.07, 1.0])
@pytest.mark.parametrize("iterations", [1, 3])
def test_sinkhorn_against_a_loop_and_lightly(rows: int, prototypes: int, temperature: float, iterations: int) -> None:
    logits = numbers(rows, prototypes, seed=rows, scale=0.4)
    targets = sinkhorn_targets(logits, temperature, iterations)
    torch.testing.assert_close(targets.double(), slow_sinkhorn(logits, temperature, iterations), **SINGLE)
    torch.testing.assert_close(targets, sinkhorn(logits, iterations, temperature), **SINGLE)
    torch.testing.assert_close(targets.sum(1), torch.ones(rows))


def test_sinkhorn_uses_all_prototypes_alike() -> None:
    logits = numbers(40, 8, scale=0.5) + torch.linspace(0, 1, 8)  # the last prototype wins everywhere
    plain = centered_targets(logits, torch.zeros(8), 0.1).sum(0)
    assert plain.max() > 2 * 40 / 8
    balanced = sinkhorn_targets(logits, 0.1, 200).sum(0)
    torch.testing.assert_close(balanced, torch.full((8,), 5.0), rtol=1e-3, atol=0)


@pytest.mark.parametrize("shift", [0.0, 1e4, -1e4])
def test_sinkhorn_does_not_overflow(shift: float) -> None:
    logits = numbers(6, 4) + shift
    targets = sinkhorn_targets(logits, 0.04)
    assert torch.isfinite(targets).all()
    torch.testing.assert_close(targets.sum(1), torch.ones(6))


@pytest.mark.parametrize("spread", [2.0, 5.0])
def test_sinkhorn_does_not_underflow(spread: float) -> None:
    """Prototypes of length 5 give scores between -5 and 5: over 200 temperatures apart."""
    logits = torch.tensor([[spread, -spread, 0.0], [-spread, -1.1 * spread, -1.2 * spread]])
    targets = sinkhorn_targets(logits, 0.04)
    torch.testing.assert_close(targets.sum(1), torch.ones(2))
    torch.testing.assert_close(targets.double(), slow_sinkhorn(logits, 0.04, 3), **SINGLE)


def test_sinkhorn_in_half_precision_computes_in_single() -> None:
    logits = numbers(6, 4).bfloat16()
    assert sinkhorn_targets(logits, 0.1).equal(sinkhorn_targets(logits.float(), 0.1))


def test_targets_take_no_gradient() -> None:
    logits = numbers(3, 4).requires_grad_()
    assert not centered_targets(logits, torch.zeros(4), 0.1).requires_grad
    assert not sinkhorn_targets(logits, 0.1).requires_grad
    center = torch.zeros(4)
    update_center(center, sum_of_rows(logits))
    assert not center.requires_grad


@pytest.mark.parametrize("momentum", [0.0, 0.9, 1.0])
def test_center_against_the_formula(momentum: float) -> None:
    center, logits = numbers(5), numbers(7, 5, seed=3)
    expected = momentum * center.double() + (1 - momentum) * sum(row.double() for row in logits) / 7
    update_center(center, sum_of_rows(logits), momentum)
    torch.testing.assert_close(center.double(), expected, **SINGLE)


def run_process(rank: int, shared: Path, parts: list[Tensor], center: Tensor) -> None:
    """One of several processes: a file appears with what it computed."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{shared / 'store'}", rank=rank, world_size=len(parts))
    targets = sinkhorn_targets(parts[rank], 0.1)
    update_center(center, sum_of_rows(parts[rank]))
    torch.save((targets, center), shared / f"{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("rows", [(3, 5), (0, 4), (0, 0)])
def test_two_processes_equal_one(rows: tuple[int, ...], tmp_path: Path) -> None:
    """Rows weigh alike in whichever process; one without rows waits for the other and does not count."""
    logits, center = numbers(sum(rows), 6), numbers(6, seed=8)
    fork: Any = multiprocessing.get_context("fork")
    parts = list(logits.split(rows))
    processes = [fork.Process(target=run_process, args=(rank, tmp_path, parts, center.clone())) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    targets = torch.cat([targets for targets, _ in results])
    torch.testing.assert_close(targets, sinkhorn_targets(logits, 0.1), **SINGLE)
    expected = center.clone()
    update_center(expected, sum_of_rows(logits))
    for _, moved in results:
        torch.testing.assert_close(moved, expected)
    assert moved.equal(center) == (sum(rows) == 0)


@pytest.mark.parametrize("prototypes", [2, 50])
def test_health_of_targets(prototypes: int) -> None:
    largest = math.log(prototypes)
    uniform = target_health(torch.full((6, prototypes), 1 / prototypes))
    assert float(uniform["teacher_entropy"]) == pytest.approx(largest)
    assert float(uniform["teacher_mean_entropy"]) == pytest.approx(largest)
    one_hot = target_health(torch.eye(prototypes))
    assert float(one_hot["teacher_entropy"]) == 0
    assert float(one_hot["teacher_mean_entropy"]) == pytest.approx(largest)
    same = target_health(distributions(1, prototypes).expand(5, -1))
    assert float(same["teacher_entropy"]) == pytest.approx(float(same["teacher_mean_entropy"]))
    rows = distributions(9, prototypes)
    health = target_health(rows)
    slow = [-sum(p * math.log(p) for p in row.tolist()) for row in rows]
    assert float(health["teacher_entropy"]) == pytest.approx(sum(slow) / 9, rel=1e-5)
    assert 0 < health["teacher_entropy"] < health["teacher_mean_entropy"] <= largest + 1e-6
