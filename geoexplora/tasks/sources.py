"""Loads source weights into the encoder and decoder of a pre-training, and says what came of it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from geoexplora.datamodules.sampling import generator
from geoexplora.errors import ConfigError
from geoexplora.models.initialization import initialize_plain_encoder
from geoexplora.registry import FROM_SOURCE, Style
from geoexplora.weights.contract import Allowed
from geoexplora.weights.load import build_encoder, load_decoder_into, load_encoder, load_into
from geoexplora.weights.source_weights import SourceWeights
from geoexplora.weights.spec import EncoderSpec

log = logging.getLogger(__name__)


def architecture(model: str, source: SourceWeights | None, grouped: bool) -> dict[str, Any]:
    """What to build: the model asked for, in the style of the source (LayerScale, registers, ...).

    Args:
        model: a name in ``geoexplora.registry.MODELS``, or ``source`` for the source's sizes.
        source: the source weights; ``None`` for random ones.
        grouped: whether the model has channel groups.

    Returns:
        Plain JSON types: ``model``, ``sizes`` and ``style``; see ``of_architecture``.

    Raises:
        ConfigError: if the source's sizes are wanted and there is no source.
        WeightsError: if the source does not tell what it is.
    """
    if source is None:
        if model == FROM_SOURCE:
            raise ConfigError("--model source needs source weights", "Name them by --init, or name a model.")
        return {"model": model, "sizes": None, "style": {}}
    spec = source.described()
    style = replace(spec.style, pooled_norm=False)  # pre-training needs every token normalized
    if not grouped:
        style = replace(style, channel_width=None, class_token_encoding=False)
    name = spec.model if model == FROM_SOURCE else model
    return {"model": name, "sizes": [spec.width, spec.depth, spec.heads], "style": style.to_dict()}


def of_architecture(stored: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments for ``EncoderSpec.of`` of what ``architecture`` returned."""
    return stored | {"style": Style.from_dict(stored["style"])}


def load_source(
    encoder: nn.Module,
    decoder: nn.Module | None,
    spec: EncoderSpec,
    source: SourceWeights | None,
    *,
    band_init: str,
    patch_resize: str,
    allowed: Allowed,
    seed: int,
) -> dict[str, Any]:
    """Load source weights, in place.

    Args:
        encoder: the ViT to start from them.
        decoder: the decoder; it takes the source's if there is one of its size, and keeps its own weights otherwise.
            ``None`` where the objective has none.
        spec: what the encoder is.
        source: the source weights; ``None`` for random ones.
        band_init: how patch embeddings of new bands start.
        patch_resize: how patch embeddings change their patch size.
        allowed: differences in bands and normalization that may be.
        seed: of the policy ``random``.

    Returns:
        Plain JSON types, for ``run.json``: ``source`` (record of the file, or ``None``), ``band_init`` and
        ``patch_resize`` (if they were needed), ``new_bands``, ``decoder_loaded``, ``new_outputs`` (the decoder's output
        projections are new), and the loader's reports ``encoder`` and ``decoder``.

    Raises:
        WeightsError: if the source cannot be used.
    """
    state: dict[str, Any] = {
        "source": None,
        "band_init": None,
        "patch_resize": None,
        "new_bands": True,
        "decoder_loaded": False,
        "new_outputs": True,
        "encoder": None,
        "decoder": None,
    }
    if source is None:
        return state
    described = source.described()
    report = load_into(
        encoder, source, spec=spec, policy=band_init, patch_resize=patch_resize, allowed=allowed,
        generator=generator(seed),
    )  # fmt: skip
    state |= {
        "source": source.record(),
        "band_init": report.band_init,
        "patch_resize": report.patch_resize,
        "new_bands": (described.sensor, set(described.bands)) != (spec.sensor, set(spec.bands)),
        "encoder": report.to_dict(),
    }
    log.info("encoder from %s (%s): %s", source.path, source.format, report.summary())
    if decoder is None:
        return state
    if not source.decoder_tensors:
        log.info("the source has no decoder: it starts from random weights and is trained whole")
    elif not _same_size(decoder, source):
        log.warning(
            "the source's decoder has another size (%s): it starts from random weights and is trained whole. "
            "Set --decoder-width, --decoder-depth and --decoder-heads to take it over.",
            ", ".join(f"{name} {value}" for name, value in (source.decoder or {}).items()),
        )
    else:
        report = load_decoder_into(decoder, source, spec=spec)
        new = any(name.startswith("pred.") for name in report.kept)
        state |= {"decoder_loaded": True, "new_outputs": new, "decoder": report.to_dict()}
        log.info("decoder from the same source: %s", report.summary())
    return state


@dataclass(frozen=True)
class FittedEncoder:
    """An encoder for a given input.

    Attributes:
        encoder: a timm-style ViT in evaluation mode.
        spec: what it is.
    """

    encoder: Any
    spec: EncoderSpec


def is_own_input(
    spec: EncoderSpec,
    *,
    bands: Sequence[str] | None,
    groups: Sequence[Sequence[str]] | None,
    patch_size: int | None,
    method: str | None,
) -> bool:
    """Whether an encoder was trained with an input like this one; a None or empty value is its own.

    Args:
        spec: what the encoder is.
        bands: names of the input bands.
        groups: channel groups by band names.
        patch_size: patch side in pixels.
        method: of the normalization.
    """
    asked: tuple[tuple[Any, Any], ...] = (
        (bands and tuple(bands), spec.bands),
        (groups and tuple(tuple(group) for group in groups), spec.groups),
        (patch_size, spec.patch_size),
        (method, spec.normalization.get("method")),
    )
    return all(wanted == own for wanted, own in asked if wanted)


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
        bands: input bands by name; none: the source's.
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
    method = None if normalization is None else normalization["method"]
    encoder: Any
    if (
        source is not None
        and described is not None
        and is_own_input(described, bands=bands, groups=groups, patch_size=patch_size, method=method)
    ):
        encoder, spec = load_encoder(source)
        return FittedEncoder(encoder, _resize_input(encoder, spec, image_size))
    if described is None and (image_size is None or patch_size is None or normalization is None or not bands):
        raise ConfigError("an encoder of random weights needs its input", "Name bands, normalization and sizes.")
    if groups is None and described is not None and described.bands == tuple(bands):
        groups = described.groups
    built = architecture(model or FROM_SOURCE, source, bool(groups))
    own: Any = described  # where there is none, all is given
    spec = EncoderSpec.of(
        **of_architecture(built),
        image_size=image_size or own.image_size,
        patch_size=patch_size or own.patch_size,
        sensor=sensor,
        bands=bands or own.bands,
        groups=groups,
        normalization=normalization or own.normalization,
        antialias=bool(described is not None and described.antialias if antialias is None else antialias),
        pool="mean" if described is None else described.pool,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = build_encoder(spec)
        if spec.groups is None:
            initialize_plain_encoder(encoder)
    state = load_source(
        encoder, None, spec, source,
        band_init=band_init, patch_resize=patch_resize, allowed=allowed or Allowed(), seed=seed,
    )  # fmt: skip
    spec = replace(spec, source=state["source"], band_init=state["band_init"], patch_resize=state["patch_resize"])
    return FittedEncoder(encoder.eval(), spec)


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


def _same_size(decoder: Any, source: SourceWeights) -> bool:
    known = source.decoder or {}
    sizes = {
        "width": decoder.embed.out_features,
        "depth": len(decoder.blocks),
        "heads": decoder.blocks[0].attn.num_heads,
    }
    return all(known.get(name, size) == size for name, size in sizes.items())
