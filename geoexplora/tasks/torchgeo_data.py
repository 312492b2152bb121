"""Batches of TorchGeo's datamodules, as the tasks of this package take them: bands by name, normalized once.

Shapes: B batch, C bands, h and w an image's height and width, S side of the network's input.
"""

from __future__ import annotations

import copy
import logging
from typing import Any, NamedTuple

import kornia.augmentation as K
import kornia.enhance
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn
from torchgeo.datamodules import BaseDataModule
from torchvision.transforms import v2

from geoexplora.bands import RGB, SENTINEL2, Sensor
from geoexplora.datamodules.tiles import TilesDataModule
from geoexplora.datasets.torchgeo_channels import Channels
from geoexplora.errors import ConfigError, DataError
from geoexplora.tasks.torchgeo_input import channels_of, checked_image, positions
from geoexplora.transforms.normalization import Normalization

log = logging.getLogger(__name__)

Batch = dict[str, Any]

AUGMENTATIONS = ("aug", "train_aug", "val_aug", "test_aug", "predict_aug")
"""Where a datamodule of TorchGeo keeps what it does to batches, its normalization among it."""

_NORMALIZING = (K.Normalize, kornia.enhance.Normalize, v2.Normalize)
_OWN_WAY = ("CopernicusBenchBiomassS3DataModule", "FLAIRHUBDataModule", "TreeSatAIDataModule")
"""They normalize in code of their own, out of reach."""

_FULL_SCALE = {RGB.name: 255.0, SENTINEL2.name: 10_000.0}
"""What kornia's photometric augmentations, made for 0..1, are to take for 1, in the sensor's units."""


class _Constants(NamedTuple):
    """What every batch is computed with, on the batches' device: a copy for each would wait for the GPU.

    Attributes:
        at: (C,), positions of the task's bands among the channels.
        rescaling: times the first, plus the second, each (C, 1, 1), values are in the sensor's units; None where they
            are already.
        mean: (C, 1, 1), in the sensor's units.
    """

    at: Tensor
    rescaling: tuple[Tensor, Tensor] | None
    mean: Tensor


class BatchAdapter:
    """Turns the batches of a datamodule into what a task takes; to be called once on each.

    Of a datamodule of this package it only checks that it gives what the task takes. One of TorchGeo has its
    ``K.Normalize`` taken out of its augmentations for as long as the adapter is used (until ``restore``): the raw
    values are normalized here, by the task's normalization. What a dataset does in its own ``transforms`` is out of
    sight; a first batch that cannot be in the sensor's units is warned about.

    Args:
        datamodule: of this package or of TorchGeo, set up; None or another one: batches are taken as they are, and a
            warning says so.
        sensor: the sensor that the task's bands belong to.
        normalization: the task's; names the bands and their order.
        image_size: side S that images are brought to (masks to the nearest pixel); None keeps their size, but makes
            them square.
        antialias: antialiased resizing.

    Raises:
        ConfigError: if a band is not there, the datamodule normalizes in another way, or, with a datamodule of this
            package, bands or normalization are not the task's.
    """

    def __init__(
        self,
        datamodule: LightningDataModule | None,
        sensor: Sensor,
        normalization: Normalization,
        *,
        image_size: int | None,
        antialias: bool = False,
    ) -> None:
        self.sensor = sensor
        self.normalization = normalization
        self.image_size = image_size
        self.antialias = antialias
        self.channels: Channels | None = None
        self._datamodule = datamodule
        self._kept: dict[str, Any] = {}
        self._constants: dict[torch.device, _Constants] = {}
        self._looked = False
        if isinstance(datamodule, TilesDataModule):
            _check_same(datamodule, sensor, normalization)
        elif not isinstance(datamodule, BaseDataModule):
            log.warning("the batches come from no datamodule of geoexplora or TorchGeo: taken as normalized already")
        elif any(base.__name__ in _OWN_WAY for base in type(datamodule).__mro__):
            raise ConfigError(
                f"TorchGeo's {type(datamodule).__name__} normalizes by itself, which cannot be turned off",
                "Use another datamodule: images would be normalized twice.",
            )
        else:
            self.channels = channels_of(datamodule, sensor)
            self._at = positions(self.channels, normalization.bands)
            self._rescaling = self.channels.rescaling(normalization.bands)
            self._take_normalization_out(datamodule)

    def __call__(self, batch: Batch) -> Batch:
        """Adapt a batch.

        Args:
            batch: as it reaches a step of the task, with ``image`` (B, C, h, w) and, perhaps, ``mask`` (B, h, w) or
                (B, 1, h, w).

        Returns:
            The batch itself with datamodules of this package. Else a new one: ``image`` (B, C, S, S), float32,
            normalized, and ``size`` (B, 2), int64 on the CPU, the heights and widths before resizing.

        Raises:
            ConfigError: if it holds no images of one time.
            DataError: if they have another number of channels than the datamodule's first image.
        """
        if self.channels is None:
            return batch
        image = checked_image(self.channels.source, batch, 4)
        if image.shape[1] != len(self.channels.names):
            raise DataError(
                f"a batch of TorchGeo's {self.channels.source} has {image.shape[1]} channels, its first image "
                f"{len(self.channels.names)}",
                "All images must hold the same bands.",
            )
        sizes = torch.tensor([image.shape[-2:]] * len(image))
        with torch.no_grad(), torch.autocast(image.device.type, enabled=False):
            constants = self._on(image.device)
            raw = image.index_select(1, constants.at).float()
            if constants.rescaling is not None:
                raw = raw * constants.rescaling[0] + constants.rescaling[1]
            self._look(raw)
            normalized = self._resized(self.normalization(torch.where(raw.isfinite(), raw, constants.mean)))
        adapted = {**batch, "image": normalized, "size": sizes}
        if "mask" in batch and batch["mask"].shape[-2:] != normalized.shape[-2:]:
            adapted["mask"] = _resized_mask(batch["mask"], normalized.shape[-1])
        return adapted

    def restore(self) -> None:
        """Give the datamodule its own normalization back."""
        for name, augmentation in self._kept.items():
            setattr(self._datamodule, name, augmentation)
        self._kept = {}

    def _take_normalization_out(self, datamodule: BaseDataModule) -> None:
        full_scale = _FULL_SCALE.get(self.sensor.name, 1.0) / (min(self.channels.scale) if self.channels else 1.0)
        for name in AUGMENTATIONS:
            augmentation = getattr(datamodule, name)
            if isinstance(augmentation, nn.Module):
                self._kept[name] = augmentation
                setattr(datamodule, name, RawAugmentation(augmentation, full_scale))
            elif augmentation is not None:
                log.warning(
                    "%s.%s is a function of its own: it must not normalize, for the task does",
                    type(datamodule).__name__,
                    name,
                )

    def _on(self, device: torch.device) -> _Constants:
        """The constants on a device; made once for each."""
        if device not in self._constants:
            at, mean = torch.tensor(self._at).to(device), torch.tensor(self.normalization.mean).to(device)
            rescaling = None
            if self._rescaling is not None:
                scale, offset = (torch.from_numpy(values).to(device) for values in self._rescaling)
                rescaling = scale, offset
            self._constants[device] = _Constants(at, rescaling, mean[:, None, None])
        return self._constants[device]

    def _look(self, raw: Tensor) -> None:
        """Warn once where the values look as if they were normalized already."""
        full = _FULL_SCALE.get(self.sensor.name)
        if self._looked or full is None:
            return
        self._looked = True
        finite = raw[raw.isfinite()]
        if finite.numel() and finite.abs().max() < full / 50:
            log.warning(
                "the first images lie within %.3g..%.3g, which can hardly be %s: if the dataset's transforms normalize "
                "or scale them, take that out, for the task normalizes",
                float(finite.min()),
                float(finite.max()),
                self.sensor.units,
            )

    def _resized(self, image: Tensor) -> Tensor:
        side = self.image_size or max(image.shape[-2:])
        if image.shape[-2:] == (side, side):
            return image
        return F.interpolate(image, (side, side), mode="bicubic", antialias=self.antialias, align_corners=False)


