"""Features of patches, their principal components, and how these are made comparable and kept."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from sklearn.decomposition import PCA

from geoexplora.errors import RunError
from geoexplora.models.group_channel_vit import GroupChannelVisionTransformer
from geoexplora.tasks.pretrain.patch_features import (
    align,
    patch_features,
    principal_scores,
    read_before,
    score_colours,
    store_before,
)


def features(*shape: int, seed: int = 0) -> torch.Tensor:
    """Features whose dimensions vary by different amounts, off the origin."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(shape[-1], shape[-1], generator=generator)
    return torch.randn(shape, generator=generator) @ mixing + 3


@pytest.mark.parametrize(
    ("settings", "norm"),
    [
        ({}, "norm"),
        ({"reg_tokens": 4}, "norm"),
        ({"global_pool": "avg"}, "fc_norm"),
        ({"global_pool": "avg", "fc_norm": False, "class_token": False}, "norm"),
    ],
)
def test_plain(settings: dict[str, Any], norm: str) -> None:
    """Each patch by itself, in evaluation mode, from timm's own parts."""
    torch.manual_seed(0)
    sizes = {"img_size": (32, 48), "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 0}
    encoder = timm.create_model("vit_tiny_patch16_224", drop_path_rate=0.5, **sizes, **settings).train()
    for name, parameter in encoder.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter)
    images = torch.randn(2, 3, 32, 48)
    found = patch_features(encoder, images)
    assert encoder.training
    assert found.shape == (2, 2, 3, 24)
    encoder.eval()
    with torch.no_grad():
        tokens = encoder._pos_embed(encoder.patch_embed(images))
        for block in encoder.blocks:
            tokens = block(tokens)
        tokens = getattr(encoder, norm)(tokens)
    first = encoder.num_prefix_tokens
    for row in range(2):
        for column in range(3):
            torch.testing.assert_close(found[:, row, column], tokens[:, first + 3 * row + column])


@pytest.mark.parametrize("groups", [((0, 1, 2),), ((0, 2), (1,)), ((0,), (1,), (2, 3))])
def test_group_channel_is_the_mean_over_the_groups(groups: tuple[tuple[int, ...], ...]) -> None:
    torch.manual_seed(0)
    encoder = GroupChannelVisionTransformer(
        groups, 16, img_size=12, patch_size=4, embed_dim=48, depth=1, num_heads=2, num_classes=0
    )
    images = torch.randn(2, sum(map(len, groups)), 12, 12)
    found = patch_features(encoder, images)
    with torch.no_grad():
        tokens = encoder.eval().forward_features(images)
    for row in range(3):
        for column in range(3):
            wanted = sum(tokens[:, 1 + 9 * group + 3 * row + column] for group in range(len(groups))) / len(groups)
            torch.testing.assert_close(found[:, row, column], wanted)


def test_features_may_be_used_further() -> None:
    """They are no tensors of inference mode."""
    encoder = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=24, depth=1, num_heads=2, num_classes=0)
    found = patch_features(encoder, torch.randn(1, 3, 32, 32))
    assert not found.is_inference()
    assert not found.requires_grad


@pytest.mark.parametrize("shape", [(1, 2, 2, 3), (1, 2, 2, 50), (3, 5, 4, 8), (2, 14, 14, 192)])
def test_scores_are_those_of_sklearn(shape: tuple[int, ...]) -> None:
    x = features(*shape)
    scores = principal_scores(x)
    assert scores.dtype == torch.float32
    pca = PCA(3, svd_solver="full")
    wanted = pca.fit_transform(x.flatten(0, -2).double().numpy())
    found = scores.flatten(0, -2).double().numpy()
    signs = np.sign((found * wanted).sum(0))
    np.testing.assert_allclose(found, wanted * signs, atol=1e-5 * np.abs(wanted).max())
    largest = [component[np.abs(component).argmax()] for component in pca.components_ * signs[:, None]]
    assert min(largest) > 0, "the largest loading is positive"


def test_scores_are_the_same_again_and_do_not_depend_on_a_shift() -> None:
    x = features(2, 4, 4, 16)
    assert principal_scores(x).equal(principal_scores(x.clone()))
    torch.testing.assert_close(principal_scores(x + 7), principal_scores(x), atol=1e-4, rtol=1e-4)


def lines(rank: int) -> torch.Tensor:
    return features(2, 4, 4, rank) @ features(rank, 32, seed=1) + 5


