"""A training order that can be taken up again anywhere, whatever the number of loader workers."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from geoexplora.errors import ConfigError

_MASK = 2**64 - 1

Key = tuple[int, int]
"""Epoch and index: together with the seed they decide a sample's augmentation."""


class StepBatchSampler(Sampler[list[Key]]):
    """Batches of (epoch, index) along an endless row of shuffled epochs.

    A batch may span two epochs, so that every batch is full. Batch ``b`` depends on nothing but the arguments: a run
    taken up at batch ``b`` sees what an uninterrupted one would have.

    Args:
        num_samples: size of the dataset.
        batch_size: size of a batch on one device.
        num_batches: the number of the batch to stop before.
        seed: of the shuffles.
        first_batch: the number of the batch to start with.
        rank: of this process.
        world_size: number of processes; they share each step's ``batch_size * world_size`` samples.

    Raises:
        ConfigError: if a number is out of range.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        num_batches: int,
        seed: int,
        first_batch: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if num_samples < 1 or batch_size < 1 or num_batches < 0 or first_batch < 0:
            raise ConfigError(
                f"{num_samples} samples in batches of {batch_size}, {num_batches} batches from {first_batch} on, "
                "are no training order",
                "Samples and batch size are at least 1, numbers of batches at least 0.",
            )
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank {rank} does not exist among {world_size} processes", "Ranks count from 0.")
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.num_batches = num_batches
        self.seed = seed
        self.first_batch = first_batch
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        """Number of batches in all, skipped ones included: Lightning compares it with its restored counter."""
        return self.num_batches

    def __iter__(self) -> Iterator[list[Key]]:
        """Yield this process's part of each batch from ``first_batch`` on."""
        return self._batches(range(self.first_batch, self.num_batches))

    def _batches(self, numbers: range) -> Iterator[list[Key]]:
        epoch, order = -1, torch.empty(0, dtype=torch.int64)
        for batch in numbers:
            start = (batch * self.world_size + self.rank) * self.batch_size
            keys: list[Key] = []
            while len(keys) < self.batch_size:
                at, offset = divmod(start + len(keys), self.num_samples)
                if at != epoch:
                    epoch, order = at, self._order(at)
                part = order[offset : offset + self.batch_size - len(keys)]
                keys.extend((epoch, index) for index in part.tolist())
            yield keys

    def _order(self, epoch: int) -> torch.Tensor:
        return torch.randperm(self.num_samples, generator=generator(self.seed, epoch))


class EpochBatchSampler(StepBatchSampler):
    """The same endless row of batches, in portions of an epoch, for trainers that count epochs.

    The last batch of a portion is filled with the first samples of the next epoch.

    Args:
        num_samples: size of the dataset.
        batch_size: size of a batch on one device.
        seed: of the shuffles.
        rank: of this process.
        world_size: number of processes.
        epoch: the portion to start with; Lightning makes a resumed run's first iterator before it sets the epoch.

    Raises:
        ConfigError: if a number is out of range.
    """

    def __init__(
        self, num_samples: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1, epoch: int = 0
    ) -> None:
        super().__init__(
            num_samples, batch_size, math.ceil(num_samples / max(1, batch_size * world_size)), seed, 0, rank, world_size
        )
        self.epoch = epoch

    @property
    def sampler(self) -> EpochBatchSampler:
        """Where Lightning looks for ``set_epoch``."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the portion."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[Key]]:
        """Yield this process's part of the epoch's batches."""
        first = self.epoch * self.num_batches
        return self._batches(range(first, first + self.num_batches))


def generator(*numbers: int) -> torch.Generator:
    """A generator seeded by all of the numbers: the same ones give the same draws, in any process."""
    state = 0
    for number in numbers:
        # One round of splitmix64 (Steele et al. 2014) for each number: PyTorch's seeding hardly mixes.
        state = (state + number + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return torch.Generator().manual_seed(state)
