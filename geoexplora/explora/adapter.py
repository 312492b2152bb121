"""Delta_T on disk: peft's LoRA files, and beside them every other tensor that was trained. Nothing frozen is stored.

``adapter_config.json`` and ``adapter_model.safetensors`` open with stock ``peft.PeftModel.from_pretrained`` on the
same ViT with ``attn_layer=SplitAttention``; ``trained.safetensors`` holds whole blocks, norms, class token and
embeddings under stock timm names (queries, keys and values fused).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from geoexplora.errors import WeightsError
from geoexplora.explora.apply import ADAPTER, apply_explora
from geoexplora.explora.config import ExploraConfig
from geoexplora.explora.merge import merge_lora
from geoexplora.weights.atomic import atomic_path, write_text
from geoexplora.weights.contract import Allowed
from geoexplora.weights.files import read_weights
from geoexplora.weights.load import build_encoder, load_into
from geoexplora.weights.source_weights import SourceWeights
from geoexplora.weights.spec import EncoderSpec

TRAINED_FILE = "trained.safetensors"
LORA_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
_PEFT_PREFIX = "base_model.model."


def trained_names(encoder: nn.Module) -> frozenset[str]:
    """Names of what is trained of an encoder."""
    return frozenset(name for name, parameter in encoder.named_parameters() if parameter.requires_grad)


def adapter_tensors(
    encoder: Any, trained_parameters: frozenset[str] | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split the trained tensors of an encoder.

    Args:
        encoder: a ViT after ``apply_explora``.
        trained_parameters: names of what was trained, where the encoder is an average that takes no gradients itself.

    Returns:
        LoRA tensors under peft's names, and all other trained tensors under their own.
    """
    names = trained_names(encoder) if trained_parameters is None else trained_parameters
    lora, trained = {}, {}
    for name, parameter in encoder.named_parameters():
        if name not in names:
            continue
        tensor = parameter.detach().cpu().contiguous()
        if ".lora_" in name:
            lora[_PEFT_PREFIX + name.replace(f".{ADAPTER}.", ".")] = tensor
        else:
            trained[name] = tensor
    return lora, trained


def save_adapter(
    folder: Path,
    encoder: Any,
    config: ExploraConfig,
    spec: EncoderSpec,
    trained_parameters: frozenset[str] | None = None,
) -> None:
    """Write what was trained.

    Args:
        folder: the adapter's folder, made if need be.
        encoder: a ViT after ``apply_explora``.
        config: what was trained; stored in the header.
        spec: the encoder's description; its ``source`` says which weights the adapter fits.
        trained_parameters: see ``adapter_tensors``.

    Raises:
        RunError: if it cannot be written.
    """
    lora, trained = adapter_tensors(encoder, trained_parameters)
    header = spec.to_metadata() | {"geoexplora": "adapter", "explora": json.dumps(vars(config))}
    if lora:
        settings = encoder.peft_config[ADAPTER].to_dict()
        settings = {key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()}
        write_text(folder / CONFIG_FILE, json.dumps(settings | {"inference_mode": True}, indent=2, default=str) + "\n")
        with atomic_path(folder / LORA_FILE) as temporary:
            save_file(lora, temporary, {"format": "pt"})
    with atomic_path(folder / TRAINED_FILE) as temporary:
        save_file(trained, temporary, header)


def is_adapter(folder: Path) -> bool:
    """Whether a folder is an adapter that ``save_adapter`` wrote."""
    with suppress(OSError):  # a folder that may not be read is told when it is
        return (folder / TRAINED_FILE).is_file()
    return False