@pytest.mark.parametrize(
    ("x", "components"),
    [
        (features(2, 4, 4, 1), 1),
        (features(2, 4, 4, 2), 2),
        (features(1, 1, 1, 8), 0),
        (features(2, 1, 1, 8), 1),
        (features(1, 3, 1, 8), 2),
        (lines(1), 1),
        (lines(2), 2),
        (torch.full((2, 4, 4, 8), 0.1), 0),
        (torch.zeros(2, 4, 4, 8), 0),
        (torch.full((2, 4, 4, 8), torch.nan), 0),
        (features(2, 4, 4, 8).index_fill(3, torch.tensor(2), torch.inf), 0),
    ],
)
def test_components_that_are_not_there_are_grey(x: torch.Tensor, components: int) -> None:
    scores = principal_scores(x)
    assert scores.shape == (*x.shape[:3], 3)
    assert (scores[..., components:] == 0).all()
    assert all(scores[..., index].std() > 0.01 for index in range(components))
    colours = score_colours(scores)
    assert (colours[..., components:] == 0.5).all()
    assert ((colours >= 0) & (colours <= 1)).all()


def test_colours_are_stretched_between_percentiles() -> None:
    """Of each component by itself: one outlier does not wash out the rest."""
    scores = torch.arange(101.0).view(1, 101, 1, 1) * torch.tensor([1.0, -2.0, 0.0]) + torch.tensor([0.0, 3.0, 4.0])
    scores[0, 100, 0, 0] = 1e6
    colours = score_colours(scores)
    place = (torch.arange(101.0) - 2) / 96
    torch.testing.assert_close(colours[0, :, 0, 0], place.clamp(0, 1))
    torch.testing.assert_close(colours[0, :, 0, 1], 1 - place.clamp(0, 1))
    assert (colours[..., 2] == 0.5).all()


@pytest.mark.parametrize("order", list(permutations(range(3))))
@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, 1, -1), (-1, -1, -1)])
def test_alignment_undoes_order_and_signs(order: tuple[int, ...], signs: tuple[int, ...]) -> None:
    before = principal_scores(features(2, 5, 5, 12))
    noise = 0.05 * torch.randn(before.shape, generator=torch.Generator().manual_seed(2))
    wanted = before * torch.tensor([1.0, 4.0, 0.3]) + noise
    shuffled = (wanted * torch.tensor(signs))[..., list(order)]
    assert align(shuffled, before).equal(wanted)


@pytest.mark.parametrize("seed", range(5))
def test_alignment_of_unlike_features(seed: int) -> None:
    """No other order has a larger sum of absolute correlations, and all of its correlations are positive."""
    before, after = (principal_scores(features(2, 5, 5, 12, seed=seed + offset)) for offset in (0, 100))
    aligned = align(after, before)
    correlations = [
        [abs(np.corrcoef(after[..., j].flatten(), before[..., i].flatten())[0, 1]) for j in range(3)] for i in range(3)
    ]
    best = max(sum(correlations[i][j] for i, j in enumerate(order)) for order in permutations(range(3)))
    found = [np.corrcoef(aligned[..., i].flatten(), before[..., i].flatten())[0, 1] for i in range(3)]
    assert min(found) >= 0
    assert sum(found) == pytest.approx(best, abs=1e-5)


def test_alignment_with_constant_components() -> None:
    scores = principal_scores(features(1, 4, 4, 8))
    collapsed = scores * torch.tensor([1.0, 0.0, 0.0])
    assert align(scores, collapsed)[..., 0].equal(scores[..., 0])
    assert align(torch.zeros_like(scores), scores).equal(torch.zeros_like(scores))
    with pytest.raises(ValueError, match="shapes differ"):
        align(scores, scores[:, :2])


def test_scores_before_are_kept(tmp_path: Path) -> None:
    scores = principal_scores(features(4, 14, 14, 32))
    file = tmp_path / "plots" / "before.npz"
    assert read_before(file) is None
    store_before(file, scores)
    found = read_before(file)
    assert found is not None
    assert found.equal(scores)
    assert found.dtype == torch.float32
    assert list(file.parent.iterdir()) == [file]
    assert file.stat().st_size < 12_000


@pytest.mark.parametrize("content", [b"", b"no archive", "cut off", "other", "pickled"])
def test_a_damaged_file_is_refused(tmp_path: Path, content: bytes | str) -> None:
    file = tmp_path / "before.npz"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content == "cut off":
        store_before(file, torch.rand(2, 4, 4, 3))
        file.write_bytes(file.read_bytes()[:200])
    elif content == "other":
        np.savez(file, something=np.zeros(3))
    else:
        np.savez(file, scores=np.array([{}], dtype=object))
    with pytest.raises(RunError, match=r"before\.npz.*\n?.*Remove it"):
        read_before(file)
