"""Adapting weights to another patch size, image size or set of bands.

Shapes: D width, C source bands, N target bands, P patch, L positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from timm.layers.patch_embed import resample_patch_embed
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn
from torch.nn import functional as F

from geoexplora.bands import SENSORS, Band, Sensor
from geoexplora.errors import ConfigError, WeightsError
from geoexplora.registry import look_up

BAND_POLICIES = {
    "rgb-by-name": "a band of the source by its name (red, green, blue), for the others the mean of all of them",
    "mean": "the mean of the source's bands",
    "nearest-wavelength": "the source's band that is nearest in wavelength",
    "random": "new random weights",
}
"""How the patch embedding of a band starts, by name of the policy."""


PATCH_RESIZES = {
    "pseudo-inverse": "FlexiViT's: the response to an image resized along with the patch stays the same",
    "bilinear": "the kernel is an image, and its sum over the patch stays the same",
}
"""How a patch embedding changes its patch size, by name."""


def resample_kernel(kernel: Tensor, patch_size: int, method: str = "pseudo-inverse") -> Tensor:
    """Change the patch size of a patch embedding.

    Args:
        kernel: (D, C, P, P).
        patch_size: the new P.
        method: ``pseudo-inverse`` is FlexiViT's (arXiv 2212.08013, section 3.4; timm's implementation), ``bilinear``
            interpolates the kernel with antialiasing and scales it by (P / P')^2.

    Returns:
        (D, C, P', P').

    Raises:
        ConfigError: for an unknown method.
    """
    look_up("resize of patches", method, PATCH_RESIZES)
    if method == "bilinear":
        resized = F.interpolate(kernel, (patch_size, patch_size), mode="bilinear", antialias=True)
        return resized * (kernel.shape[-1] / patch_size) ** 2
    resampled: Tensor = resample_patch_embed(kernel, [patch_size, patch_size])
    return resampled


def resample_positions(encoding: Tensor, old: tuple[int, int], new: tuple[int, int], prefix_rows: int = 1) -> Tensor:
    """Change the grid of a position encoding by bicubic interpolation (timm); rows of class and registers stay.

    Args:
        encoding: (1, prefix rows + L, D).
        old: rows and columns of the grid it is for.
        new: rows and columns of the grid wanted.
        prefix_rows: rows that belong to no position.

    Returns:
        (1, prefix rows + L', D).
    """
    resampled: Tensor = resample_abs_pos_embed(encoding, list(new), list(old), num_prefix_tokens=prefix_rows)
    return resampled


def convert_bands(
    kernel: Tensor,
    source: Sequence[Band],
    target: Sequence[Band],
    policy: str,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Make a patch embedding for other bands.

    A band that the source has itself keeps its slice whatever the policy; the policy is for all others. The result is
    scaled by C / N, so that bands that all show the same picture are embedded as strongly as by the source: exactly so
    for ``mean``, and for ``rgb-by-name`` where the target holds all of the source's bands or none. The bias needs no
    change. Nothing is ever filled with zeros.

    Args:
        kernel: (D, C, P, P).
        source: the C bands it is for.
        target: the N bands wanted.
        policy: a name in ``BAND_POLICIES``.
        generator: source of randomness for ``random``.

    Returns:
        (D, N, P, P).

    Raises:
        ConfigError: for an unknown policy.
        WeightsError: if the kernel is not for the source bands.
    """
    look_up("policy for new bands", policy, BAND_POLICIES)
    kernel = kernel.float()
    if kernel.ndim != 4 or kernel.shape[1] != len(source):
        names = ", ".join(band.name for band in source)
        raise WeightsError(
            f"a patch embedding of shape {tuple(kernel.shape)} is not for the {len(source)} bands {names}",
            "The weights file does not match its description: take another copy.",
        )
    fresh = kernel.new_empty(kernel.shape[0], len(target), *kernel.shape[2:])
    if policy == "random":
        nn.init.xavier_uniform_(fresh.flatten(1), generator=generator)
    scale, mean = len(source) / len(target), kernel.mean(dim=1)
    slices = []
    for position, band in enumerate(target):
        if band in source:
            slices.append(kernel[:, source.index(band)])
            continue
        if policy == "random":
            slices.append(fresh[:, position] / scale)  # as drawn, once all is scaled
            continue
        if policy == "nearest-wavelength":
            distances = [abs(other.wavelength - band.wavelength) for other in source]
            slices.append(kernel[:, distances.index(min(distances))])
            continue
        same = [index for index, other in enumerate(source) if other.common_name == band.common_name]
        slices.append(kernel[:, same[0]] if policy == "rgb-by-name" and len(same) == 1 else mean)
    return torch.stack(slices, dim=1) * scale


def rgb_to_groups(
    kernel: Tensor,
    sensor: Sensor,
    groups: Sequence[Sequence[str]],
    source_bands: Sequence[str] = ("R", "G", "B"),
    policy: str = "rgb-by-name",
    *,
    source_sensor: Sensor = SENSORS["rgb"],
    generator: torch.Generator | None = None,
) -> list[Tensor]:
    """Make the patch embedding of each channel group from that of a plain ViT: :func:`convert_bands` for each group.

    Args:
        kernel: (D, C, P, P).
        sensor: the sensor of the groups.
        groups: band names of each group.
        source_bands: names of the C bands of the kernel.
        policy: a name in ``BAND_POLICIES``.
        source_sensor: the sensor of the source's bands.
        generator: source of randomness for ``random``.

    Returns:
        For each group a tensor (D, bands of the group, P, P).

    Raises:
        ConfigError: for an unknown policy or band.
        WeightsError: if the kernel is not for the source bands.
    """
    source = [source_sensor.band(name) for name in source_bands]
    if not all(groups):
        raise ConfigError("a channel group is empty", "Name at least one band in each of the --groups.")
    return [
        convert_bands(kernel, source, [sensor.band(name) for name in group], policy, generator=generator)
        for group in groups
    ]