class RawAugmentation:
    """An augmentation of a TorchGeo datamodule without its normalization.

    Photometric augmentations of kornia clip to 0..1: where there are any, values are scaled to that range for them.

    Args:
        augmentation: kornia's or torchvision's, with or without a normalization in it; it is not changed.
        full_scale: the raw value to be taken for 1.
    """

    def __init__(self, augmentation: nn.Module, full_scale: float) -> None:
        self.augmentation = copy.deepcopy(augmentation)
        for name, module in list(self.augmentation.named_modules()):
            if isinstance(module, _NORMALIZING):
                parent, _, child = name.rpartition(".")
                setattr(self.augmentation.get_submodule(parent), child, _no_normalization(module))
        photometric = (
            isinstance(module, K.IntensityAugmentationBase2D) and not isinstance(module, K.Normalize)
            for module in self.augmentation.modules()
        )
        self.full_scale = full_scale if any(photometric) else 1.0

    def __call__(self, batch: Batch) -> Batch:
        """Augment a batch; its images stay in their units."""
        if self.full_scale == 1.0:
            return self.augmentation(batch)
        augmented = self.augmentation({**batch, "image": batch["image"] / self.full_scale})
        return {**augmented, "image": augmented["image"] * self.full_scale}


def _no_normalization(module: nn.Module) -> nn.Module:
    """What stands in for it: kornia's pipelines need an augmentation, and one of no length is an error to TorchGeo."""
    if isinstance(module, K.Normalize):
        return K.Normalize(mean=0.0, std=1.0, keepdim=module.keepdim)
    return nn.Identity()


def _check_same(datamodule: TilesDataModule, sensor: Sensor, normalization: Normalization) -> None:
    given, wanted = f"{datamodule.sensor.name} {','.join(datamodule.bands)}", ",".join(normalization.bands)
    if datamodule.sensor != sensor or datamodule.bands != normalization.bands:
        raise ConfigError(
            f"the datamodule gives {given}, the task takes {sensor.name} {wanted}",
            "Set the datamodule's bands to the task's; or leave the task's sensor, bands and normalization out.",
        )
    if datamodule.normalization != normalization:
        raise ConfigError(
            f"the datamodule normalizes by {datamodule.normalization.method} with mean {datamodule.normalization.mean}"
            f" and std {datamodule.normalization.std}, the task takes {normalization.method} with mean "
            f"{normalization.mean} and std {normalization.std}",
            "Give the datamodule the task's normalization, or leave the task's out.",
        )


def _resized_mask(mask: Tensor, side: int) -> Tensor:
    shape = (*mask.shape[:-2], side, side)
    flat = mask.reshape(-1, 1, *mask.shape[-2:]).double()
    return F.interpolate(flat, (side, side), mode="nearest-exact").to(mask.dtype).view(shape)
