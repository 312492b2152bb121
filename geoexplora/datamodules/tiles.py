"""What the datamodules share: views, loaders, a training order that can be taken up again, unreadable tiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.data import DataLoader
from torchgeo.datamodules import NonGeoDataModule
from torchgeo.datasets import NonGeoDataset

from geoexplora.bands import Sensor, Statistics
from geoexplora.datamodules.sampling import EpochBatchSampler, StepBatchSampler
from geoexplora.datamodules.targets import target_title
from geoexplora.datamodules.views import EvaluationView, TrainView
from geoexplora.datasets.plot import plot_tile
from geoexplora.datasets.statistics import band_statistics
from geoexplora.datasets.tiles import TargetKind, TileSource
from geoexplora.errors import ConfigError
from geoexplora.transforms.crop import EvaluationCrop, TrainCrop, WholeTile
from geoexplora.transforms.normalization import Normalization

Batch = dict[str, Tensor]

_HELD = ("index", "size", "unreadable")
"""What of a batch stays on the CPU."""


def _unchanged(batch: Any) -> Any:
    return batch


class TilesDataModule(NonGeoDataModule):
    """Base of the datamodules: raw tiles in, batches of normalized crops of one size out.

    Crop, normalization and resizing happen in the loader's workers (by measurement: benchmarks/data_loading.py), so
    TorchGeo's augmentation on the device is the identity and nothing is normalized twice.

    A batch holds ``image`` (B, C, S, S), float32, normalized; ``index`` (B,), int64, of the tiles asked for;
    ``unreadable`` (B,), int64, -1 or the index of a tile that another one stands in for; and by the kind of target
    ``label``, (B,) int64 (class), (B, K) int64 (multilabel) or (B,) float32 (value), or ``mask`` (B, S, S), int64.
    Tiles with masks are evaluated whole, without a central crop. Training on whole tiles (``whole_tiles``) adds
    ``size`` (B, 2), int64, the tiles' heights and widths: there the crops are left to
    ``geoexplora.transforms.MultiCrop`` on the device.

    With several processes construct the Trainer with ``use_distributed_sampler=False``: each process takes its part
    of a batch by itself.

    Attributes:
        sensor: the sensor that the bands belong to.
        bands: names of the image's channels.
        classes: names of the classes; empty before ``setup`` and without labels.
        normalization: from raw units to network input.
        antialias: whether resizing is antialiased.
        num_batches: where the training order ends, counted from its very start; None: the trainer counts epochs.
        first_batch: where the training order starts, given ``num_batches``; set it to take a run up again.
        whole_tiles: train on whole tiles, stretched to squares of this many pixels; None: on random crops. Set it
            before ``setup``.
        ignore_index: the value of a mask that is no class; None: all values are classes. Set it before ``setup``.
        num_classes: number of classes of the targets; None: as many as the source tells. Set it before ``setup``.
        unlabelled: leave targets, unseen, out of the training batches, and all but classes out of evaluation:
            pre-training needs none but for its kNN probe. Set it before ``setup``.

    Args:
        dataset_class: the dataset's class.
        sensor: the sensor that the bands belong to.
        bands: the bands to read, in this order.
        statistics: of the bands, for the normalization.
        image_size: side S of the network's input in pixels.
        batch_size: size B of a batch on one device.
        num_workers: loader processes; 0 reads in the main one. The training order does not depend on it.
        normalization: one of ``geoexplora.transforms.METHODS``, or a whole normalization, as stored with weights.
        antialias: antialiased resizing.
        crop_scale: smallest and largest share of a tile's area that a training crop covers.
        seed: of order and augmentation.
        max_unreadable: the largest bearable share of unreadable tiles.
        **kwargs: passed to the dataset.

    Raises:
        ConfigError: if a band or the normalization is unknown, or a number is out of range.
    """

    def __init__(
        self,
        dataset_class: type[NonGeoDataset],
        sensor: Sensor,
        bands: Sequence[str],
        statistics: Statistics,
        *,
        image_size: int,
        batch_size: int,
        num_workers: int,
        normalization: str | Normalization,
        antialias: bool,
        crop_scale: tuple[float, float],
        seed: int,
        max_unreadable: float = 0.1,
        **kwargs: Any,
    ) -> None:
        self.sensor = sensor
        self.bands = sensor.select(bands)
        if isinstance(normalization, str):
            normalization = Normalization.from_statistics(normalization, statistics.select(self.bands))
        if normalization.bands != self.bands:
            raise ConfigError(
                f"the normalization is for {','.join(normalization.bands)}, the images hold {','.join(self.bands)}",
                "Read the bands that the weights were trained on, in their order.",
            )
        if image_size < 1 or batch_size < 1 or num_workers < 0:
            raise ConfigError(
                f"image size {image_size}, batch size {batch_size}, {num_workers} workers cannot be",
                "Sizes are at least 1, the number of workers at least 0.",
            )
        low, high = crop_scale
        if not 0 < low <= high <= 1:
            raise ConfigError(
                f"the crop scale {low}, {high} is not a range of shares", "Give two numbers with 0 < low <= high <= 1."
            )
        if not 0 <= max_unreadable <= 1:
            raise ConfigError(f"max_unreadable {max_unreadable} is not a share", "Give a number from 0 to 1.")
        super().__init__(dataset_class, batch_size, num_workers, bands=self.bands, **kwargs)
        self.aug = _unchanged
        self.image_size = image_size
        self.normalization = normalization
        self.antialias = antialias
        self.crop_scale = (low, high)
        self.seed = seed
        self.max_unreadable = max_unreadable
        self.classes: tuple[str, ...] = ()
        self.first_batch = 0
        self.num_batches: int | None = None
        self.whole_tiles: int | None = None
        self.ignore_index: int | None = None
        self.num_classes: int | None = None
        self.unlabelled = False
        self._sources: dict[str, TileSource] = {}

    @property
    def target(self) -> TargetKind:
        """The kind of the training tiles' targets.

        Raises:
            DataError: if there are no training tiles, or they are not what they should be.
        """
        return self.source("train").target

    def has_split(self, split: str) -> bool:
        """Whether the data has a split of that name."""
        raise NotImplementedError

    def open_split(self, split: str) -> TileSource:
        """Open the dataset of one split.

        Raises:
            DataError: if it is missing or not what it should be.
        """
        raise NotImplementedError

    def source(self, split: str) -> TileSource:
        """The dataset of raw tiles of one split, opened once."""
        split = "test_gt" if split == "test" else split
        if split not in self._sources:
            source = self.open_split(split)
            self._sources[split] = source
            self.classes = source.classes or self.classes
        return self._sources[split]

    @property
    def training_source(self) -> TileSource:
        """The tiles that training reads: those of ``train``, and without labels also others that a dataset has."""
        return self.source("train")

    def normalize_by_dataset(self) -> None:
        """Normalize by the statistics of the training tiles at hand, instead of published ones.

        Raises:
            DataError: if there are none, or a band holds one value only.
        """
        found = band_statistics(self.source("train"), self.bands)
        self.normalization = Normalization.from_statistics(self.normalization.method, found)

    def setup(self, stage: str) -> None:
        """Open what a stage needs: ``fit``, ``validate`` or ``test``.

        ``fit`` opens ``train`` only: ``val`` is opened by ``val_dataloader``, which a training without validation
        never calls.

        Raises:
            ConfigError: if the size of whole tiles is not positive.
            DataError: if it is missing or not what it should be.
        """
        if stage == "fit":
            crop: TrainCrop | WholeTile
            if self.whole_tiles is None:
                crop = TrainCrop(self.normalization, self.image_size, self.crop_scale, self.antialias)
            elif self.whole_tiles < 1:
                raise ConfigError(f"whole tiles of {self.whole_tiles} px cannot be", "Give a size of at least 1 pixel.")
            else:
                crop = WholeTile(self.normalization, self.whole_tiles, self.antialias)
            self.train_dataset = TrainView(
                self.training_source, crop, self.seed, self.ignore_index, self.unlabelled, self.num_classes
            )
        if stage == "validate":
            self.val_dataset = self.eval_dataset("val")
        if stage == "test":
            self.test_dataset = self.eval_dataset("test")

    def eval_dataset(self, split: str) -> EvaluationView:
        """One split without augmentation, with ``labels`` and ``location_ids`` where it has them."""
        crop = EvaluationCrop(self.normalization, self.image_size, self.antialias)
        source = self.source(split)
        unlabelled = self.unlabelled and source.target != "class"
        return EvaluationView(source, crop, self.ignore_index, unlabelled, self.num_classes)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Batches from ``first_batch`` to ``num_batches``, the length counted from 0; without these an epoch."""
        view = self._valid_attribute("train_dataset")
        trainer = self.trainer
        rank, world_size = (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)
        sampler: StepBatchSampler
        if self.num_batches is None:
            epoch = 0 if trainer is None else trainer.current_epoch
            sampler = EpochBatchSampler(len(view), self.batch_size, self.seed, rank, world_size, epoch)
        else:
            sampler = StepBatchSampler(
                len(view), self.batch_size, self.num_batches, self.seed, self.first_batch, rank, world_size
            )
        return DataLoader(view, batch_sampler=sampler, **self._loading())

    def eval_dataloader(self, split: str) -> DataLoader[Batch]:
        """One split without augmentation, in order."""
        return DataLoader(self.eval_dataset(split), batch_size=self.batch_size, **self._loading())

    def _dataloader_factory(self, split: str) -> DataLoader[Batch]:
        if split == "val" and self.val_dataset is None:
            self.val_dataset = self.eval_dataset("val")
        view = self._valid_attribute(f"{split}_dataset")
        return DataLoader(view, batch_size=self.batch_size, **self._loading())

    def _loading(self) -> dict[str, Any]:
        return {
            "num_workers": self.num_workers,
            "collate_fn": self.collate_fn,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": torch.cuda.is_available(),
        }

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Move images and labels; numbers and sizes of samples are read on the CPU, without waiting for the device."""
        held = {name: batch[name] for name in _HELD if name in batch}
        rest = {name: value for name, value in batch.items() if name not in held}
        moved: Batch = super().transfer_batch_to_device(rest, device, dataloader_idx)
        return moved | held

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Take note of unreadable tiles, here in the main process."""
        trainer = self.trainer
        evaluated = None if trainer is None or trainer.training else "test" if trainer.testing else "val"
        self.check_unreadable(batch, evaluated or "train")
        return batch

    def check_unreadable(self, batch: Batch, split: str = "train") -> None:
        """Name and count the unreadable tiles of a batch; call it in the main process.

        Args:
            batch: from a loader of that split.
            split: where the batch comes from.

        Raises:
            DataError: if more distinct tiles than bearable were unreadable.
        """
        unreadable = batch.get("unreadable")
        if unreadable is None:
            return
        for index in unreadable[unreadable >= 0].tolist():
            self.source(split).note_unreadable(index)

    def plot(self, sample: Batch, *args: Any, **kwargs: Any) -> Figure:
        """Plot a normalized sample of any split, back in the sensor's units."""
        image = self.normalization.inverse(sample["image"])
        return plot_tile(image, self.bands, self.sensor, target_title(sample.get("label"), self.classes))
