"""Reading weights: what format a file has is recognised from its keys and header, never from its name."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from geoexplora.errors import WeightsError
from geoexplora.weights.opening import Opened, is_hub_folder, open_file, open_hub_folder
from geoexplora.weights.reading import OWN_DECODER, read_opened
from geoexplora.weights.source_weights import ENCODER_FILE, SourceWeights
from geoexplora.weights.sources.locate import Located, locate

log = logging.getLogger(__name__)

DECODER_FILE, HEADS_FILE = "decoder.safetensors", "heads.safetensors"
ADAPTER_FILE = "adapter_config.json"


def read_weights(source: str | Path, *, heads: int | None = None) -> SourceWeights:
    """Read a weights file, a run folder, or what a name or address stands for.

    Args:
        source: a file of any known format, a run folder (with its ``decoder.safetensors`` or ``heads.safetensors`` if
            there is one), a Hugging Face folder, an ``https://`` or ``hf://`` address, a shortcut such as
            ``dinov2-vitl14``, TorchGeo's name of a weight enum, or a timm model's name.
        heads: attention heads, which do not show in tensors; needed for unusual sizes in files that do not tell.

    Returns:
        The weights, on the CPU.

    Raises:
        WeightsError: if it is missing, cannot be fetched, is damaged, needs code to run, or is of no known format.
    """
    try:
        return _read(locate(source), heads)
    except OSError as problem:
        raise WeightsError(
            f"cannot read {source}: {problem.strerror or problem}", "Check its permissions."
        ) from problem


def _read(located: Located, heads: int | None) -> SourceWeights:
    path = located.path
    if not path.is_dir():
        weights = _source(located, open_file(path), heads)
        if weights.format == OWN_DECODER:
            raise WeightsError(f"{path} is the decoder of a run", "Name the run's folder, or its encoder.safetensors.")
        return weights
    if (path / ENCODER_FILE).is_file():
        return _read_run(located, path)
    if (path / ADAPTER_FILE).is_file():
        raise WeightsError(
            f"{path} is an adapter: it holds what was trained, without the weights that it adapts",
            f"Merge it first: geoexplora export {path} --base FILE --format safetensors --output NEW.safetensors.",
        )
    if is_hub_folder(path):
        return _source(located, open_hub_folder(path), heads)
    raise WeightsError(
        f"{path} has no {ENCODER_FILE}",
        "Name a weights file or a run folder (a run gets its encoder with its first checkpoint), or a Hugging Face"
        " folder with config.json and model.safetensors.",
    )


def _read_run(located: Located, folder: Path) -> SourceWeights:
    encoder = _source(located, open_file(folder / ENCODER_FILE))
    if (folder / HEADS_FILE).is_file():
        return replace(encoder, heads_file=folder / HEADS_FILE)
    if not (folder / DECODER_FILE).is_file():
        return encoder
    decoder = _source(located, open_file(folder / DECODER_FILE))
    if encoder.step != decoder.step:
        log.warning("%s: encoder of step %s beside decoder of step %s", folder, encoder.step, decoder.step)
    return replace(encoder, tensors={**encoder.tensors, **decoder.tensors}, decoder=decoder.decoder)


def _source(located: Located, opened: Opened, heads: int | None = None) -> SourceWeights:
    weights = read_opened(opened, located.hints, heads)
    return replace(weights, name=located.name, address=located.address, licence=located.licence)


def read_heads(source: SourceWeights) -> dict[str, Tensor]:
    """What DINOv2's objective keeps beside an encoder.

    Args:
        source: the encoder's weights.

    Returns:
        ``mask_token``, and of a run of this package the projection heads, ``dino.*`` and, if separate, ``ibot.*``;
        empty if there is nothing.

    Raises:
        WeightsError: if the file is damaged.
    """
    if source.heads_file is not None:
        return dict(open_file(source.heads_file).content)
    return {} if source.mask_token is None else {"mask_token": source.mask_token}
