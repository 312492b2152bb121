"""Datamodules: batches of normalized crops from named bands, in an order that can be taken up again."""

from geoexplora.datamodules.fmow_rgb import FMoWRGBDataModule
from geoexplora.datamodules.fmow_sentinel import FMoWSentinelDataModule
from geoexplora.datamodules.photographs import PhotographsDataModule
from geoexplora.datamodules.sample import SampleDataModule
from geoexplora.datamodules.sampling import StepBatchSampler
from geoexplora.datamodules.tiles import TilesDataModule

__all__ = [
    "FMoWRGBDataModule",
    "FMoWSentinelDataModule",
    "PhotographsDataModule",
    "SampleDataModule",
    "StepBatchSampler",
    "TilesDataModule",
]