def read_adapter(folder: Path) -> tuple[EncoderSpec, ExploraConfig, dict[str, Tensor]]:
    """Read an adapter.

    Args:
        folder: an adapter's folder.

    Returns:
        The description of the adapted encoder, what was trained, and the tensors under the names that they have in an
        encoder after ``apply_explora``.

    Raises:
        WeightsError: if a file is missing or damaged.
    """
    try:
        with safe_open(folder / TRAINED_FILE, "pt") as file:
            header = file.metadata() or {}
        tensors = load_file(folder / TRAINED_FILE)
        lora = load_file(folder / LORA_FILE) if (folder / LORA_FILE).exists() else {}
    except (OSError, SafetensorError) as problem:
        raise WeightsError(f"cannot read the adapter {folder}: {problem}", "Name the adapter/ of a run.") from problem
    if "explora" not in header:
        raise WeightsError(f"{folder / TRAINED_FILE} does not say what was trained", "Name the adapter/ of a run.")
    spec = EncoderSpec.from_metadata(header)
    try:
        settings: dict[str, Any] = json.loads(header["explora"])
        settings = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
        config = ExploraConfig(**settings)
    except (ValueError, TypeError) as problem:
        raise WeightsError(f"{folder / TRAINED_FILE}: damaged header ({problem})", "Take another copy.") from problem
    for name, tensor in lora.items():
        stem, _, kind = name.removeprefix(_PEFT_PREFIX).rpartition(".")
        tensors[f"{stem}.{ADAPTER}.{kind}"] = tensor
    return spec, config, tensors


def load_adapter(folder: Path, encoder: Any, source: SourceWeights | None) -> ExploraConfig:
    """Restore what was trained onto the source weights, in place.

    Args:
        folder: an adapter's folder.
        encoder: a plain ViT of the same architecture with the source weights loaded.
        source: those weights; ``None`` if the adapter was trained on random ones.

    Returns:
        What was trained; the encoder is as after ``apply_explora`` and training.

    Raises:
        WeightsError: if a file is missing or damaged, the adapter was trained on other weights than these (by their
            digest), or its tensors are not exactly those of the encoder.
    """
    spec, config, tensors = read_adapter(folder)
    _check_base(folder, spec, source)
    _restore(folder, encoder, config, tensors)
    return config


def load_adapted_encoder(folder: Path, base: str | Path) -> tuple[nn.Module, EncoderSpec]:
    """Put source weights and an adapter together: W_S + Delta_T.

    Args:
        folder: an adapter's folder.
        base: the weights that it was trained on, in whatever form ``read_weights`` takes.

    Returns:
        The encoder, merged and plain, in evaluation mode, and its description.

    Raises:
        WeightsError: as ``load_adapter``, or if the base cannot be read.
    """
    spec, config, tensors = read_adapter(folder)
    source = read_weights(base)
    _check_base(folder, spec, source)
    encoder: Any = build_encoder(spec)
    # Patch embeddings of new bands were trained, so the adapter brings them whatever they start from here
    load_into(
        encoder, source, spec=spec, policy=spec.band_init or "mean", patch_resize=spec.patch_resize or "pseudo-inverse",
        allowed=Allowed(normalization=True, bands=True),
    )  # fmt: skip
    _restore(folder, encoder, config, tensors)
    return merge_lora(encoder).eval(), spec


def _check_base(folder: Path, spec: EncoderSpec, source: SourceWeights | None) -> None:
    wanted = (spec.source or {}).get("sha256")
    given = None if source is None else source.sha256
    if wanted == given:
        return
    if wanted is None:
        raise WeightsError(f"the adapter {folder} was trained on random weights, not on a file's", "It fits no other.")
    raise WeightsError(
        f"the adapter {folder} was trained on other weights: {(spec.source or {}).get('name')} (sha256 {wanted}), not"
        f" on {'random ones' if source is None else f'{source.path} (sha256 {given})'}",
        "Name the weights that it was trained on, byte for byte the same file.",
    )


def _restore(folder: Path, encoder: Any, config: ExploraConfig, tensors: Mapping[str, Tensor]) -> None:
    apply_explora(encoder, config)
    wanted = {name: parameter for name, parameter in encoder.named_parameters() if parameter.requires_grad}
    wrong = [name for name in wanted if name not in tensors or tensors[name].shape != wanted[name].shape]
    wrong += [name for name in tensors if name not in wanted]
    if wrong:
        raise WeightsError(
            f"the adapter {folder} does not fit the encoder: {len(wrong)} tensors differ, such as {wrong[0]}",
            "Build the encoder that the adapter was trained on.",
        )
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(tensors[name])
