"""The training order."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geoexplora.datamodules.sampling import EpochBatchSampler, StepBatchSampler, generator
from geoexplora.errors import ConfigError


@settings(deadline=None, max_examples=60)
@given(
    samples=st.integers(1, 40),
    batch=st.integers(1, 50),
    batches=st.integers(0, 12),
    first=st.integers(0, 12),
    world=st.integers(1, 3),
)
def test_any_batch_can_be_taken_up_again(samples: int, batch: int, batches: int, first: int, world: int) -> None:
    for rank in range(world):
        whole = list(StepBatchSampler(samples, batch, batches, 5, 0, rank, world))
        resumed = StepBatchSampler(samples, batch, batches, 5, first, rank, world)
        assert list(resumed) == whole[first:]
        assert len(resumed) == batches
        assert all(len(keys) == batch for keys in whole)


def test_each_epoch_holds_each_sample_once() -> None:
    keys = [key for batch in StepBatchSampler(10, 4, 5, seed=1) for key in batch]
    assert Counter(keys) == Counter((epoch, index) for epoch in range(2) for index in range(10))
    assert [index for epoch, index in keys if epoch == 0] != [index for epoch, index in keys if epoch == 1]


def test_processes_share_the_same_order() -> None:
    one = [key for batch in StepBatchSampler(11, 6, 4, seed=2) for key in batch]
    parts = [StepBatchSampler(11, 3, 4, seed=2, rank=rank, world_size=2) for rank in range(2)]
    two = [key for batches in zip(*parts, strict=True) for batch in batches for key in batch]
    assert one == two


def test_seeds_differ() -> None:
    orders = {tuple(next(iter(StepBatchSampler(50, 50, 1, seed)))) for seed in range(5)}
    assert len(orders) == 5
    draws = {torch.rand(1, generator=generator(*key)).item() for key in [(0, 1), (1, 0), (0, 0), (0, 0, 0), (-1, 0)]}
    assert len(draws) == 5


def test_impossible_orders_are_refused() -> None:
    with pytest.raises(ConfigError, match="no training order"):
        StepBatchSampler(0, 4, 1, 0)
    with pytest.raises(ConfigError, match="rank 2"):
        StepBatchSampler(4, 4, 1, 0, rank=2, world_size=2)


def test_epochs_are_portions_of_the_same_row() -> None:
    for rank in range(2):
        whole = list(StepBatchSampler(11, 3, 6, 8, rank=rank, world_size=2))
        sampler = EpochBatchSampler(11, 3, 8, rank=rank, world_size=2)
        portions = []
        for epoch in range(3):
            sampler.sampler.set_epoch(epoch)
            assert len(sampler) == 2
            portions += list(sampler)
        assert portions == whole
