"""Which tensors of a source need another shape before they fit a model, and how they get it.

Shapes: D width, L positions, P patch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn

from geoexplora.bands import SENSORS
from geoexplora.errors import WeightsError
from geoexplora.registry import look_up
from geoexplora.weights.convert import convert_bands, resample_kernel, resample_positions, rgb_to_groups
from geoexplora.weights.describe import GROUP_KERNEL, KERNEL
from geoexplora.weights.spec import EncoderSpec

_POOLED_NORM = "the source's fc_norm, which comes after pooling there"


@dataclass
class Adaptation:
    """The tensors that needed work; all others are matched by name and shape.

    Attributes:
        tensors: new values by the model's names.
        used: names of the source's tensors that are dealt with.
        converted: names made for other bands, with how.
        resampled: names brought to another size, with from what to what.
        kept: names that the model keeps, with why.
        band_init: the policy for new bands, if one was needed.
        patch_resize: how patch embeddings change their patch size.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    converted: dict[str, str] = field(default_factory=dict)
    resampled: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    band_init: str | None = None
    patch_resize: str = "pseudo-inverse"


def adapt_encoder(
    model: nn.Module,
    source: Mapping[str, Tensor],
    described: EncoderSpec | None,
    wanted: EncoderSpec | None,
    policy: str,
    generator: torch.Generator | None,
    *,
    label: str,
    patch_resize: str = "pseudo-inverse",
) -> Adaptation:
    """Adapt an encoder's patch embeddings and position encoding to a model.

    Args:
        model: the model.
        source: the source's tensors, under timm's names.
        described: what the source is.
        wanted: what the model is.
        policy: how patch embeddings of new bands start.
        generator: source of randomness for the policy ``random``.
        label: the source's name, for messages.
        patch_resize: how patch embeddings change their patch size, a name in ``convert.PATCH_RESIZES``.

    Returns:
        The tensors that needed work.

    Raises:
        WeightsError: if channel groups differ, or bands are not known.
    """
    target: dict[str, Tensor] = model.state_dict()
    adaptation = Adaptation(patch_resize=patch_resize)
    grouped = [name for name in target if GROUP_KERNEL.fullmatch(name)]
    if KERNEL in source and grouped:
        _plain_to_groups(adaptation, target, source, described, wanted, policy, generator, label)
    elif KERNEL in source and KERNEL in target:
        _plain_to_plain(adaptation, target, source, described, wanted, policy, generator)
    elif described is not None and wanted is not None and described.groups != wanted.groups:
        raise WeightsError(
            f"{label} has channel groups {_groups(described)}, the model has {_groups(wanted)}",
            f"Use --bands {','.join(described.bands)} and --groups {_groups(described)}, or weights of a plain ViT.",
        )
    else:
        for name in grouped:
            if name in source:
                _take_kernel(adaptation, name, source[name], target[name].shape[-1], {name})
    _positions(adaptation, model, target, source, described)
    if "fc_norm.weight" in source and "norm.weight" not in source and "norm.weight" in target:
        for part in ("weight", "bias"):
            adaptation.tensors[f"norm.{part}"] = source[f"fc_norm.{part}"]
            adaptation.converted[f"norm.{part}"] = _POOLED_NORM
            adaptation.used.add(f"fc_norm.{part}")
    return adaptation


def adapt_decoder(
    decoder: nn.Module, source: Mapping[str, Tensor], described: EncoderSpec | None, wanted: EncoderSpec | None
) -> Adaptation:
    """Adapt a decoder's position encoding and output projections.

    Args:
        decoder: the decoder, with names without ``decoder_``.
        source: the source's tensors under the same names.
        described: what the source's encoder is.
        wanted: what the decoder's encoder is.

    Returns:
        The tensors that needed work.
    """
    target: dict[str, Tensor] = decoder.state_dict()
    adaptation = Adaptation()
    _positions(adaptation, decoder, target, source, described, wanted)
    grouped = wanted is not None and wanted.groups is not None
    if grouped and "channel_embed" in target and "channel_embed" not in source:
        adaptation.kept["channel_embed"] = "sin-cos: the source has no channel groups"
    elif "channel_embed" in source and _differ(described, wanted, "groups"):
        adaptation.used.add("channel_embed")
        if "channel_embed" in target:
            adaptation.kept["channel_embed"] = "sin-cos: the channel groups differ"
    what = [name for name in ("sensor", "bands", "groups", "patch_size") if _differ(described, wanted, name)]
    if what:
        reason = f"new: {' and '.join(what)} differ from the source's".replace("_", " ")
        adaptation.kept |= {name: reason for name in target if name.startswith("pred.")}
        adaptation.used |= {name for name in source if name.startswith("pred.")}
    return adaptation


