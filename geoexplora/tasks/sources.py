"""The architecture that source weights call for, and loading them into an encoder and its decoder, with a record."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from torch import nn

from geoexplora.datamodules.sampling import generator
from geoexplora.errors import ConfigError
from geoexplora.registry import FROM_SOURCE, Style
from geoexplora.weights.contract import Allowed
from geoexplora.weights.load import load_decoder_into, load_into
from geoexplora.weights.source_weights import SourceWeights
from geoexplora.weights.spec import EncoderSpec

log = logging.getLogger(__name__)


def architecture(
    model: str, source: SourceWeights | None, grouped: bool, *, pretraining: bool = True
) -> dict[str, Any]:
    """What to build: the model asked for, in the style of the source (LayerScale, registers, ...).

    Args:
        model: a name in ``geoexplora.registry.MODELS``, or ``source`` for the source's sizes.
        source: the source weights; ``None`` for random ones.
        grouped: whether the model has channel groups.
        pretraining: whether the objective needs every token normalized; else the final norm stays where it is.

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
    style = replace(spec.style, pooled_norm=spec.style.pooled_norm and not pretraining)
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


def _same_size(decoder: Any, source: SourceWeights) -> bool:
    known = source.decoder or {}
    sizes = {
        "width": decoder.embed.out_features,
        "depth": len(decoder.blocks),
        "heads": decoder.blocks[0].attn.num_heads,
    }
    return all(known.get(name, size) == size for name, size in sizes.items())
