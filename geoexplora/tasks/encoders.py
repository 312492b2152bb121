"""An encoder for a given input: as it was trained, or built anew with its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from geoexplora.errors import ConfigError
from geoexplora.models.initialization import initialize_plain_encoder
from geoexplora.registry import FROM_SOURCE
from geoexplora.tasks.sources import architecture, load_source, of_architecture
from geoexplora.transforms.normalization import Normalization
from geoexplora.weights.contract import Allowed, check_contract
from geoexplora.weights.load import build_encoder, load_encoder
from geoexplora.weights.source_weights import SourceWeights
from geoexplora.weights.spec import EncoderSpec


@dataclass(frozen=True)
class FittedEncoder:
    """An encoder for a given input.

    Attributes:
        encoder: a timm-style ViT in evaluation mode.
        spec: what it is; its ``source`` is the weights that it was fitted from.
    """

    encoder: Any
    spec: EncoderSpec


def fit_encoder(
    source: SourceWeights | None,
    *,
    sensor: str,
    bands: Sequence[str] = (),
    groups: Sequence[Sequence[str]] | None = None,
    normalization: Mapping[str, Any] | None = None,
    image_size: int | None = None,
    patch_size: int | None = None,
    antialias: bool | None = None,
    model: str | None = None,
    band_init: str = "rgb-by-name",
    patch_resize: str = "pseudo-inverse",
    allowed: Allowed | None = None,
    seed: int = 0,
) -> FittedEncoder:
    """The encoder as it is, or built for another input with the source's weights; of random weights without a source.

    Args:
        source: the source weights; None for random ones.
        sensor: name of the sensor that ``bands`` belong to.
        bands: input bands by name; none: the source's, of its sensor.
        groups: channel groups by band names; None: the source's where the bands are its own.
        normalization: ``Normalization.to_dict()`` of the bands; None: the source's.
        image_size: image side in pixels; None: the source's.
        patch_size: patch side in pixels; None: the source's.
        antialias: antialiased resizing; None: the source's.
        model: architecture, where there is no source.
        band_init: how patch embeddings of new bands start.
        patch_resize: how patch embeddings change their patch size.
        allowed: differences in bands and normalization that may be.
        seed: of random weights.

    Raises:
        ConfigError: if the sizes do not fit each other.
        WeightsError: if the source cannot be used.
    """
    described = None if source is None else source.described()
    if described is not None:
        if not bands:
            sensor, bands = described.sensor, described.bands
        if not groups and (sensor, tuple(bands)) == (described.sensor, described.bands):
            groups = described.groups
    elif image_size is None or patch_size is None or normalization is None or not bands:
        raise ConfigError("an encoder of random weights needs its input", "Name bands, normalization and sizes.")
    allowed = allowed or Allowed()
    if source is not None and described is not None and _is_as_built(described, sensor, bands, groups, patch_size):
        values = described.normalization
        if normalization is not None:
            values = Normalization.from_dict(normalization).to_dict()
            wanted = replace(described, normalization=values)
            check_contract(str(source.path), described, wanted, told=source.told, allowed=allowed)
        encoder, spec = load_encoder(source)
        spec = _resize_input(encoder, replace(spec, normalization=values), image_size)
        # What is trained from here on comes on top of these weights, not of those that they once started from
        return FittedEncoder(
            encoder,
            replace(
                spec,
                source=source.record(),
                band_init=None,
                patch_resize=None,
                antialias=spec.antialias if antialias is None else antialias,
            ),
        )
    built = architecture(model or FROM_SOURCE, source, bool(groups), pretraining=False)
    own: Any = described  # where there is none, all is given
    spec = EncoderSpec.of(
        **of_architecture(built),
        image_size=image_size or own.image_size,
        patch_size=patch_size or own.patch_size,
        sensor=sensor,
        bands=bands,
        groups=groups,
        normalization=normalization or own.normalization,
        antialias=bool(described is not None and described.antialias if antialias is None else antialias),
        pool="mean" if described is None else described.pool,
    )
    new: Any
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        new = build_encoder(spec)
        if spec.groups is None:
            initialize_plain_encoder(new)
    state = load_source(
        new, None, spec, source,
        band_init=band_init, patch_resize=patch_resize, allowed=allowed, seed=seed,
    )  # fmt: skip
    spec = replace(spec, source=state["source"], band_init=state["band_init"], patch_resize=state["patch_resize"])
    return FittedEncoder(new.eval(), spec)


def _is_as_built(
    spec: EncoderSpec,
    sensor: str,
    bands: Sequence[str],
    groups: Sequence[Sequence[str]] | None,
    patch_size: int | None,
) -> bool:
    """Whether an encoder takes such images as it is, however they are normalized; None is its own."""
    asked = (sensor, tuple(bands), tuple(map(tuple, groups)) if groups else None, patch_size or spec.patch_size)
    return asked == (spec.sensor, spec.bands, spec.groups, spec.patch_size)


def _resize_input(encoder: Any, spec: EncoderSpec, image_size: int | None) -> EncoderSpec:
    """Give an encoder another image size, in place; returns its new description."""
    if image_size in {None, spec.image_size}:
        return spec
    assert image_size is not None
    if image_size % spec.patch_size:
        raise ConfigError(
            f"--image-size {image_size} is not a multiple of the encoder's patch size {spec.patch_size}",
            f"It was trained at {spec.image_size} pixels.",
        )
    encoder.set_input_size(img_size=(image_size, image_size))
    return spec.at_size(image_size)
