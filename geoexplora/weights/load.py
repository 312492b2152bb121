"""Loading weights into models: strict, with every tensor accounted for."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from geoexplora.errors import WeightsError
from geoexplora.weights.adapt import Adaptation, adapt_decoder, adapt_encoder
from geoexplora.weights.files import SourceWeights, read_weights
from geoexplora.weights.report import LoadReport
from geoexplora.weights.spec import EncoderSpec
from geoexplora.weights.write import not_finite

log = logging.getLogger(__name__)


def build_encoder(spec: EncoderSpec) -> nn.Module:
    """Build the encoder that a description describes, with timm's initial weights.

    Raises:
        WeightsError: if timm does not know the model or refuses its arguments.
    """
    importlib.import_module("geoexplora.models")  # registers the group-channel ViTs with timm
    try:
        return timm.create_model(spec.timm_name, **spec.timm_args)
    except (RuntimeError, TypeError, ValueError) as problem:
        raise WeightsError(
            f"timm {timm.__version__} cannot build {spec.timm_name} with {dict(spec.timm_args)}: {problem}",
            "The file may come from a newer version of geoexplora or timm: update both.",
        ) from problem


def load_encoder(path: str | Path) -> tuple[nn.Module, EncoderSpec]:
    """Read an encoder and build it, ready for features.

    Args:
        path: what :func:`geoexplora.weights.files.read_weights` takes.

    Returns:
        The encoder in evaluation mode, in single precision, and its description.

    Raises:
        WeightsError: if the file cannot be used or does not tell its architecture.
    """
    source = read_weights(path)
    if source.spec is None:
        raise WeightsError(
            f"{source.path} ({source.format}) does not tell its architecture",
            "Its sizes are of no model known here; see geoexplora.registry.MODELS.",
        )
    model = build_encoder(source.spec)
    load_into(model, source, spec=source.spec)
    return model.eval(), source.spec


def load_into(
    model: nn.Module,
    source: SourceWeights | Mapping[str, Tensor],
    *,
    spec: EncoderSpec | None = None,
    policy: str = "rgb-by-name",
    allow_missing: Iterable[str] = (),
    allow_unexpected: Iterable[str] = (),
    generator: torch.Generator | None = None,
) -> LoadReport:
    """Load an encoder's weights into a plain or group-channel ViT.

    Patch kernels and position encodings are resampled to the model's sizes, and patch embeddings made for its bands.
    A group-channel model takes the source's position encoding where the widths are the same, and otherwise keeps its
    own sin-cos one. Everything else must match by name and shape.

    Args:
        model: the model, with fused ``qkv`` as in stock timm.
        source: weights as read, or a state dict under timm's names (then for the bands of ``spec``).
        spec: the model's description; needed to make patch embeddings for other bands.
        policy: how the patch embeddings of new bands start, a name in ``geoexplora.weights.convert.BAND_POLICIES``.
        allow_missing: names or patterns (``head.*``) of tensors that the source may lack.
        allow_unexpected: names or patterns of tensors that the model may lack.
        generator: source of randomness for the policy ``random``.

    Returns:
        What became of every tensor.

    Raises:
        WeightsError: if nothing matches, a tensor is missing, unexpected, of another shape or not finite, the
            channel groups differ, or the bands cannot be converted; the model is then unchanged.
        ConfigError: for an unknown policy.
    """
    if isinstance(source, SourceWeights):
        tensors, described, label = source.encoder_tensors, source.spec, str(source.path)
    else:
        tensors, described, label = dict(source), spec, "the state dict"
    _check_finite(label, tensors)
    if described is not None and spec is not None:
        _check_architecture(label, described, spec)
    adaptation = adapt_encoder(model, tensors, described, spec, policy, generator, label=label)
    return _finish(model, tensors, adaptation, label, described, allow_missing, allow_unexpected)


def load_decoder_into(
    decoder: nn.Module,
    source: SourceWeights,
    *,
    spec: EncoderSpec | None = None,
    allow_missing: Iterable[str] = (),
    allow_unexpected: Iterable[str] = (),
) -> LoadReport:
    """Load the decoder of a masked autoencoder.

    The output projections start anew (are kept as initialized) where bands, channel groups or patch size differ; the
    position encoding is resampled where its width is the same and kept otherwise.

    Args:
        decoder: the decoder; its names are Meta's without ``decoder_``.
        source: weights with a decoder.
        spec: the description of the encoder it belongs to.
        allow_missing: names or patterns of the decoder's tensors that the source may lack.
        allow_unexpected: names or patterns (without ``decoder_``) of tensors that the decoder may lack.

    Returns:
        What became of every tensor, under the decoder's names.

    Raises:
        WeightsError: if the source has no decoder, or as in :func:`load_into`.
    """
    tensors = {name.removeprefix("decoder_"): value for name, value in source.decoder_tensors.items()}
    label = f"the decoder of {source.path}"
    if not tensors:
        raise WeightsError(
            f"{source.path} has no decoder",
            "Name a run folder, or Meta's mae_visualize_vit_*.pth (mae_pretrain_vit_*.pth has the encoder only).",
        )
    _check_finite(label, tensors)
    adaptation = adapt_decoder(decoder, tensors, source.spec, spec)
    return _finish(decoder, tensors, adaptation, label, None, allow_missing, allow_unexpected)


def _finish(
    model: nn.Module,
    source: Mapping[str, Tensor],
    adaptation: Adaptation,
    label: str,
    described: EncoderSpec | None,
    allow_missing: Iterable[str],
    allow_unexpected: Iterable[str],
) -> LoadReport:
    """Match what needed no adaptation, refuse what does not fit, load."""
    target: dict[str, Any] = model.state_dict()
    loaded: dict[str, Tensor] = {}
    matched, conflicts = [], []
    untouched = {name: value for name, value in source.items() if name not in adaptation.used | adaptation.kept.keys()}
    for name, value in (adaptation.tensors | untouched).items():
        if name not in target:
            continue
        if value.shape != target[name].shape:
            conflicts.append(f"{name} ({tuple(value.shape)}, the model has {tuple(target[name].shape)})")
            continue
        loaded[name] = value
        if name not in adaptation.tensors:
            matched.append(name)
    if not loaded and not conflicts:
        raise WeightsError(
            f"nothing in {label} fits the model: it has {_some(source)}, the model has {_some(target)}",
            "Name the weights of a vision transformer.",
        )
    settled = {*loaded, *adaptation.kept, *(entry.split(" ", 1)[0] for entry in conflicts)}
    missing = [name for name in target if name not in settled]
    unexpected = [name for name in untouched if name not in target]
    not_allowed = {
        "of another shape": conflicts,
        "missing": [name for name in missing if not _allowed(name, allow_missing)],
        "unexpected": [name for name in unexpected if not _allowed(name, allow_unexpected)],
    }
    if any(not_allowed.values()):
        problems = "; ".join(f"{len(names)} {kind}: {_some(names)}" for kind, names in not_allowed.items() if names)
        raise WeightsError(f"{label} does not fit the model: {problems}", _remedy(described))
    model.load_state_dict(loaded, strict=False)
    report = LoadReport(
        tuple(matched), adaptation.converted, adaptation.resampled, adaptation.kept,
        tuple(missing), tuple(unexpected), adaptation.band_init,
    )  # fmt: skip
    log.debug("loaded %s: %s", label, report.summary().replace("\n", "; "))
    return report


def _check_finite(label: str, tensors: Mapping[str, Tensor]) -> None:
    if bad := not_finite(tensors):
        raise WeightsError(
            f"{len(bad)} tensors of {label} hold NaN or Inf: {_some(bad)}",
            "The training that made it diverged or the file is damaged: use another checkpoint or copy.",
        )


def _check_architecture(label: str, source: EncoderSpec, target: EncoderSpec) -> None:
    differing = [
        f"{name} {getattr(source, name)} instead of {getattr(target, name)}"
        for name in ("width", "depth", "heads")
        if getattr(source, name) != getattr(target, name)
    ]
    if differing:  # heads do not show in the shapes of the tensors
        raise WeightsError(
            f"{label} is a {source.model}, the model a {target.model}: {', '.join(differing)}", _remedy(source)
        )
    if (source.sensor, source.bands) == (target.sensor, target.bands):
        differing = [
            name for name in ("normalization", "units") if not _same(getattr(source, name), getattr(target, name))
        ]
        if differing:
            log.warning("%s was trained with other %s than now asked for", label, " and ".join(differing))


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_same(one[name], other[name]) for name in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return list(one) == list(other)
    return bool(one == other)


def _remedy(described: EncoderSpec | None) -> str:
    if described is None:
        return "Build the model with the sizes of the weights, or allow single tensors by name."
    return f"Build the model with the sizes of the weights: --model {described.model}."


def _allowed(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:5]) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "")
