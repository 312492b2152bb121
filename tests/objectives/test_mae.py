"""The objective against slow loops written from the papers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from geoexplora.objectives.mae import mae_loss, normalize_patches, patchify, unpatchify
from geoexplora.objectives.masking import mask_from_noise, noise_shape

EXACT = {"rtol": 1e-9, "atol": 1e-12}


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 4), st.tuples(st.integers(1, 4), st.integers(1, 4)), st.sampled_from([1, 2, 3, 8])
)
def test_unpatchify_undoes_patchify(batch: int, bands: int, grid: tuple[int, int], patch: int) -> None:
    images = torch.rand(batch, bands, grid[0] * patch, grid[1] * patch)
    patches = patchify(images, patch)
    assert patches.shape == (batch, bands, grid[0] * grid[1], patch**2)
    assert unpatchify(patches, grid).equal(images)
    assert patchify(unpatchify(patches, grid), patch).equal(patches)


def test_patchify_against_a_loop() -> None:
    images = torch.rand(2, 3, 4, 6)
    patches = patchify(images, 2)
    for row in range(4):
        for column in range(6):
            position, pixel = 3 * (row // 2) + column // 2, 2 * (row % 2) + column % 2
            assert patches[:, :, position, pixel].equal(images[:, :, row, column])


def slow_patch(image: Tensor, patch: int, position: int) -> list[list[float]]:
    """Pixels of one patch, band by band."""
    columns = image.shape[2] // patch
    top, left = patch * (position // columns), patch * (position % columns)
    return [[float(band[top + y, left + x]) for y in range(patch) for x in range(patch)] for band in image]


def slow_normalize(bands: list[list[float]]) -> list[list[float]]:
    values = [value for band in bands for value in band]
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return [[(value - mean) / math.sqrt(variance + 1e-6) for value in band] for band in bands]


def slow_loss(
    pred: Tensor, images: Tensor, removed: Tensor, groups: Any, patch: int, norm_pix: bool, pairing: str
) -> float:
    """One hidden token at a time: the mean over its group's bands and pixels; then the mean over hidden tokens."""
    order = [band for group in groups for band in group]
    total = 0.0
    for sample, image in enumerate(images):
        for position in range(pred.shape[2]):
            target = slow_patch(image, patch, position)
            target = slow_normalize(target) if norm_pix else target
            for g, group in enumerate(groups):
                if not removed[sample, g, position]:
                    continue
                token = 0.0
                for band in group:
                    # The defect: the band's place in data order picks the prediction, which runs in group order.
                    predicted = pred[sample, order.index(band) if pairing == "own" else band, position].tolist()
                    token += sum((p - t) ** 2 for p, t in zip(predicted, target[band], strict=True))
                total += token / (len(group) * patch**2)
    return total / float(removed.sum())


GROUPS = [
    ((0, 1, 2),),
    ((2,), (0,), (1,)),
    ((0, 3), (1, 2, 4)),
    ((3, 0, 5), (4,), (1, 2)),
    ((0, 1, 2, 6), (3, 4, 5, 7), (8, 9)),
]


@pytest.mark.parametrize("pairing", ["own", "reference"])
@pytest.mark.parametrize("norm_pix", [False, True])
@pytest.mark.parametrize(("spatial", "ratio"), [(False, 0.75), (True, 0.5), (False, 0.2)])
@pytest.mark.parametrize(("patch", "grid"), [(2, (2, 2)), (4, (2, 3))])
@pytest.mark.parametrize("groups", GROUPS)
def test_against_the_slow_loss(
    groups: Any, patch: int, grid: tuple[int, int], spatial: bool, ratio: float, norm_pix: bool, pairing: Any
) -> None:
    generator = torch.Generator().manual_seed(len(groups))
    bands, positions = sum(map(len, groups)), grid[0] * grid[1]
    images = torch.randn(2, bands, grid[0] * patch, grid[1] * patch, generator=generator, dtype=torch.float64)
    pred = torch.randn(2, bands, positions, patch**2, generator=generator, dtype=torch.float64)
    noise = torch.rand(noise_shape(2, len(groups), positions, spatial), generator=generator, dtype=torch.float64)
    removed = mask_from_noise(noise, ratio, len(groups), spatial).removed
    order = [band for group in groups for band in group]
    loss = mae_loss(pred, images, removed, order, [len(group) for group in groups], norm_pix, pairing)
    expected = slow_loss(pred, images, removed, groups, patch, norm_pix, pairing)
    torch.testing.assert_close(loss, torch.tensor(expected, dtype=torch.float64), **EXACT)


def example(groups: Any = ((1, 2), (0,))) -> tuple[Tensor, Tensor, Tensor, list[int], list[int]]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 8, 8, generator=generator)
    removed = mask_from_noise(torch.rand(2, 8, generator=generator), 0.5, 2).removed
    order = [band for group in groups for band in group]
    return patchify(images, 4)[:, order], images, removed, order, [len(group) for group in groups]


def test_perfect_prediction_has_no_loss() -> None:
    pred, images, removed, order, sizes = example()
    assert mae_loss(pred, images, removed, order, sizes, norm_pix=False) == 0
    target = normalize_patches(patchify(images, 4))[0][:, order]
    assert mae_loss(target, images, removed, order, sizes) == 0


def test_visible_tokens_do_not_count() -> None:
    pred, images, removed, order, sizes = example()
    visible = (1 - removed).repeat_interleave(torch.tensor(sizes), dim=1)
    wrong = (pred + 100 * visible.unsqueeze(-1)).requires_grad_()
    loss = mae_loss(wrong, images, removed, order, sizes, norm_pix=False)
    assert loss == 0
    mae_loss(wrong + 1, images, removed, order, sizes, norm_pix=False).backward()
    assert wrong.grad is not None
    assert ((wrong.grad == 0).all(-1) == visible.bool()).all()


def test_each_hidden_token_counts_the_same() -> None:
    pred, images, removed, order, sizes = example()
    assert mae_loss(pred + 1, images, removed, order, sizes, norm_pix=False).item() == pytest.approx(1)


def test_pairings_agree_where_groups_are_in_data_order() -> None:
    pred, images, removed, order, sizes = example(((0, 1), (2,)))
    losses = [mae_loss(pred + 1, images, removed, order, sizes, pairing=p) for p in ("own", "reference")]
    assert losses[0].equal(losses[1])


def test_normalized_patches_can_be_undone() -> None:
    patches = patchify(torch.rand(2, 5, 8, 8, dtype=torch.float64), 4)
    normalized, mean, std = normalize_patches(patches)
    assert mean.shape == std.shape == (2, 1, 4, 1)
    torch.testing.assert_close(normalized * std + mean, patches)
    torch.testing.assert_close(normalized.mean(dim=(1, 3)), torch.zeros(2, 4, dtype=torch.float64))
    expected = torch.tensor(slow_normalize(patches[1, :, 2].tolist()), dtype=torch.float64)
    torch.testing.assert_close(normalized[1, :, 2], expected)


def test_constant_patches_stay_finite() -> None:
    images = torch.full((1, 3, 8, 8), 0.3)
    pred, _, removed, order, sizes = example()
    pred = pred[:1].clone().requires_grad_()
    loss = mae_loss(pred, images, removed[:1], order, sizes)
    loss.backward()
    assert torch.isfinite(loss)
    assert pred.grad is not None
    assert torch.isfinite(pred.grad).all()
