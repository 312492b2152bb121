"""``geoexplora export``: from a run, a file or an adapter to a file for another library."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from geoexplora.errors import ConfigError, WeightsError
from geoexplora.explora import is_adapter, read_adapter
from geoexplora.explora.adapter import load_adapted_encoder
from geoexplora.weights.exports.base import Content
from geoexplora.weights.exports.export import Export, check_request, export
from geoexplora.weights.exports.targets import Dtype, Format, Task
from geoexplora.weights.files import read_weights
from geoexplora.weights.load import load_encoder


def export_encoder(
    source: str | Path,
    form: Format,
    output: str | Path,
    *,
    base: str | Path | None = None,
    task: Task | None = None,
    dtype: Dtype = "float32",
) -> Export:
    """Export an encoder for another library: merged, plain, and checked by loading it there.

    Args:
        source: a run folder, a weights file or whatever else :func:`geoexplora.weights.files.read_weights` takes, or
            the folder of an adapter.
        form: ``timm``, ``torchgeo``, ``hf-dinov2``, ``satmae``, ``safetensors`` or ``onnx``.
        output: the file or folder to write; must not exist yet.
        base: the weights that an adapter was trained on; only for adapters.
        task: TorchGeo's task that the weights are for, ``classification`` by default; only with ``torchgeo``.
        dtype: type of the stored weights.

    Returns:
        What was exported.

    Raises:
        ConfigError: if the request contradicts itself.
        WeightsError: if the source cannot be used, or the format cannot hold it.
        RunError: if the output cannot be written.
    """
    check_request(form, output, task, dtype)
    return export(_content(source, base), form, output, task=task, dtype=dtype)


def _content(source: str | Path, base: str | Path | None) -> Content:
    folder = Path(source)
    if is_adapter(folder):
        return _adapted(folder, base)
    if base is not None:
        raise ConfigError(
            f"--base names the weights that an adapter was trained on, but {source} is no adapter of this package",
            "Leave out --base, or name the adapter/ of a run.",
        )
    weights = read_weights(source)
    encoder, spec = load_encoder(weights)
    if not weights.told and spec.source is None:
        spec = replace(spec, source=weights.record())
    return Content(
        spec, encoder.state_dict(), weights.decoder_tensors, weights.decoder, weights.step, weights.trained,
        weights.assumed,
    )  # fmt: skip


def _adapted(folder: Path, base: str | Path | None) -> Content:
    if base is None:
        recorded = read_adapter(folder)[0].source or {}
        if not recorded:
            raise WeightsError(
                f"{folder} is an adapter of random weights, which no file holds", "Export the run it belongs to."
            )
        raise WeightsError(
            f"{folder} is an adapter: it holds what was trained, without the weights that it adapts",
            f"Name them by --base: {recorded.get('name')}, sha256 {recorded.get('sha256')}.",
        )
    encoder, spec = load_adapted_encoder(folder, base)
    return Content(spec, encoder.state_dict())
