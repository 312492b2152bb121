"""The channels of a TorchGeo dataset's images: sensor, names, units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torchgeo.datasets import NonGeoDataset

from geoexplora.bands import RGB, SENSORS, Sensor
from geoexplora.errors import ConfigError, DataError
from geoexplora.torchgeo_facts import FACTS, Images


@dataclass(frozen=True)
class Channels:
    """The channels of a TorchGeo dataset's images.

    Attributes:
        source: name of the dataset's class.
        sensor: the sensor.
        names: name of each channel; None for what is not of this sensor.
        scale: of each channel: times this, plus ``offset``, pixel values are in the sensor's units.
        offset: of each channel, in the sensor's units.
    """

    source: str
    sensor: Sensor
    names: tuple[str | None, ...]
    scale: tuple[float, ...]
    offset: tuple[float, ...]

    @classmethod
    def of(cls, dataset: NonGeoDataset, count: int, sensor: Sensor | None = None) -> Channels:
        """Those of a dataset.

        Args:
            dataset: the dataset.
            count: number C of channels.
            sensor: the sensor; None: the one that is known of the dataset if it holds bands of this, else the only one
                that has all the bands that the dataset names.

        Raises:
            ConfigError: if bands have no names, or these fit no sensor or several.
            DataError: if there are more or fewer names than channels.
        """
        source = type(dataset).__name__
        facts = FACTS.get(source)
        images = facts.images_of(dataset) if facts else None
        usual = images.sensor if images else None
        own = _own_names(dataset, images)
        names: tuple[str | None, ...]
        if not own and count == len(RGB.bands) and (sensor or usual) in {None, RGB}:
            sensor, names = RGB, RGB.band_names
        elif not own:
            raise ConfigError(
                f"TorchGeo's {source} does not name the {count} bands of its images",
                "Name a dataset that does, or one of 3 channels, which are taken for red, green and blue.",
            )
        elif len(own) != count:
            raise DataError(
                f"TorchGeo's {source} names {len(own)} bands ({', '.join(own)}), but its images have {count}",
                "Check that --root holds this dataset, as TorchGeo expects it.",
            )
        else:
            sensor, names = _matched(source, own, sensor, usual)
        scale, offset = (images.scale, images.offset) if images else ((1.0,), (0.0,))
        scale, offset = (one * count if len(one) == 1 else one for one in (scale, offset))
        return cls(source, sensor, names, scale, offset)

    @property
    def bands(self) -> tuple[str, ...]:
        """The sensor's bands that are there, in the sensor's order."""
        return tuple(band for band in self.sensor.band_names if band in self.names)

    def indices(self, bands: Sequence[str]) -> list[int]:
        """Positions of bands that are there."""
        return [self.names.index(band) for band in bands]

    def rescaling(self, bands: Sequence[str]) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
        """What brings pixel values to the sensor's units: times the first, plus the second, each (C, 1, 1).

        Returns:
            None where they are in these units.
        """
        at = self.indices(bands)
        scale, offset = (np.array(values, np.float32)[at, None, None] for values in (self.scale, self.offset))
        return None if (scale == 1).all() and not offset.any() else (scale, offset)


def _matched(
    source: str, own: Sequence[str], sensor: Sensor | None, usual: Sensor | None
) -> tuple[Sensor, tuple[str | None, ...]]:
    named = {one: tuple(_canonical(one, band) for band in own) for one in ([sensor] if sensor else SENSORS.values())}
    if sensor is None and usual is not None and any(named[usual]):
        sensor = usual
    fitting = [sensor] if sensor else [one for one, bands in named.items() if None not in bands]
    if len(fitting) != 1:
        fit = f"fit {', '.join(one.name for one in fitting)}" if fitting else "are of no known sensor"
        raise ConfigError(
            f"the band names of TorchGeo's {source} ({', '.join(own)}) {fit}",
            f"Name a dataset of one known sensor: {', '.join(SENSORS)}.",
        )
    return fitting[0], named[fitting[0]]


def _canonical(sensor: Sensor, band: str) -> str | None:
    try:
        return sensor.band(band.removeprefix("S2_")).name  # So2Sat's names
    except ConfigError:
        return None


def _own_names(dataset: NonGeoDataset, images: Images | None) -> tuple[str, ...]:
    facts = FACTS.get(type(dataset).__name__)
    parts = [getattr(dataset, name, ()) for name in facts.bands_in] if facts else []
    joined = tuple(name for part in parts for name in part)
    candidates = [getattr(dataset, name, ()) for name in ("bands", "all_band_names", "all_bands")]
    for names in [images.bands if images else (), joined, *candidates]:
        if isinstance(names, list | tuple) and names and all(isinstance(name, str) for name in names):
            return tuple(names)
    return ()
