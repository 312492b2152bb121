"""Warnings of collapse, and the guard against losses that are not finite."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from geoexplora.tasks.health import FALL, SAME, SETTLED, UNIFORM, FinitenessGuard, HealthWatch, sample_names

K = 100
GOOD = {
    "feature_std": 1.0,
    "feature_rank": 20.0,
    "teacher_entropy": 1.0,
    "teacher_mean_entropy": 3.0,
}


def judged(watch: HealthWatch, *rows: dict[str, Any]) -> list[list[str]]:
    return [watch({"step": step} | row) for step, row in enumerate(rows, 1)]


def test_a_good_training_gives_no_warning() -> None:
    assert judged(HealthWatch(K), *[GOOD] * 30) == [[]] * 30


@pytest.mark.parametrize(
    ("name", "what"), [("feature_std", "spread of the features"), ("feature_rank", "effective rank of the features")]
)
def test_collapsing_features_are_told_once(name: str, what: str, caplog: pytest.LogCaptureFixture) -> None:
    edge = {name: FALL * GOOD[name]}
    below = {name: 0.99 * FALL * GOOD[name]}
    with caplog.at_level(logging.WARNING):
        said = judged(HealthWatch(K), GOOD, GOOD | edge, GOOD | below, GOOD, GOOD | below)
    assert [len(texts) for texts in said] == [0, 0, 1, 0, 0]
    (text,) = said[2]
    assert what in text
    assert f"from {GOOD[name]:.3g} at the start" in text
    assert "--lr" in text
    assert caplog.messages == [f"step 3: {text}"]


def test_each_kind_is_told() -> None:
    bad = {"feature_std": 0.0, "feature_rank": 0.0, "teacher_entropy": 1.0, "teacher_mean_entropy": 1.0}
    said = judged(HealthWatch(K), *[GOOD] * SETTLED, bad, bad)
    assert [len(texts) for texts in said] == [0] * SETTLED + [3, 0]


@pytest.mark.parametrize(
    ("row", "word"),
    [
        ({"teacher_entropy": UNIFORM * math.log(K) + 1e-6, "teacher_mean_entropy": math.log(K)}, "almost uniform"),
        ({"teacher_entropy": 2.0, "teacher_mean_entropy": 2.0 + 0.9 * SAME}, "the same of every image"),
    ],
)
def test_a_teacher_that_says_nothing(row: dict[str, float], word: str) -> None:
    said = judged(HealthWatch(K), *[GOOD | row] * (SETTLED + 3))
    assert [len(texts) for texts in said] == [0] * SETTLED + [1, 0, 0]
    assert word in said[SETTLED][0]
    assert "--" in said[SETTLED][0]


@pytest.mark.parametrize(
    "row",
    [
        {"teacher_entropy": UNIFORM * math.log(K) - 1e-6, "teacher_mean_entropy": math.log(K)},
        {"teacher_entropy": 2.0, "teacher_mean_entropy": 2.0 + 1.1 * SAME * math.log(K)},
        {"teacher_entropy": 0.0, "teacher_mean_entropy": 3.0},
    ],
)
def test_a_teacher_within_the_thresholds(row: dict[str, float]) -> None:
    assert not any(judged(HealthWatch(K), *[GOOD | row] * (SETTLED + 3)))


def test_a_uniform_and_a_constant_teacher_are_two_kinds() -> None:
    uniform = GOOD | {"teacher_entropy": math.log(K), "teacher_mean_entropy": math.log(K)}
    same = GOOD | {"teacher_entropy": 1.0, "teacher_mean_entropy": 1.0}
    said = judged(HealthWatch(K), *[GOOD] * SETTLED, uniform, same, uniform, same)
    assert [len(texts) for texts in said[SETTLED:]] == [2, 0, 0, 0], "a uniform teacher also says the same of all"
    said = judged(HealthWatch(K), *[GOOD] * SETTLED, same, uniform, same)
    assert [len(texts) for texts in said[SETTLED:]] == [1, 1, 0]


def test_without_a_teacher_its_numbers_are_not_judged() -> None:
    same = GOOD | {"teacher_entropy": 1.0, "teacher_mean_entropy": 1.0}
    assert not any(judged(HealthWatch(None), *[same] * (SETTLED + 3)))
    assert not any(judged(HealthWatch(K), *[{"feature_std": 1.0, "feature_rank": 2.0}] * (SETTLED + 3)))


def test_a_resumed_run_compares_with_its_own_start() -> None:
    low = GOOD | {"feature_std": 0.2}
    assert judged(HealthWatch(K), low, low) == [[], []]
    (texts,) = judged(HealthWatch(K, {"step": 1} | GOOD), low)
    assert len(texts) == 1
    assert "from 1 at the start" in texts[0]


@pytest.mark.parametrize("first", [{}, {"feature_std": math.nan}, {"feature_std": 0.0}])
def test_a_start_that_says_nothing(first: dict[str, float]) -> None:
    assert not any(judged(HealthWatch(None, {"step": 1} | first), {"feature_std": 0.5}, {}, {"feature_std": math.nan}))


# The guard.


def images(count: int = 4, bad: tuple[int, ...] = (), value: float = math.nan) -> torch.Tensor:
    batch = torch.ones(count, 2, 3, 3)
    for number in bad:
        batch[number, 1, 2, 0] = value
    return batch


def name(index: int) -> str:
    return f"tile {index}"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_names_the_samples_with_bad_pixels(value: float) -> None:
    guard = FinitenessGuard()
    guard.note(torch.tensor(1.0), {"image": images(), "index": torch.arange(4)})
    guard.note(torch.tensor(math.nan), {"image": images(4, (1, 3), value), "index": torch.tensor([7, 8, 9, 10])})
    assert guard.verdict(name) == "the loss is nan: pixels are NaN or infinite in tile 8, tile 10"
    assert guard.verdict(name) is None  # told once


def test_lists_eight_samples_at_most() -> None:
    guard = FinitenessGuard()
    guard.note(torch.tensor(math.inf), {"image": images(12, tuple(range(11))), "index": torch.arange(12)})
    listed = ", ".join(f"tile {number}" for number in range(8))
    assert guard.verdict(name) == f"the loss is inf: pixels are NaN or infinite in {listed} and 3 more"
    guard.note(torch.tensor(math.nan), {"image": images(8, tuple(range(8))), "index": torch.arange(8)})
    assert guard.verdict(name) == f"the loss is nan: pixels are NaN or infinite in {listed}"


def test_a_loss_that_is_not_finite_though_the_pixels_are() -> None:
    guard = FinitenessGuard()
    guard.note(torch.tensor(math.nan), {"image": images(2), "index": torch.tensor([3, 5])})
    expected = "the loss is nan, though the pixels of its images are finite; the batch held tile 3, tile 5"
    assert guard.verdict(name) == expected


@pytest.mark.parametrize("bad", [(), (1,)])
def test_batches_without_indices(bad: tuple[int, ...]) -> None:
    guard = FinitenessGuard()
    guard.note(torch.tensor(math.nan), {"image": images(2, bad)})
    assert guard.verdict(name) == "the loss is nan"


def test_a_finite_loss_is_well_whatever_the_pixels() -> None:
    guard = FinitenessGuard()
    assert guard.verdict(name) is None
    guard.note(torch.tensor(2.0), {"image": images(2, (0,)), "index": torch.arange(2)})
    assert guard.verdict(name) is None


def test_the_first_bad_batch_is_named_and_all_are_forgotten() -> None:
    guard = FinitenessGuard()
    for first in (0, 10):
        guard.note(torch.tensor(math.nan), {"image": images(2, (0,)), "index": torch.tensor([first, first + 1])})
    assert guard.verdict(name) == "the loss is nan: pixels are NaN or infinite in tile 0"
    assert guard.verdict(name) is None


def test_names_of_samples() -> None:
    with_files = SimpleNamespace(path=lambda index: Path("tiles") / f"{index}.tif")
    without = SimpleNamespace(path=lambda index: None)
    assert sample_names(with_files)(3) == str(Path("tiles") / "3.tif")
    assert sample_names(without)(3) == sample_names(object())(3) == "image 3"
