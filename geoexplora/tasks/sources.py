"""Loads source weights into the encoder and decoder of a pre-training, and says what came of it."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from geoexplora.datamodules.sampling import generator
from geoexplora.weights.files import SourceWeights, read_weights
from geoexplora.weights.load import load_decoder_into, load_into
from geoexplora.weights.spec import EncoderSpec

log = logging.getLogger(__name__)


def load_source(
    encoder: nn.Module, decoder: nn.Module, spec: EncoderSpec, init: str | None, band_init: str, seed: int
) -> dict[str, Any]:
    """Load source weights, in place.

    Args:
        encoder: the ViT to start from them.
        decoder: the decoder; it takes the source's if there is one of its size, and keeps its own weights otherwise.
        spec: what the encoder is.
        init: a weights file or run folder; ``None`` for random weights.
        band_init: how patch embeddings of new bands start.
        seed: of the policy ``random``.

    Returns:
        Plain JSON types, for ``run.json``: ``source`` (record of the file, or ``None``), ``band_init`` (the policy, if
        it was needed), ``new_bands``, ``decoder_loaded``, ``new_outputs`` (the decoder's output projections are new),
        and the loader's reports ``encoder`` and ``decoder``.

    Raises:
        WeightsError: if the source cannot be used.
    """
    state: dict[str, Any] = {
        "source": None,
        "band_init": None,
        "new_bands": True,
        "decoder_loaded": False,
        "new_outputs": True,
        "encoder": None,
        "decoder": None,
    }
    if init is None:
        return state
    source = read_weights(init)
    report = load_into(encoder, source, spec=spec, policy=band_init, generator=generator(seed))
    state |= {
        "source": source.record(),
        "band_init": report.band_init,
        "new_bands": source.spec is None or (source.spec.sensor, source.spec.bands) != (spec.sensor, spec.bands),
        "encoder": report.to_dict(),
    }
    log.info("encoder from %s (%s): %s", source.path, source.format, report.summary())
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
