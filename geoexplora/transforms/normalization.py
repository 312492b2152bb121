"""Named normalizations from raw sensor units to network input.

The choice travels with the weights, so that an encoder is never fed what it was not trained on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from geoexplora.bands import Statistics, nearest
from geoexplora.errors import ConfigError

METHODS = ("clip-uint8", "clip-float", "standardize")
"""``clip-uint8`` is the reference preprocessing of SatMAE (arXiv 2207.08051) and of ExPLoRA (arXiv 2406.10973)."""

WIDTH = 2.0
"""The clipping methods keep the mean plus and minus this many standard deviations."""


@dataclass(frozen=True)
class Normalization:
    """How raw pixel values become network input, band by band.

    - ``clip-uint8``: clip to mean +- 2 std, scale to 0..255, truncate to an integer, divide by 255;
    - ``clip-float``: the same without the truncation;
    - ``standardize``: (x - mean) / std.

    Attributes:
        method: one of ``METHODS``.
        bands: names of the bands, in the order of the image's channels.
        mean: mean of each band, in the sensor's units.
        std: standard deviation of each band, in the sensor's units.
    """

    method: str
    bands: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        """Check that the parts fit together.

        Raises:
            ConfigError: if the method is unknown, the lengths differ, or a deviation is not positive.
        """
        if self.method not in METHODS:
            raise ConfigError(
                f"unknown normalization {self.method!r}", f"{nearest(self.method, METHODS)}Known: {', '.join(METHODS)}."
            )
        if not len(self.bands) == len(self.mean) == len(self.std):
            raise ConfigError(
                f"a normalization of {len(self.bands)} bands has {len(self.mean)} means and {len(self.std)} deviations",
                "Give one mean and one standard deviation for each band.",
            )
        flat = [band for band, std in zip(self.bands, self.std, strict=True) if not std > 0]
        if flat:
            raise ConfigError(f"the standard deviation of {', '.join(flat)} is not positive", "Compute it again.")

    @classmethod
    def from_statistics(cls, method: str, statistics: Statistics) -> Normalization:
        """The named normalization with the given statistics."""
        return cls(method, statistics.bands, statistics.mean, statistics.std)

    def select(self, bands: Sequence[str]) -> Normalization:
        """The same of the named bands, in the given order."""
        at = [self.bands.index(band) for band in bands]
        mean, std = (tuple(values[i] for i in at) for values in (self.mean, self.std))
        return Normalization(self.method, tuple(bands), mean, std)

    @cached_property
    def _offset_scale(self) -> tuple[Tensor, Tensor]:
        mean = torch.tensor(self.mean, dtype=torch.float64)
        std = torch.tensor(self.std, dtype=torch.float64)
        if self.method == "standardize":
            offset, scale = mean, 1 / std
        else:
            # Truncation is to 0..255; the float counterpart needs no detour through it.
            top = 255.0 if self.method == "clip-uint8" else 1.0
            offset, scale = mean - WIDTH * std, top / (2 * WIDTH * std)
        return offset.float()[:, None, None], scale.float()[:, None, None]

    def __call__(self, image: Tensor) -> Tensor:
        """Normalize.

        Args:
            image: (..., C, H, W) in the sensor's units, of any real type.

        Returns:
            (..., C, H, W), float32; within 0..1 with the clipping methods.

        Raises:
            ConfigError: if the image's channels are not as many as the bands.
        """
        self._check(image)
        offset, scale = _offset_scale_on(image.device, self)
        scaled = (image.to(torch.float32) - offset).mul_(scale)
        if self.method == "clip-uint8":
            return scaled.clamp_(0, 255).trunc_().div_(255)
        if self.method == "clip-float":
            return scaled.clamp_(0, 1)
        return scaled

    def inverse(self, image: Tensor) -> Tensor:
        """Back to the sensor's units, up to what clipping and truncation took away.

        Args:
            image: (..., C, H, W), normalized.

        Returns:
            (..., C, H, W), float32, in the sensor's units.
        """
        self._check(image)
        offset, scale = _offset_scale_on(image.device, self)
        values = image.to(torch.float32)
        return (values * 255 if self.method == "clip-uint8" else values) / scale + offset

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, as stored with the weights."""
        return {"method": self.method, "bands": list(self.bands), "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Normalization:
        """The normalization that ``to_dict`` stored.

        Raises:
            ConfigError: if a part is missing or unknown.
        """
        expected = {"method", "bands", "mean", "std"}
        if set(stored) != expected:
            raise ConfigError(
                f"a stored normalization has {', '.join(sorted(stored)) or 'nothing'} "
                f"instead of {', '.join(sorted(expected))}",
                "The file may come from another version of this package.",
            )
        return cls(
            str(stored["method"]),
            tuple(str(band) for band in stored["bands"]),
            tuple(float(value) for value in stored["mean"]),
            tuple(float(value) for value in stored["std"]),
        )

    def _check(self, image: Tensor) -> None:
        if image.ndim < 3 or image.shape[-3] != len(self.bands):
            raise ConfigError(
                f"an image of shape {tuple(image.shape)} does not fit a normalization of {len(self.bands)} bands",
                f"Its channels must be {', '.join(self.bands)}, in this order, third from the end.",
            )


@lru_cache(64)
def _offset_scale_on(device: torch.device, normalization: Normalization) -> tuple[Tensor, Tensor]:
    """Copied once to each device: a copy for each batch would wait for the GPU."""
    offset, scale = normalization._offset_scale
    return offset.to(device), scale.to(device)
