"""The projection head against lightly's and against a loop."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from lightly.models.modules.heads import DINOv2ProjectionHead
from torch import Tensor

from geoexplora.models import linear as linear_module
from geoexplora.models.projection_head import ProjectionHead


def randomized(head: ProjectionHead, seed: int = 0) -> ProjectionHead:
    """Every tensor random, biases and lengths of the prototypes too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return head


def tokens(rows: int = 5, width: int = 12) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("prototypes", [2, 40])
def test_equals_lightlys_head(rows: int, prototypes: int) -> None:
    head = randomized(ProjectionHead(12, prototypes, layers=3, hidden=20, bottleneck=6))
    reference = DINOv2ProjectionHead(12, 20, 6, prototypes)
    state = reference.state_dict()
    ours = head.state_dict()
    renamed = {
        "last_layer.weight_g": "prototypes.parametrizations.weight.original0",
        "last_layer.weight_v": "prototypes.parametrizations.weight.original1",
    }
    assert len(state) == len(ours)
    reference.load_state_dict({name: ours[renamed.get(name, name.replace("layers.", "mlp."))] for name in state})
    x, y = (tokens(rows).requires_grad_() for _ in range(2))
    scores, expected = head(x), reference(y)
    torch.testing.assert_close(scores, expected)
    scores.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    grads = {name: parameter.grad for name, parameter in head.named_parameters()}
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(grads[renamed.get(name, name.replace("layers.", "mlp."))], parameter.grad)


def slow_scores(head: ProjectionHead, token: Tensor) -> list[float]:
    """One token, written from the paper, in Python's floats."""
    state = {name: value.double() for name, value in head.state_dict().items()}
    x = token.double()
    layers = sorted({int(name.split(".")[1]) for name in state if name.startswith("mlp.")})
    for layer in layers:
        if layer != layers[0]:
            x = torch.tensor([v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in x.tolist()], dtype=torch.float64)
        x = state[f"mlp.{layer}.weight"] @ x + state[f"mlp.{layer}.bias"]
    x = x / x.square().sum().sqrt()
    lengths, directions = (state[f"prototypes.parametrizations.weight.original{i}"] for i in (0, 1))
    return [
        float(length * (direction @ x) / direction.square().sum().sqrt())
        for length, direction in zip(lengths, directions, strict=True)
    ]


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
def test_against_a_loop(layers: int) -> None:
    head = randomized(ProjectionHead(12, 9, layers=layers, hidden=20, bottleneck=6))
    assert sum(name.endswith("weight") for name, _ in head.mlp.named_parameters()) == layers
    for row, token in zip(head(tokens()), tokens(), strict=True):
        assert row.tolist() == pytest.approx(slow_scores(head, token), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_scores_are_bounded_by_the_lengths_of_the_prototypes(scale: float) -> None:
    torch.manual_seed(0)
    head = ProjectionHead(12, 30, hidden=20, bottleneck=2)
    scores = head(scale * tokens(50))
    assert scores.abs().max() <= 1 + 1e-5
    assert scores.abs().max() > 0.9
    with torch.no_grad():
        head.prototypes.parametrizations.weight.original0.mul_(3)
    torch.testing.assert_close(head(scale * tokens(50)), 3 * scores)


def test_initial_weights() -> None:
    torch.manual_seed(0)
    head = ProjectionHead(64, 128, layers=2, hidden=256, bottleneck=32)
    state = head.state_dict()
    assert (state["prototypes.parametrizations.weight.original0"] == 1).all()
    torch.testing.assert_close(head.prototypes.weight.norm(dim=1), torch.ones(128))
    assert not any(state[f"mlp.{layer}.bias"].any() for layer in (0, 2))
    assert all(0.018 < state[f"mlp.{layer}.weight"].std() < 0.022 for layer in (0, 2))
    assert sum(p.numel() for p in head.parameters()) == 64 * 256 + 256 + 256 * 32 + 32 + 128 * 33


def test_no_tokens_have_no_scores_and_gradients_of_zero() -> None:
    head = randomized(ProjectionHead(12, 9, hidden=20, bottleneck=6))
    scores = head(torch.empty(0, 12))
    assert scores.shape == (0, 9)
    scores.sum().backward()
    assert all(parameter.grad is not None and (parameter.grad == 0).all() for parameter in head.parameters())


def test_can_be_copied() -> None:
    head = randomized(ProjectionHead(12, 9, hidden=20, bottleneck=6))
    other = copy.deepcopy(head)
    assert other(tokens()).equal(head(tokens()))
    with torch.no_grad():
        other.prototypes.parametrizations.weight.original1.add_(1)
    assert not other(tokens()).equal(head(tokens()))


def test_fast_linears_change_nothing() -> None:
    head = randomized(ProjectionHead(12, 9, hidden=20, bottleneck=6))
    expected = head(tokens())
    torch.testing.assert_close(linear_module.use_fast_linears(head)(tokens()), expected)
