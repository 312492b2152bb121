"""What TorchGeo's datasets do not tell of themselves: one table for names, opening and input, read without torch.

A dataset whose class names its bands needs no entry, except to have its bands checked before it is opened.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from geoexplora.bands import LANDSAT_ETM, LANDSAT_OLI, LANDSAT_TM, RGB, SENTINEL1, SENTINEL2, Sensor


@dataclass(frozen=True)
class Images:
    """What the images of a dataset, or of a variant of it, hold.

    Attributes:
        sensor: of the images; channels of other sensors beside it are left out.
        bands: name of each channel in TorchGeo's order; empty where the dataset tells.
        scale: of each channel or of all: times this, plus ``offset``, pixel values are in the sensor's units.
        offset: of each channel or of all, in the sensor's units.
    """

    sensor: Sensor
    bands: tuple[str, ...] = ()
    scale: tuple[float, ...] = (1.0,)
    offset: tuple[float, ...] = (0.0,)


@dataclass(frozen=True)
class Facts(Images):
    """What a dataset of TorchGeo does not tell by its attributes; its images are those that are opened by default.

    Attributes:
        all_bands: opened by its name, it holds all bands of the sensor: they are checked before it is opened.
        arguments: of its constructor.
        bands_in: its attributes that name the channels one after another, where ``bands`` has them in another order.
        variant_in: its attribute on which the images depend.
        variants: the images by the value of this attribute.
        target: what its samples say of an image, where they say several things.
        classes: names of its classes, where TorchGeo's are not in the order of the values.
        ignore_index: the value of its masks that is no class.
    """

    all_bands: bool = False
    arguments: Mapping[str, Any] = field(default_factory=dict)
    bands_in: tuple[str, ...] = ()
    variant_in: str = ""
    variants: Mapping[str, Images] = field(default_factory=dict)
    target: Literal["class", "multilabel", "mask", "value"] | None = None
    classes: tuple[str, ...] = ()
    ignore_index: int | None = None

    def images_of(self, dataset: object) -> Images:
        """What the images of an opened dataset hold."""
        return self.variants.get(getattr(dataset, self.variant_in, ""), self)


_LEVEL_2A = tuple(band for band in SENTINEL2.band_names if band != "B10")

# TorchGeo lists the polarizations as VV, VH, but reads a radar image's files in the order of their names.
_BIGEARTHNET = {
    "s1": Images(SENTINEL1, ("VH", "VV")),
    "s2": Images(SENTINEL2, _LEVEL_2A),
    "all": Images(SENTINEL2, ("VH", "VV", *_LEVEL_2A)),
}

SSL4EO_L_WHITE = {"TOA": 0.4, "SR": 0.3}
"""Reflectance that is white (255) in the 8-bit images of SSL4EO-L; 0 is black."""
SSL4EO_L_KELVIN = (273.15 - 25, 273.15 + 45)
"""What black and white are in its thermal bands; both by TorchGeo's experiments/ssl4eo/landsat/compress_*.sh."""


def _ssl4eo_l(sensor: Sensor, level: str, bands: tuple[str, ...]) -> Images:
    thermal = [sensor.band(band).common_name.startswith("lwir") for band in bands]
    ranges = [SSL4EO_L_KELVIN if hot else (0.0, SSL4EO_L_WHITE[level]) for hot in thermal]
    scale = tuple((white - black) / 255 for black, white in ranges)
    return Images(sensor, bands, scale, tuple(black for black, _ in ranges))


_SSL4EO_L = {
    "tm_toa": _ssl4eo_l(LANDSAT_TM, "TOA", LANDSAT_TM.band_names),
    "etm_toa": _ssl4eo_l(LANDSAT_ETM, "TOA", LANDSAT_ETM.band_names),  # TorchGeo calls both thermal ones B6
    "etm_sr": _ssl4eo_l(LANDSAT_ETM, "SR", ("B1", "B2", "B3", "B4", "B5", "B7")),
    "oli_tirs_toa": _ssl4eo_l(LANDSAT_OLI, "TOA", LANDSAT_OLI.band_names),
    "oli_sr": _ssl4eo_l(LANDSAT_OLI, "SR", LANDSAT_OLI.band_names[:7]),
}

# In the masks, regions without data are 0 and the background 1 (Wang et al. 2021, arXiv 2110.08733, and its data card);
# TorchGeo names no-data last.
_LOVEDA = ("no-data", "background", "building", "road", "water", "barren", "forest", "agriculture")

_WHOLE_SENTINEL2 = ("EuroSAT", "EuroSAT100", "EuroSATSpatial", "SEN12MS", "SSL4EOS12")
_PHOTOGRAPHS = (
    "DLRSD", "FireRisk", "LandCoverAI", "MillionAID", "NonGeoClassificationDataset", "PatternNet", "RESISC45",
    "TropicalCyclone", "UCMerced",
)  # fmt: skip

FACTS: dict[str, Facts] = {
    **dict.fromkeys(_WHOLE_SENTINEL2, Facts(SENTINEL2, all_bands=True)),
    **dict.fromkeys(_PHOTOGRAPHS, Facts(RGB, all_bands=True)),
    "BigEarthNet": Facts(SENTINEL2, arguments={"bands": "s2"}, variant_in="bands", variants=_BIGEARTHNET),
    "BigEarthNetV2": Facts(
        SENTINEL2, arguments={"bands": "s2"}, variant_in="bands", variants=_BIGEARTHNET, target="multilabel"
    ),
    "CloudCoverDetection": Facts(SENTINEL2),
    "DL4GAMAlps": Facts(SENTINEL2),
    "LoveDA": Facts(RGB, all_bands=True, classes=_LOVEDA, ignore_index=0),
    "SSL4EOL": Facts(LANDSAT_OLI, variant_in="split", variants=_SSL4EO_L),
    "SeasonalContrastS2": Facts(SENTINEL2, arguments={"bands": _LEVEL_2A}),
    "So2Sat": Facts(SENTINEL2, scale=(10_000.0,), bands_in=("s1_band_names", "s2_band_names")),
}
"""By the name of the class: what its attributes leave open, or state in another order than its files."""
