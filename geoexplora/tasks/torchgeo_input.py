"""What the images of a datamodule are: sensor, bands by name, statistics, units.

Shapes: C bands, h and w an image's height and width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset
from torchgeo.datamodules import BaseDataModule
from torchgeo.datasets import IntersectionDataset

from geoexplora.bands import SENSORS, SENTINEL1, SENTINEL2, Sensor
from geoexplora.datamodules.tiles import TilesDataModule
from geoexplora.datasets.torchgeo_channels import Channels
from geoexplora.errors import ConfigError
from geoexplora.torchgeo_facts import FACTS
from geoexplora.transforms.normalization import Normalization


@dataclass(frozen=True)
class DataInput:
    """What a task takes.

    Attributes:
        sensor: the sensor that the bands belong to.
        bands: names of the bands.
        normalization: of these bands, in the sensor's units.
    """

    sensor: Sensor
    bands: tuple[str, ...]
    normalization: Normalization


@dataclass(frozen=True)
class DataImages:
    """What the images of a datamodule are by its own account.

    Attributes:
        datamodule: one of this package or of TorchGeo, set up.
        sensor: the sensor that the bands belong to.
        bands: names of the wanted bands, in the sensor's order.
        channels: of the images; None with a datamodule of this package.
    """

    datamodule: LightningDataModule
    sensor: Sensor
    bands: tuple[str, ...]
    channels: Channels | None = None

    @classmethod
    def of(cls, datamodule: LightningDataModule, groups: Sequence[Sequence[str]] | None = None) -> DataImages:
        """Those of a datamodule.

        Args:
            datamodule: the datamodule.
            groups: channel groups by band names, whose bands are the wanted ones; None: all bands.

        Raises:
            ConfigError: if a band of the groups is not there, the channels cannot be named, or the datamodule is none
                of these.
        """
        if isinstance(datamodule, TilesDataModule):
            return cls(datamodule, datamodule.sensor, datamodule.bands)
        if not isinstance(datamodule, BaseDataModule):
            raise ConfigError(
                f"{type(datamodule).__name__} does not tell its bands",
                "Set the task's sensor, bands and normalization, or use a datamodule of geoexplora or TorchGeo.",
            )
        channels = channels_of(datamodule)
        wanted = set(channels.sensor.select(band for group in groups for band in group) if groups else channels.bands)
        bands = tuple(band for band in channels.sensor.band_names if band in wanted)
        positions(channels, bands)
        return cls(datamodule, channels.sensor, bands, channels)

    def normalization(self) -> Normalization:
        """Of the bands; with TorchGeo ``standardize`` with its ``mean`` and ``std``, in the sensor's units.

        Raises:
            ConfigError: if the datamodule has no statistics of these bands.
        """
        if isinstance(self.datamodule, TilesDataModule):
            return self.datamodule.normalization
        assert self.channels is not None
        assert isinstance(self.datamodule, BaseDataModule)
        at = self.channels.indices(self.bands)
        scale, offset = (torch.tensor(one)[at].double() for one in (self.channels.scale, self.channels.offset))
        mean, std = (_per_channel(self.datamodule, name, self.channels)[at].double() for name in ("mean", "std"))
        mean, std = mean * scale + offset, std * scale
        return Normalization("standardize", self.bands, tuple(mean.tolist()), tuple(std.tolist()))


def channels_of(datamodule: BaseDataModule, sensor: Sensor | None = None) -> Channels:
    """The channels of a datamodule's images.

    Args:
        datamodule: the datamodule, set up.
        sensor: whose bands are wanted; None: the usual one of a known dataset, else the only one that has all the bands
            that the dataset names.

    Raises:
        ConfigError: if the channels cannot be named, or the images are no image chips of one time.
    """
    split = next((name for name in _SPLITS if getattr(datamodule, f"{name}dataset") is not None), None)
    if split is None:
        raise ConfigError(f"TorchGeo's {type(datamodule).__name__} has no dataset after setup", "Check its arguments.")
    wrapped = getattr(datamodule, f"{split}dataset")
    dataset, name = _unwrapped(wrapped), type(_unwrapped(wrapped)).__name__
    sampler = getattr(datamodule, f"{split}sampler", None)
    image = checked_image(name, wrapped[0 if sampler is None else next(iter(sampler))], 3)
    return Channels.of(dataset, len(image), sensor or (None if name in FACTS else _sensor_of(dataset)))


def positions(channels: Channels, bands: Sequence[str]) -> list[int]:
    """Positions of the named bands among the channels.

    Raises:
        ConfigError: if one is not there; names it.
    """
    missing = [band for band in bands if band not in channels.names]
    if missing:
        raise ConfigError(
            f"TorchGeo's {channels.source} has no band {', '.join(missing)}",
            f"It has: {', '.join(channels.bands) or f'none of {channels.sensor.name}'}. Name some of these as the "
            "task's bands, or have the datamodule load more.",
        )
    return channels.indices(bands)


_SPLITS = ("train_", "val_", "test_", "predict_", "")


def checked_image(source: str, sample: Mapping[str, Any], dimensions: int) -> Tensor:
    """The image of a sample or batch.

    Raises:
        ConfigError: if there is none of so many dimensions.
    """
    image = sample.get("image")
    if not isinstance(image, Tensor) or image.ndim != dimensions:
        found = f"an image of shape {tuple(image.shape)}" if isinstance(image, Tensor) else "no image"
        raise ConfigError(
            f"the samples of TorchGeo's {source} hold {found}",
            "Images of bands x height x width are needed: use another dataset, or its arguments for one time only.",
        )
    return image


def _unwrapped(dataset: Any) -> Any:
    """The dataset behind splits, intersections and concatenations."""
    while isinstance(dataset, Subset | IntersectionDataset | ConcatDataset):
        dataset = dataset.dataset if isinstance(dataset, Subset) else dataset.datasets[0]
    return dataset


def _sensor_of(dataset: Any) -> Sensor | None:
    """The only sensor that has all the bands that a dataset could load, which may be more than it does."""
    names = getattr(dataset, "all_band_names", getattr(dataset, "all_bands", ()))
    if not (isinstance(names, list | tuple) and names and all(isinstance(name, str) for name in names)):
        return None
    fitting = [sensor for sensor in SENSORS.values() if _has(sensor, names)]
    return fitting[0] if len(fitting) == 1 else None


def _has(sensor: Sensor, names: Sequence[str]) -> bool:
    try:
        return bool(sensor.select(names))
    except ConfigError:
        return False


def _per_channel(datamodule: BaseDataModule, name: str, channels: Channels) -> Tensor:
    """(C,): TorchGeo's ``mean`` or ``std``, of each channel."""
    values, count = torch.as_tensor(getattr(datamodule, name)).flatten(), len(channels.names)
    unsaid = datamodule.std is BaseDataModule.std  # 255
    if unsaid and channels.sensor in {SENTINEL1, SENTINEL2}:
        raise ConfigError(
            f"{type(datamodule).__name__} has no statistics of its own for these bands: TorchGeo takes them for 8-bit",
            "Set the task's normalization, or the datamodule's arguments for one sensor (So2Sat: band_set s2).",
        )
    if len(values) not in {1, count}:
        raise ConfigError(
            f"{type(datamodule).__name__} has a {name} of {len(values)} bands for images of {count}",
            "Set the task's normalization.",
        )
    return values.expand(count)
