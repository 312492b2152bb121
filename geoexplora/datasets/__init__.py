"""Datasets in TorchGeo's style: samples are dictionaries, bands have names."""

from geoexplora.datasets.fmow_rgb import FMoWRGB
from geoexplora.datasets.fmow_sentinel import FMoWSentinel
from geoexplora.datasets.photographs import Photographs
from geoexplora.datasets.sample import labelled_tiles, read_scene, unlabelled_tiles
from geoexplora.datasets.sample_dataset import SampleTiles
from geoexplora.datasets.sample_rgb_tree import write_fmow_rgb_tree
from geoexplora.datasets.sample_tree import write_fmow_tree

__all__ = [
    "FMoWRGB",
    "FMoWSentinel",
    "Photographs",
    "SampleTiles",
    "labelled_tiles",
    "read_scene",
    "unlabelled_tiles",
    "write_fmow_rgb_tree",
    "write_fmow_tree",
]