def _plain_to_groups(
    adaptation: Adaptation,
    target: Mapping[str, Tensor],
    source: Mapping[str, Tensor],
    described: EncoderSpec | None,
    wanted: EncoderSpec | None,
    policy: str,
    generator: torch.Generator | None,
    label: str,
) -> None:
    if described is None or wanted is None or wanted.groups is None:
        raise WeightsError(
            f"the bands of {label} or of the model are not known, so its patch embedding cannot become channel groups",
            "Give load_into the model's spec, and a source that tells its bands.",
        )
    kernels = rgb_to_groups(
        source[KERNEL], look_up("sensor", wanted.sensor, SENSORS), wanted.groups, described.bands, policy,
        source_sensor=look_up("sensor", described.sensor, SENSORS), generator=generator,
    )  # fmt: skip
    used = {KERNEL, "patch_embed.proj.bias"}
    for index, (kernel, names) in enumerate(zip(kernels, wanted.groups, strict=True)):
        name = f"patch_embed.{index}.proj.weight"
        adaptation.converted[name] = f"{policy}: {','.join(described.bands)} to {','.join(names)}"
        _take_kernel(adaptation, name, kernel, target[name].shape[-1], used)
        if "patch_embed.proj.bias" in source:
            adaptation.tensors[f"patch_embed.{index}.proj.bias"] = source["patch_embed.proj.bias"].clone()
            adaptation.converted[f"patch_embed.{index}.proj.bias"] = "the source's, for each group"
    adaptation.band_init = policy
    adaptation.kept |= {
        name: "as initialized: the source has no channel groups"
        for name in ("channel_embed", "channel_cls_embed")
        if name in target
    }


def _plain_to_plain(
    adaptation: Adaptation,
    target: Mapping[str, Tensor],
    source: Mapping[str, Tensor],
    described: EncoderSpec | None,
    wanted: EncoderSpec | None,
    policy: str,
    generator: torch.Generator | None,
) -> None:
    kernel = source[KERNEL]
    if described is not None and wanted is not None and _bands(described) != _bands(wanted):
        before, after = (look_up("sensor", spec.sensor, SENSORS) for spec in (described, wanted))
        kernel = convert_bands(
            kernel, [before.band(name) for name in described.bands], [after.band(name) for name in wanted.bands],
            policy, generator=generator,
        )  # fmt: skip
        known = described.sensor == wanted.sensor and set(wanted.bands) <= set(described.bands)
        how = "by name" if known else policy
        adaptation.converted[KERNEL] = f"{how}: {','.join(described.bands)} to {','.join(wanted.bands)}"
        adaptation.band_init = None if known else policy
    _take_kernel(adaptation, KERNEL, kernel, target[KERNEL].shape[-1], {KERNEL})


def _take_kernel(adaptation: Adaptation, name: str, kernel: Tensor, patch: int, used: set[str]) -> None:
    old = kernel.shape[-1]
    if old != patch:
        kernel = resample_kernel(kernel.float(), patch, adaptation.patch_resize)
        adaptation.resampled[name] = f"patch {old} to {patch} ({adaptation.patch_resize})"
    if name in adaptation.converted or name in adaptation.resampled:
        adaptation.tensors[name] = kernel
        adaptation.used |= used


def _positions(
    adaptation: Adaptation,
    model: nn.Module,
    target: Mapping[str, Tensor],
    source: Mapping[str, Tensor],
    described: EncoderSpec | None,
    wanted: EncoderSpec | None = None,
) -> None:
    name = "pos_embed"
    if name not in source or name not in target or source[name].ndim != 3:
        return
    old, new = source[name].shape, target[name].shape
    if old[2] != new[2]:
        # Of a group-channel encoder's width a part encodes the group, of a temporal decoder's width the time
        adaptation.kept[name] = f"sin-cos: {new[2]} wide, the source's is {old[2]} wide"
        adaptation.used.add(name)
        return
    prefix = _prefix_rows(model)
    before = _grid(old[1] - prefix, described)
    after = _model_grid(model, new[1] - prefix, wanted)
    if before is not None and after is not None and before != after:
        adaptation.tensors[name] = resample_positions(source[name].float(), before, after, prefix)
        adaptation.resampled[name] = f"{before[0]}x{before[1]} to {after[0]}x{after[1]}"
        adaptation.used.add(name)


def _prefix_rows(model: Any) -> int:
    """Rows of the position encoding that belong to no position: none where timm gives prefix tokens no position."""
    if getattr(model, "no_embed_class", False):
        return 0
    return int(getattr(model, "num_prefix_tokens", 1))


def _model_grid(model: Any, positions: int, wanted: EncoderSpec | None) -> tuple[int, int] | None:
    embed = getattr(model, "patch_embed", None)
    if embed is not None:
        rows, columns = embed.grid_size
        return int(rows), int(columns)
    return _grid(positions, wanted)


def _grid(positions: int, spec: EncoderSpec | None) -> tuple[int, int] | None:
    side = isqrt(positions) if spec is None else spec.image_size // spec.patch_size
    return (side, side) if side * side == positions else None


def _bands(spec: EncoderSpec) -> tuple[str, tuple[str, ...]]:
    return spec.sensor, spec.bands


def _groups(spec: EncoderSpec) -> str:
    return "none" if spec.groups is None else ";".join(",".join(group) for group in spec.groups)


def _differ(one: EncoderSpec | None, other: EncoderSpec | None, name: str) -> bool:
    return one is not None and other is not None and getattr(one, name) != getattr(other, name)
