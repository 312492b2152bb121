"""Photometric augmentation of crops on the device: colours of photographs, or the bands of any other sensor.

Normalized crops come in and go out. All random numbers are drawn on the CPU from one generator: the same ones whatever
the device. How many are drawn depends on the number of crops only.

Shape legend: N crops, C bands, S their side.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol, get_args

import torch
from kornia import enhance
from kornia.color import rgb_to_grayscale
from kornia.filters import gaussian_blur2d
from torch import Generator, Tensor

from geoexplora.bands import RGB, Sensor
from geoexplora.errors import ConfigError
from geoexplora.transforms.multi_crop import Crops
from geoexplora.transforms.normalization import Normalization

Kind = Literal["auto", "colour", "bands", "none"]


class Photometric(Protocol):
    """Changes the pixel values of crops, never their places."""

    def __call__(self, crops: Crops, generator: Generator) -> Crops:
        """Change crops.

        Args:
            crops: normalized, on any device; left as they are.
            generator: decides everything random; on the CPU.

        Returns:
            Crops of the same shapes, float32, normalized.
        """


@dataclass(frozen=True)
class Blur:
    """Gaussian blur, as DINOv2 (arXiv 2304.07193) keeps it from DINO (arXiv 2104.14294).

    Attributes:
        first: probability for the first global crop of an image.
        other: probability for its other global crops.
        local: probability for its local crops.
        sigma: least and greatest width in pixels.
        kernel: side of the kernel in pixels, odd.

    Raises:
        ConfigError: if a setting is out of range.
    """

    first: float = 1.0
    other: float = 0.1
    local: float = 0.5
    sigma: tuple[float, float] = (0.1, 2.0)
    kernel: int = 9

    def __post_init__(self) -> None:
        """Check the settings."""
        _check_shares(blur_first=self.first, blur_other=self.other, blur_local=self.local)
        low, high = self.sigma
        if not 0 < low <= high < math.inf:
            raise ConfigError(f"{low}, {high} is not a range of a blur's widths", "Give two with 0 < low <= high.")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ConfigError(f"a blur's kernel of {self.kernel} pixels has no centre", "Give an odd number.")

    def __call__(self, images: Tensor, probability: Tensor, generator: Generator) -> None:
        """Blur some of the images (N, C, S, S) in place, each with its probability (N,).

        Raises:
            ConfigError: if the images are too small for the kernel's reflected border.
        """
        if images.shape[-1] <= self.kernel // 2:
            raise ConfigError(
                f"crops of {images.shape[-1]} px are too small for a blur of {self.kernel} px",
                f"Give crops of at least {self.kernel // 2 + 1} pixels.",
            )
        chosen = torch.rand(len(images), generator=generator) < probability
        sigma = _uniform(*self.sigma, (len(images), 1), generator).expand(-1, 2)
        _change(images, chosen, lambda some, width: gaussian_blur2d(some, self.kernel, width), sigma)


@dataclass(frozen=True)
class _Augmentation(ABC):
    """What both augmentations share: the views' probabilities, and the way out of the normalization and back.

    After ``clip-uint8`` the values are clipped to 0..1 again, but not truncated: the crops were resized since the
    truncation, and another one would darken all of them by half a level, which evaluation never sees.
    """

    normalization: Normalization
    blur: Blur = field(default_factory=Blur, kw_only=True)

    def __call__(self, crops: Crops, generator: Generator) -> Crops:
        """Change crops, see ``Photometric``."""
        first = torch.arange(len(crops.global_)) < crops.batch_size
        blur = torch.where(first, self.blur.first, self.blur.other)
        none = torch.zeros(len(crops.local), dtype=torch.bool)
        with torch.no_grad(), torch.autocast(crops.global_.device.type, enabled=False):
            return Crops(
                self._change_view(crops.global_, blur, ~first, generator),
                self._change_view(crops.local, torch.full((len(none),), self.blur.local), none, generator),
                crops.batch_size,
            )

    @abstractmethod
    def _change_view(self, images: Tensor, blur: Tensor, solarized: Tensor, generator: Generator) -> Tensor:
        """Change normalized images (N, C, S, S), blur and permission to solarize being (N,)."""

    def _normalize(self, images: Tensor) -> Tensor:
        if self.normalization.method == "clip-uint8":
            return replace(self.normalization, method="clip-float")(images)
        return self.normalization(images)


@dataclass(frozen=True)
class ColourAugmentation(_Augmentation):
    """DINOv2's augmentation of photographs (arXiv 2304.07193): BYOL's (arXiv 2006.07733, appendix B), blur apart.

    In this order: brightness, contrast, saturation and hue, in an order that each image draws for itself; grayscale;
    blur; solarization of all global crops but the first. The formulas are torchvision's, on values from 0 to 1, which
    bicubic's overshoots are clipped to.

    Attributes:
        normalization: of the bands R, G, B of the sensor rgb, in any order.
        brightness: the factor is from 1 - brightness to 1 + brightness.
        contrast: likewise.
        saturation: likewise.
        hue: the shift is from -hue to hue, in turns of the colour circle.
        jitter: probability of these four.
        grayscale: probability of grayscale.
        solarize: probability of inverting what is 0.5 or above.
        blur: widths and probabilities of the blur.

    Raises:
        ConfigError: if the bands are others, or a setting is out of range.
    """

    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    jitter: float = 0.8
    grayscale: float = 0.2
    solarize: float = 0.2

    def __post_init__(self) -> None:
        """Check the settings."""
        if not _coloured(self.normalization):
            raise ConfigError(
                f"the bands {', '.join(self.normalization.bands)} are not red, green and blue of the sensor {RGB.name}",
                "Colour augmentation is for these only; take auto, bands or none.",
            )
        _check_shares(brightness=self.brightness, contrast=self.contrast, saturation=self.saturation)
        _check_shares(jitter=self.jitter, grayscale=self.grayscale, solarize=self.solarize)
        if not 0 <= self.hue <= 0.5:
            raise ConfigError(f"a hue of {self.hue} turns is out of range", "Give a number from 0 to 0.5.")

    def _change_view(self, images: Tensor, blur: Tensor, solarized: Tensor, generator: Generator) -> Tensor:
        bands = self.normalization.bands
        digital = self.normalization.inverse(images)
        colours = digital[:, [bands.index(name) for name in RGB.band_names]].div_(255).clamp_(0, 1)
        self._jitter(colours, generator)
        grey = torch.rand(len(images), generator=generator) < self.grayscale
        _change(colours, grey, lambda some: rgb_to_grayscale(some).expand_as(some))
        self.blur(colours, blur, generator)
        inverted = torch.rand(len(images), generator=generator) < self.solarize
        _change(colours, inverted & solarized, enhance.solarize)
        return self._normalize(colours[:, [RGB.band_names.index(name) for name in bands]].mul_(255))

    def _jitter(self, colours: Tensor, generator: Generator) -> None:
        count = len(colours)
        chosen = torch.rand(count, generator=generator) < self.jitter
        brightness, contrast, saturation = (
            _uniform(1 - width, 1 + width, (count,), generator)
            for width in (self.brightness, self.contrast, self.saturation)
        )
        steps: tuple[tuple[Callable[..., Tensor], Tensor], ...] = (
            (enhance.adjust_brightness_accumulative, brightness),
            (enhance.adjust_contrast_with_mean_subtraction, contrast),
            (enhance.adjust_saturation_with_gray_subtraction, saturation),
            (enhance.adjust_hue, 2 * math.pi * _uniform(-self.hue, self.hue, (count,), generator)),
        )
        order = torch.rand(count, len(steps), generator=generator).argsort(1)
        for place in range(len(steps)):
            for number, (change, factor) in enumerate(steps):
                _change(colours, chosen & (order[:, place] == number), change, factor)


@dataclass(frozen=True)
class BandAugmentation(_Augmentation):
    """Random gain and offset of the bands, then blur: what remains of DINOv2's augmentation for any sensor. Ours.

    With z a band's values in standard deviations from its mean, z becomes gain * z + offset. Gain and offset are an
    image's, as illumination and haze are, times or plus a little that is each band's own. About the mean they are
    contrast and brightness, whatever the unit: reflectance, kelvin or decibels. The image's gain is DINOv2's contrast
    factor; its offset is smaller than DINOv2's brightness, which moves fMoW-RGB by up to 0.6 standard deviations; the
    bands' own parts are small, to keep the shapes of spectra. Hue, saturation and grayscale are defined by the eye's
    three colours, solarization by a range of values: they mean nothing here.

    Attributes:
        normalization: of the bands.
        gain: an image's gain is from 1 - gain to 1 + gain.
        band_gain: a band's gain is this much less or more than 1, times its image's.
        offset: an image's offset is from -offset to offset, in standard deviations of each band.
        band_offset: likewise for each band by itself, on top.
        jitter: probability of gain and offset.
        blur: widths and probabilities of the blur.

    Raises:
        ConfigError: if a setting is out of range.
    """

    gain: float = 0.4
    band_gain: float = 0.1
    offset: float = 0.4
    band_offset: float = 0.1
    jitter: float = 0.8

    def __post_init__(self) -> None:
        """Check the settings."""
        _check_shares(gain=self.gain, band_gain=self.band_gain, jitter=self.jitter)
        if not (0 <= self.offset < math.inf and 0 <= self.band_offset < math.inf):
            raise ConfigError(f"offsets {self.offset}, {self.band_offset} are out of range", "Give 0 or more.")

    def _change_view(self, images: Tensor, blur: Tensor, solarized: Tensor, generator: Generator) -> Tensor:
        count, channels = images.shape[:2]
        mean, std = (
            torch.tensor(part, device=images.device)[:, None, None]
            for part in (self.normalization.mean, self.normalization.std)
        )
        values = self.normalization.inverse(images).sub_(mean).div_(std)
        chosen = torch.rand((count, 1, 1, 1), generator=generator) < self.jitter
        gain = _uniform(1 - self.gain, 1 + self.gain, (count, 1, 1, 1), generator) * _uniform(
            1 - self.band_gain, 1 + self.band_gain, (count, channels, 1, 1), generator
        )
        offset = _uniform(-self.offset, self.offset, (count, 1, 1, 1), generator) + _uniform(
            -self.band_offset, self.band_offset, (count, channels, 1, 1), generator
        )
        values.mul_(torch.where(chosen, gain, 1.0).to(images.device))
        values.add_(torch.where(chosen, offset, 0.0).to(images.device))
        self.blur(values, blur, generator)
        return self._normalize(values.mul_(std).add_(mean))


def photometric(kind: Kind, sensor: Sensor, normalization: Normalization) -> Photometric:
    """The augmentation of a kind, with its default settings.

    Args:
        kind: ``colour``, ``bands``, ``none``, or ``auto``: colour for red, green and blue of the sensor rgb, in any
            order, bands for everything else.
        sensor: the sensor that the bands belong to.
        normalization: of the crops.

    Raises:
        ConfigError: if the kind is unknown, or ``colour`` does not fit the bands.
    """
    if kind not in get_args(Kind):
        raise ConfigError(f"unknown photometric augmentation {kind!r}", f"Known: {', '.join(get_args(Kind))}.")
    if kind == "none":
        return _unchanged
    if kind == "colour" or (kind == "auto" and sensor == RGB and _coloured(normalization)):
        return ColourAugmentation(normalization)
    return BandAugmentation(normalization)


def _coloured(normalization: Normalization) -> bool:
    return sorted(normalization.bands) == sorted(RGB.band_names)


def _unchanged(crops: Crops, generator: Generator) -> Crops:
    return crops


def _uniform(low: float, high: float, shape: tuple[int, ...], generator: Generator) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator)


def _change(images: Tensor, chosen: Tensor, change: Callable[..., Tensor], *parameters: Tensor) -> None:
    """Change the chosen images in place, each with its own parameters; kornia takes these to the device."""
    rows = chosen.nonzero().squeeze(1)
    if len(rows):
        at = rows.to(images.device)
        images[at] = change(images[at], *(parameter[rows] for parameter in parameters))


def _check_shares(**named: float) -> None:
    for name, value in named.items():
        if not 0 <= value <= 1:
            raise ConfigError(f"{name} {value} is out of range", "Give a number from 0 to 1.")
