"""Mixup, cutmix and random erasing against their formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from geoexplora.transforms.mixing import BatchMixing, random_erasing

B, C, S, K = 6, 2, 12, 4


def batch(several: bool = False) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(0)
    images = torch.rand(B, C, S, S, generator=draws) + torch.arange(B).view(B, 1, 1, 1) * 10
    labels = torch.tensor([0, 1, 2, 3, 1, 0])
    if several:
        return images, torch.randint(0, 2, (B, K), generator=draws)
    return images, labels


def one_hot(labels: Tensor) -> Tensor:
    return labels.float() if labels.ndim == 2 else torch.eye(K)[labels]


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_mixup(seed: int, several: bool) -> None:
    """x = lam x_i + (1 - lam) x_j, and the labels with the same lam and j."""
    images, labels = batch(several)
    torch.manual_seed(seed)
    mixed, soft = BatchMixing(K, mixup=0.8)(images, labels)
    assert mixed.shape == images.shape
    assert soft.shape == (B, K)
    assert soft.is_floating_point()
    found = []
    for i in range(B):
        fits = []
        for j in range(B):
            difference = (images[i] - images[j]).flatten()
            if i == j:
                continue
            lam = float((mixed[i] - images[j]).flatten() @ difference / (difference @ difference))
            if torch.allclose(mixed[i], lam * images[i] + (1 - lam) * images[j], atol=1e-3):
                fits.append((lam, j))
        assert fits, "no pair of images makes this one"
        lam, j = fits[0]
        torch.testing.assert_close(
            soft[i], lam * one_hot(labels)[i] + (1 - lam) * one_hot(labels)[j], atol=1e-3, rtol=0
        )
        found.append(lam)
    assert all(0 <= lam <= 1 and abs(lam - found[0]) < 1e-3 for lam in found), "one lam for the batch"


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_cutmix(seed: int, several: bool) -> None:
    """A box of another image, and labels by its share of the area."""
    images, labels = batch(several)
    torch.manual_seed(seed)
    mixed, soft = BatchMixing(K, cutmix=1.0)(images, labels)
    for i in range(B):
        other = (mixed[i] != images[i]).any(0)
        share = other.float().mean()
        rows, columns = other.any(1).sum(), other.any(0).sum()
        assert other.sum() == rows * columns, "a box"
        if not other.any():
            torch.testing.assert_close(soft[i], one_hot(labels)[i])
            continue
        source = int(mixed[i][:, other].mean() // 10)
        assert torch.equal(mixed[i][:, other], images[source][:, other])
        torch.testing.assert_close(soft[i], (1 - share) * one_hot(labels)[i] + share * one_hot(labels)[source])


def test_neither_changes_nothing() -> None:
    images, labels = batch()
    mixed, same = BatchMixing(K)(images, labels)
    assert mixed is images
    assert same is labels


def test_both_take_turns() -> None:
    """With both on, about half of the batches are cut: their images consist of whole pixels of two images."""
    images, labels = batch()
    mix = BatchMixing(K, mixup=1.0, cutmix=1.0)
    torch.manual_seed(0)
    cut = 0
    for _ in range(200):
        mixed, soft = mix(images, labels)
        assert torch.allclose(soft.sum(1), torch.ones(B))
        cut += all(bool(torch.isin(image, images).all()) for image in mixed)
    assert 70 < cut < 130


def test_the_same_seed_draws_the_same() -> None:
    images, labels = batch()
    mix = BatchMixing(K, mixup=0.5, cutmix=0.5)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(mix(images, labels)[0])
    assert results[0].equal(results[1])
    assert not results[0].equal(results[2])


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_random_erasing(share: float) -> None:
    torch.manual_seed(0)
    images = torch.rand(400, C, S, S) + 1
    erased = random_erasing(share)(images)
    gone = (erased == 0).all(1)
    assert torch.equal(erased[:, 0][~gone], images[:, 0][~gone]), "the rest stays"
    assert torch.equal((erased == 0).any(1), gone), "all bands of a pixel go"
    count = int(gone.flatten(1).any(1).sum())
    assert abs(count - 400 * share) <= (30 if 0 < share < 1 else 0)
    for mask in gone[gone.flatten(1).any(1)]:
        assert mask.sum() == mask.any(1).sum() * mask.any(0).sum(), "a box"
