"""Sensors, band names, wavelengths, channel groups and statistics. Torch-free.

Bands are always matched by name: the order on disk, in a recipe and in a weights file may differ.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from geoexplora.errors import ConfigError


@dataclass(frozen=True)
class Band:
    """One spectral band.

    Attributes:
        name: canonical name within its sensor, such as ``B8A``.
        common_name: STAC's common name (``red``, ``nir``, ...).
        wavelength: central wavelength in nanometres.
        resolution: ground sampling distance in metres.
    """

    name: str
    common_name: str
    wavelength: float
    resolution: float


@dataclass(frozen=True)
class Sensor:
    """A sensor: its bands in their order on disk, and what the pixel values mean.

    Attributes:
        name: the sensor's name in recipes and weights files.
        bands: all bands, in the order of the product.
        units: the meaning of a pixel value.
    """

    name: str
    bands: tuple[Band, ...]
    units: str

    @property
    def band_names(self) -> tuple[str, ...]:
        """Canonical names of all bands, in the order of the product."""
        return tuple(band.name for band in self.bands)

    def band(self, name: str) -> Band:
        """Look a band up by its name, its zero-padded form (``B02``) or its common name.

        Raises:
            ConfigError: if the sensor has no such band, or a common name fits several.
        """
        wanted = name.strip().lower()
        for band in self.bands:
            if wanted in {band.name.lower(), _padded(band.name).lower()}:
                return band
        same = [band for band in self.bands if band.common_name == wanted]
        if len(same) == 1:
            return same[0]
        if same:
            names = ", ".join(band.name for band in same)
            raise ConfigError(f"band {name!r} is ambiguous for {self.name}", f"Name one of: {names}.")
        raise ConfigError(
            f"unknown band {name!r} for {self.name}",
            f"{nearest(name, self.band_names)}Its bands are: {', '.join(self.band_names)}.",
        )

    def select(self, names: Iterable[str]) -> tuple[str, ...]:
        """Canonical names of the given bands, in the given order.

        Raises:
            ConfigError: if a band is unknown or named twice, or no band is named.
        """
        selected = tuple(self.band(name).name for name in names)
        if not selected:
            raise ConfigError("no band is selected", f"Name some of: {', '.join(self.band_names)}.")
        twice = sorted({name for name in selected if selected.count(name) > 1})
        if twice:
            raise ConfigError(f"band {', '.join(twice)} is named twice", "Name each band once.")
        return selected

    def indices(self, names: Iterable[str]) -> tuple[int, ...]:
        """0-based positions of the given bands in the product."""
        return tuple(self.band_names.index(name) for name in self.select(names))


def _padded(name: str) -> str:
    digits = name[1:]
    return f"{name[0]}0{digits}" if len(digits) == 1 and digits.isdigit() else name


def nearest(name: str, names: Iterable[str]) -> str:
    """A sentence ``Did you mean ...? `` with the nearest names, or nothing if none is near."""
    folded = {candidate.lower(): candidate for candidate in names}
    close = difflib.get_close_matches(name.lower(), list(folded), n=3, cutoff=0.5)
    return f"Did you mean {' or '.join(folded[match] for match in close)}? " if close else ""


def resolve_groups(
    groups: Sequence[Sequence[str]], bands: Sequence[str], sensor: Sensor
) -> tuple[tuple[int, ...], ...]:
    """Turn channel groups given by band names into indices into ``bands``.

    Args:
        groups: band names of each group.
        bands: the bands of the model's input, in order.
        sensor: the sensor that the names belong to.

    Returns:
        For each group the 0-based positions of its bands in ``bands``.

    Raises:
        ConfigError: if a group is empty, names an unknown band or one that is not an input,
            if a band stands in two groups, or if an input band stands in none.
    """
    order = list(sensor.select(bands))
    seen: dict[str, int] = {}
    resolved = []
    for number, group in enumerate(groups, start=1):
        names = sensor.select(group)
        for name in names:
            if name not in order:
                raise ConfigError(
                    f"group {number} names band {name}, which is not among the input bands",
                    f"Add it to --bands (now {','.join(order)}) or drop it from --groups.",
                )
            if name in seen:
                raise ConfigError(
                    f"band {name} stands in group {seen[name]} and in group {number}",
                    "Channel groups must not overlap: keep it in one of them.",
                )
            seen[name] = number
        resolved.append(tuple(order.index(name) for name in names))
    left = [name for name in order if name not in seen]
    if left:
        raise ConfigError(
            f"band {', '.join(left)} stands in no channel group",
            "Add it to one of the --groups or drop it from --bands.",
        )
    return tuple(resolved)


@dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation of each band, in the sensor's units.

    Attributes:
        bands: band names.
        mean: mean of each band.
        std: standard deviation of each band.
    """

    bands: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def select(self, names: Sequence[str]) -> Statistics:
        """The statistics of the named bands, in the given order."""
        at = [self.bands.index(name) for name in names]
        return Statistics(tuple(names), tuple(self.mean[i] for i in at), tuple(self.std[i] for i in at))

    def normalization(self, method: str) -> dict[str, Any]:
        """What ``Normalization.to_dict()`` gives, without importing torch.

        Args:
            method: name of the method, as ``Normalization`` takes it.
        """
        return {"method": method, "bands": list(self.bands), "mean": list(self.mean), "std": list(self.std)}


