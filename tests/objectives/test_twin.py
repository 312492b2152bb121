"""The averaged twin: what is frozen exists once, what is trained is averaged."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from geoexplora.explora import ExploraConfig, apply_explora
from geoexplora.explora.merge import merged_state_dict
from geoexplora.models.attention import use_fast_attention
from geoexplora.models.linear import use_fast_linears
from geoexplora.objectives.dinov2 import Branch, HeadSizes
from geoexplora.objectives.twin import averaged_twin, update_twin

WIDTH, DEPTH = 32, 3
SIZES = HeadSizes(prototypes=16, layers=2, hidden=24, bottleneck=8)


def plain_encoder() -> Any:
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=WIDTH, depth=DEPTH, num_heads=4, num_classes=0,
        init_values=1.0, dynamic_img_size=True,
    )  # fmt: skip


def branch(separate: bool = False, explora: bool = True) -> Branch:
    torch.manual_seed(0)
    encoder = plain_encoder()
    if explora:
        apply_explora(encoder, ExploraConfig((DEPTH,), 2))
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return Branch(encoder, HeadSizes(16, 2, 24, 8, separate))


def disturb(model: nn.Module, seed: int = 3) -> None:
    """Change what is trained, as an optimizer would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def storages(*models: nn.Module) -> int:
    """Bytes of all parameters, each storage counted once."""
    sizes = {
        parameter.untyped_storage().data_ptr(): parameter.untyped_storage().nbytes()
        for model in models
        for parameter in model.parameters()
    }
    return sum(sizes.values())


def trained_bytes(model: nn.Module) -> int:
    return sum(4 * parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("explora", [False, True])
def test_frozen_parameters_are_shared_and_trained_ones_copied(separate: bool, explora: bool) -> None:
    student = branch(separate, explora)
    trains = {name: parameter.requires_grad for name, parameter in student.named_parameters()}
    twin = averaged_twin(student)
    twins = dict(twin.named_parameters())
    assert twins.keys() == trains.keys()
    for name, parameter in student.named_parameters():
        assert parameter.requires_grad == trains[name]
        assert not twins[name].requires_grad
        assert (twins[name] is parameter) == (not parameter.requires_grad)
        assert twins[name].equal(parameter)
    assert not twin.training
    assert student.training
    assert (twin.heads.ibot is twin.heads.dino) == (not separate)
    assert storages(student, twin) == storages(student) + trained_bytes(student)
    assert (storages(twin) < 2 * storages(student)) and (trained_bytes(student) < storages(student)) == explora


def test_buffers_are_shared() -> None:
    class WithBuffer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))
            self.register_buffer("mean", torch.zeros(2))

    model = WithBuffer()
    twin = averaged_twin(model)
    assert twin.mean is model.mean
    assert twin.weight is not model.weight


def test_fast_layers_keep_the_sharing() -> None:
    """The task swaps layers of the finished objective."""
    student = branch()
    both = use_fast_linears(use_fast_attention(nn.ModuleList([student, averaged_twin(student)])))
    assert storages(both) == storages(both[0]) + trained_bytes(both[0])


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.996, 1.0])
def test_average_against_the_formula(momentum: float) -> None:
    student = branch(separate=True)
    twin = averaged_twin(student)
    expected = {name: parameter.double() for name, parameter in twin.named_parameters()}
    for step in range(3):
        disturb(student, step)
        update_twin(twin, student, momentum)
        for name, parameter in student.named_parameters():
            expected[name] = momentum * expected[name] + (1 - momentum) * parameter.double()
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(parameter.double(), expected[name], rtol=1e-5, atol=1e-6)
    if momentum == 1:
        assert all(parameter.equal(expected[name].float()) for name, parameter in twin.named_parameters())
    if momentum == 0:
        assert all(a.equal(b) for a, b in zip(twin.parameters(), student.parameters(), strict=True))


def test_moving_to_another_type_keeps_the_sharing() -> None:
    student = branch()
    both = nn.ModuleList([student, averaged_twin(student)]).to(torch.float64).to(torch.float32)
    shared = [a is b for a, b in zip(both[0].parameters(), both[1].parameters(), strict=True)]
    assert shared == [not parameter.requires_grad for parameter in both[0].parameters()]
    assert storages(both) == storages(both[0]) + trained_bytes(both[0])
    disturb(both[0])
    update_twin(both[1], both[0], 0.0)
    assert all(a.equal(b) for a, b in zip(both[0].parameters(), both[1].parameters(), strict=True))


def test_checkpoints_hold_frozen_tensors_once() -> None:
    student = branch()
    both = nn.ModuleList([student, averaged_twin(student)])
    disturb(both[0])
    file, alone = io.BytesIO(), io.BytesIO()
    torch.save(both.state_dict(), file)
    torch.save(both[0].state_dict(), alone)
    extra = file.tell() - alone.tell() - trained_bytes(both[0])
    assert extra < 400 * len(both.state_dict())  # names, and each storage's own entry
    frozen = storages(both[0]) - trained_bytes(both[0])
    assert extra < frozen

    other = branch()
    restored = nn.ModuleList([other, averaged_twin(other)])
    file.seek(0)
    restored.load_state_dict(torch.load(file, weights_only=True))
    assert storages(restored) == storages(both)
    assert all(a.equal(b) for a, b in zip(restored.parameters(), both.parameters(), strict=True))


def test_training_leaves_what_is_frozen_and_the_twin_follows_by_average_only() -> None:
    student = branch()
    twin = averaged_twin(student)
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1)
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    twins = dict(twin.named_parameters())
    for _ in range(3):
        tokens = student.encoder.forward_features(images)
        scores = student.heads(tokens[:, 0], tokens[:, 1:].flatten(0, 1))
        loss = sum(part.square().mean() for part in scores) + student.heads.mask_token.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for name, parameter in student.named_parameters():
            assert twins[name].equal(before[name]), name
            assert twins[name].grad is None or not parameter.requires_grad
    moved = {name for name, parameter in student.named_parameters() if not parameter.equal(before[name])}
    assert moved == {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    update_twin(twin, student, 0.9)
    assert {name for name, parameter in twins.items() if not parameter.equal(before[name])} == moved


def test_the_twins_encoder_merges_into_a_plain_one() -> None:
    student = branch()
    twin = averaged_twin(student)
    disturb(student)
    update_twin(twin, student, 0.5)
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    before = [parameter.clone() for parameter in (*student.parameters(), *twin.parameters())]
    plain = plain_encoder().eval()
    plain.load_state_dict(merged_state_dict(twin.encoder), strict=True)
    with torch.no_grad():
        expected: Tensor = twin.encoder(images)
        torch.testing.assert_close(plain(images), expected)
        assert not torch.allclose(student.eval().encoder(images), expected, atol=1e-3)
    for parameter, old in zip((*student.parameters(), *twin.parameters()), before, strict=True):
        assert parameter.equal(old)


def test_a_copy_of_the_twin_shares_nothing() -> None:
    student = branch()
    twin = averaged_twin(student)
    other = copy.deepcopy(twin)
    assert storages(student, twin, other) == storages(student, twin) + storages(twin)
