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

from geoexplora.bands import SENSORS, SENTINEL2, Sensor
from geoexplora.datamodules.tiles import TilesDataModule
from geoexplora.datasets.torchgeo_opening import FACTS
from geoexplora.datasets.torchgeo_source import name_channels
from geoexplora.errors import ConfigError
from geoexplora.transforms.normalization import Normalization

_LEVEL_2A = tuple(band for band in SENTINEL2.band_names if band != "B10")
_BIGEARTHNET = {"all": ("VV", "VH", *_LEVEL_2A), "s1": ("VV", "VH"), "s2": _LEVEL_2A}


@dataclass(frozen=True)
class DataInput:
    """What the images of a datamodule are.

    Attributes:
        sensor: the sensor that the bands belong to.
        bands: names of the bands.
        normalization: of these bands, in the sensor's units.
    """

    sensor: Sensor
    bands: tuple[str, ...]
    normalization: Normalization


@dataclass(frozen=True)
class Channels:
    """The channels of a TorchGeo datamodule's images.

    Attributes:
        source: name of the dataset's class.
        sensor: the sensor.
        names: name of each channel; None for what is not of this sensor.
        scale: from pixel values to the sensor's units.
    """

    source: str
    sensor: Sensor
    names: tuple[str | None, ...]
    scale: float

    @classmethod
    def of(cls, datamodule: BaseDataModule, sensor: Sensor | None = None) -> Channels:
        """Those of a datamodule that is set up.

        Args:
            datamodule: the datamodule.
            sensor: whose bands are wanted; None: the only sensor that has all the bands that the dataset names.

        Raises:
            ConfigError: if the channels cannot be named, or the images are no image chips of one time.
        """
        split = next((name for name in _SPLITS if getattr(datamodule, f"{name}dataset") is not None), None)
        if split is None:
            raise ConfigError(
                f"TorchGeo's {type(datamodule).__name__} has no dataset after setup", "Check its arguments."
            )
        wrapped = getattr(datamodule, f"{split}dataset")
        dataset, name = _unwrapped(wrapped), type(_unwrapped(wrapped)).__name__
        sampler = getattr(datamodule, f"{split}sampler", None)
        image = checked_image(name, wrapped[0 if sampler is None else next(iter(sampler))], 3)
        facts = FACTS.get(name)
        sensor = sensor or (facts.sensor if facts else _sensor_of(dataset))
        if name.startswith("BigEarthNet"):  # TorchGeo names none, and mixes two sensors
            names: tuple[str | None, ...] = _BIGEARTHNET[dataset.bands]
            sensor = sensor or SENTINEL2
            return cls(name, sensor, tuple(band if band in sensor.band_names else None for band in names), 1.0)
        sensor, names = name_channels(dataset, len(image), sensor)
        return cls(name, sensor, names, facts.scale if facts else 1.0)

    @property
    def bands(self) -> tuple[str, ...]:
        """The sensor's bands that are there, in the sensor's order."""
        return tuple(band for band in self.sensor.band_names if band in self.names)

    def indices(self, bands: Sequence[str]) -> list[int]:
        """Positions of the named bands.

        Raises:
            ConfigError: if one is not there; names it.
        """
        missing = [band for band in bands if band not in self.names]
        if missing:
            raise ConfigError(
                f"TorchGeo's {self.source} has no band {', '.join(missing)}",
                f"It has: {', '.join(self.bands) or f'none of {self.sensor.name}'}. Name some of these as the task's "
                "bands, or have the datamodule load more.",
            )
        return [self.names.index(band) for band in bands]


_SPLITS = ("train_", "val_", "test_", "predict_", "")


def data_input(datamodule: LightningDataModule, groups: Sequence[Sequence[str]] | None = None) -> DataInput:
    """What the images of a datamodule are by its own account: for tasks that are not told.

    Args:
        datamodule: one of this package or of TorchGeo, set up.
        groups: channel groups by band names, whose bands are the wanted ones; None: all bands.

    Returns:
        Bands in the sensor's order. With TorchGeo the normalization is ``standardize`` with its ``mean`` and ``std``.

    Raises:
        ConfigError: if a band of the groups is not there, the channels cannot be named, or the datamodule is neither.
    """
    if isinstance(datamodule, TilesDataModule):
        return DataInput(datamodule.sensor, datamodule.bands, datamodule.normalization)
    if not isinstance(datamodule, BaseDataModule):
        raise ConfigError(
            f"{type(datamodule).__name__} does not tell its bands",
            "Set the task's sensor, bands and normalization, or use a datamodule of geoexplora or TorchGeo.",
        )
    channels = Channels.of(datamodule)
    wanted = set(channels.sensor.select(band for group in groups for band in group)) if groups else set(channels.bands)
    bands = tuple(band for band in channels.sensor.band_names if band in wanted)
    at = channels.indices(bands)
    mean, std = (
        _per_channel(datamodule, name, channels.sensor, len(channels.names))[at].double() * channels.scale
        for name in ("mean", "std")
    )
    normalization = Normalization("standardize", bands, tuple(mean.tolist()), tuple(std.tolist()))
    return DataInput(channels.sensor, bands, normalization)


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


def _per_channel(datamodule: BaseDataModule, name: str, sensor: Sensor, count: int) -> Tensor:
    """(count,): TorchGeo's ``mean`` or ``std``, of each channel."""
    values = torch.as_tensor(getattr(datamodule, name)).flatten()
    if sensor == SENTINEL2 and datamodule.std is BaseDataModule.std:  # 255: it never said otherwise
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