SENTINEL2 = Sensor(
    "sentinel-2",
    (
        Band("B1", "coastal", 442.7, 60),
        Band("B2", "blue", 492.4, 10),
        Band("B3", "green", 559.8, 10),
        Band("B4", "red", 664.6, 10),
        Band("B5", "rededge", 704.1, 20),
        Band("B6", "rededge", 740.5, 20),
        Band("B7", "rededge", 782.8, 20),
        Band("B8", "nir", 832.8, 10),
        Band("B8A", "nir08", 864.7, 20),
        Band("B9", "nir09", 945.1, 60),
        Band("B10", "cirrus", 1373.5, 60),
        Band("B11", "swir16", 1613.7, 20),
        Band("B12", "swir22", 2202.4, 20),
    ),
    "reflectance x 10000",
)
"""Sentinel-2A MSI, level 1C; central wavelengths from ESA's spectral response functions."""

RGB = Sensor(
    "rgb",
    (Band("R", "red", 665, 0), Band("G", "green", 560, 0), Band("B", "blue", 490, 0)),
    "digital number 0-255",
)
"""Natural photographs and pan-sharpened 8-bit imagery."""

_LANDSAT_UNITS = "reflectance 0-1 (thermal bands: kelvin)"

LANDSAT_TM = Sensor(
    "landsat-tm",
    (
        Band("B1", "blue", 485, 30),
        Band("B2", "green", 560, 30),
        Band("B3", "red", 660, 30),
        Band("B4", "nir", 830, 30),
        Band("B5", "swir16", 1650, 30),
        Band("B6", "lwir", 11450, 120),
        Band("B7", "swir22", 2215, 30),
    ),
    _LANDSAT_UNITS,
)
"""Landsat 4 and 5 TM; the Landsat wavelengths are the middles of the band limits that USGS publishes."""

LANDSAT_ETM = Sensor(
    "landsat-etm",
    (
        Band("B1", "blue", 485, 30),
        Band("B2", "green", 560, 30),
        Band("B3", "red", 660, 30),
        Band("B4", "nir", 835, 30),
        Band("B5", "swir16", 1650, 30),
        Band("B6_VCID_1", "lwir", 11450, 60),
        Band("B6_VCID_2", "lwir", 11450, 60),
        Band("B7", "swir22", 2220, 30),
        Band("B8", "pan", 710, 15),
    ),
    _LANDSAT_UNITS,
)
"""Landsat 7 ETM+; its thermal band comes in low and in high gain."""

LANDSAT_OLI = Sensor(
    "landsat-oli",
    (
        Band("B1", "coastal", 440, 30),
        Band("B2", "blue", 480, 30),
        Band("B3", "green", 560, 30),
        Band("B4", "red", 655, 30),
        Band("B5", "nir08", 865, 30),
        Band("B6", "swir16", 1610, 30),
        Band("B7", "swir22", 2200, 30),
        Band("B8", "pan", 590, 15),
        Band("B9", "cirrus", 1370, 30),
        Band("B10", "lwir11", 10895, 100),
        Band("B11", "lwir12", 12005, 100),
    ),
    _LANDSAT_UNITS,
)
"""Landsat 8 and 9 OLI, and TIRS for B10 and B11."""

SENTINEL1 = Sensor(
    "sentinel-1",
    (Band("VV", "vv", 55_465_763, 10), Band("VH", "vh", 55_465_763, 10)),
    "backscatter in decibels",
)
"""Sentinel-1 GRD at 5.405 GHz; STAC has no common names for radar, the polarizations stand for them."""

SENSORS = {sensor.name: sensor for sensor in (SENTINEL2, RGB, LANDSAT_TM, LANDSAT_ETM, LANDSAT_OLI, SENTINEL1)}

FMOW_SENTINEL_STATISTICS = Statistics(
    SENTINEL2.band_names,
    (
        1370.19151926, 1184.3824625, 1120.77120066, 1136.26026392, 1263.73947144, 1645.40315151, 1846.87040806,
        1762.59530783, 1972.62420416, 582.72633433, 14.77112979, 1732.16362238, 1247.91870117,
    ),
    (
        633.15169573, 650.2842772, 712.12507725, 965.23119807, 948.9819932, 1108.06650639, 1258.36394548,
        1233.1492281, 1364.38688993, 472.37967789, 14.3114637, 1310.36996126, 1087.6020813,
    ),
)  # fmt: skip
"""Statistics of fMoW-Sentinel (SatMAE, arXiv 2207.08051)."""

FMOW_SENTINEL_GROUPS = (("B2", "B3", "B4", "B8"), ("B5", "B6", "B7", "B8A"), ("B11", "B12"))
"""SatMAE's channel groups; B1, B9 and B10 are dropped."""
FMOW_SENTINEL_BANDS = ("B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "B11", "B12")
"""SatMAE's ten input bands in the order of the product."""

IMAGENET_STATISTICS = Statistics(("R", "G", "B"), (123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
"""ImageNet's usual statistics, in digital numbers."""

FMOW_RGB_STATISTICS = Statistics(
    ("R", "G", "B"), (106.641187, 107.477377, 101.777531), (73.37442, 70.231502, 70.482448)
)
"""Statistics of fMoW-RGB (SatMAE, arXiv 2207.08051), in digital numbers."""
