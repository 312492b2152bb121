"""Loading weights into models: strict, with every tensor accounted for."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from geoexplora.errors import WeightsError
from geoexplora.registry import CUSTOM, FROM_SOURCE
from geoexplora.weights.adapt import Adaptation, adapt_decoder, adapt_encoder
from geoexplora.weights.contract import Allowed, check_contract
from geoexplora.weights.files import read_weights
from geoexplora.weights.report import LoadReport
from geoexplora.weights.source_weights import SourceWeights
from geoexplora.weights.spec import EncoderSpec
from geoexplora.weights.write import not_finite

log = logging.getLogger(__name__)


_FLOATS = {torch.float32, torch.float16, torch.bfloat16, torch.float64}

_STYLE = ("layer_scale", "registers", "swiglu", "mlp_width")
_GROUP_STYLE = ("channel_width", "class_token_encoding")


def build_encoder(spec: EncoderSpec, **options: Any) -> nn.Module:
    """Build the encoder that a description describes, with timm's initial weights.

    Args:
        spec: what to build.
        options: further arguments of the model that change no weights, such as ``drop_path_rate``.

    Raises:
        WeightsError: if timm does not know the model or refuses its arguments.
    """
    importlib.import_module("geoexplora.models")  # registers the group-channel ViTs with timm
    try:
        return timm.create_model(spec.timm_name, **spec.timm_args, **options)
    except (RuntimeError, TypeError, ValueError) as problem:
        raise WeightsError(
            f"timm {timm.__version__} cannot build {spec.timm_name} with {dict(spec.timm_args)}: {problem}",
            "The file may come from a newer version of geoexplora or timm: update both.",
        ) from problem


def load_encoder(source: str | Path | SourceWeights) -> tuple[nn.Module, EncoderSpec]:
    """Read an encoder and build it, ready for features.

    Weights in single precision stay mapped from their file (copy on write): memory holds them once, when they are used.

    Args:
        source: what :func:`geoexplora.weights.files.read_weights` takes or returns.

    Returns:
        The encoder in evaluation mode, in single precision, and its description.

    Raises:
        WeightsError: if the file cannot be used or does not tell its architecture.
    """
    weights = source if isinstance(source, SourceWeights) else read_weights(source)
    spec = weights.described()
    with torch.device("meta"):
        model = build_encoder(spec)
    load_into(model, weights, spec=spec, assign=True)
    return model.eval(), spec


def load_into(
    model: nn.Module,
    source: SourceWeights | Mapping[str, Tensor],
    *,
    spec: EncoderSpec | None = None,
    policy: str = "rgb-by-name",
    patch_resize: str = "pseudo-inverse",
    allowed: Allowed | None = None,
    allow_missing: Iterable[str] = (),
    allow_unexpected: Iterable[str] = (),
    generator: torch.Generator | None = None,
    assign: bool = False,
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
        patch_resize: how patch embeddings change their patch size, a name in ``convert.PATCH_RESIZES``.
        allowed: differences in bands and normalization that may be; none by default.
        allow_missing: names or patterns (``head.*``) of tensors that the source may lack.
        allow_unexpected: names or patterns of tensors that the model may lack.
        generator: source of randomness for the policy ``random``.
        assign: make the source's tensors (in single precision) the model's own instead of copying into them, for
            models on the meta device; every tensor of the model must then come from the source.

    Returns:
        What became of every tensor.

    Raises:
        WeightsError: if nothing matches, a tensor is missing, unexpected, of another shape or not finite, the
            channel groups differ, the bands cannot be converted, or bands or normalization differ from those that the
            weights were trained with; the model is then unchanged.
        ConfigError: for an unknown policy.
    """
    if not isinstance(source, SourceWeights):
        source = SourceWeights(Path("the state dict"), "state dict", spec, dict(source))
    tensors, described, label = source.encoder_tensors, source.spec, str(source.path)
    _check_finite(label, tensors)
    if described is not None and spec is not None:
        _check_architecture(label, described, spec)
        check_contract(label, described, spec, told=source.told, allowed=allowed or Allowed())
    adaptation = adapt_encoder(
        model, tensors, described, spec, policy, generator, label=label, patch_resize=patch_resize
    )
    report = _finish(
        model, tensors, adaptation, label, described, allow_missing, allow_unexpected, source.converted, assign
    )
    return replace(report, left_out=source.left_out, assumed=source.assumed)


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
    made: Mapping[str, str] | None = None,
    assign: bool = False,
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
        raise WeightsError(
            f"{label} does not fit the model: {problems}",
            "It is another kind of vision transformer, has other sizes, or is damaged. In Python,"
            " geoexplora.weights.load_into(..., allow_missing=[...], allow_unexpected=[...]) allows tensors by name.",
        )
    if assign:
        loaded = {name: nn.Parameter(value.float()) for name, value in loaded.items()}
    model.load_state_dict(loaded, strict=False, assign=assign)
    made = {name: how for name, how in (made or {}).items() if name in matched}
    report = LoadReport(
        tuple(name for name in matched if name not in made), made | adaptation.converted, adaptation.resampled,
        adaptation.kept, tuple(missing), tuple(unexpected), band_init=adaptation.band_init,
        patch_resize=adaptation.patch_resize if any("patch_embed" in name for name in adaptation.resampled) else None,
    )  # fmt: skip
    log.debug("loaded %s: %s", label, report.summary().replace("\n", "; "))
    return report


def _check_finite(label: str, tensors: Mapping[str, Tensor]) -> None:
    if strange := [name for name, value in tensors.items() if value.dtype not in _FLOATS or value.is_meta]:
        kinds = ", ".join(sorted({str(tensors[name].dtype).removeprefix("torch.") for name in strange}))
        raise WeightsError(
            f"{len(strange)} tensors of {label} are of type {kinds}: {_some(strange)}",
            "Weights must be float32, float16, bfloat16 or float64: convert them with the code that made them.",
        )
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
    grouped = source.groups is not None and target.groups is not None
    names = [*_STYLE, *_GROUP_STYLE] if grouped else _STYLE
    differing = [
        f"{name.replace('_', ' ')} {getattr(source.style, name)} instead of {getattr(target.style, name)}"
        for name in names
        if getattr(source.style, name) != getattr(target.style, name)
    ]
    if differing:
        raise WeightsError(
            f"{label} is a vision transformer of another style than the model: {', '.join(differing)}",
            "Build the model with the style of the weights: EncoderSpec.of(..., style=source.spec.style).",
        )


def _remedy(described: EncoderSpec | None) -> str:
    model = FROM_SOURCE if described is None or described.model == CUSTOM else described.model
    return f"Build the model with the sizes of the weights: --model {model}."


def _allowed(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:5]) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "")
