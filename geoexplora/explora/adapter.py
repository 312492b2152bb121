"""Delta_T or Delta_task on disk: peft's files, and beside them every other trained tensor. Nothing frozen is stored.

``adapter_config.json`` and ``adapter_model.safetensors`` open with stock ``peft.PeftModel.from_pretrained`` on the
same ViT with ``attn_layer=SplitAttention``; ``trained.safetensors`` holds whole blocks, norms, class token and
embeddings under stock timm names (queries, keys and values fused). Its header says what was trained.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from geoexplora.errors import ConfigError, WeightsError
from geoexplora.explora.apply import apply_explora
from geoexplora.explora.config import ExploraConfig, FinetuneConfig
from geoexplora.explora.finetuning import apply_finetuning
from geoexplora.explora.injection import ADAPTER
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
_MAGNITUDE = "lora_magnitude_vector"
_CONFIGS: dict[str, type[ExploraConfig] | type[FinetuneConfig]] = {"explora": ExploraConfig, "finetune": FinetuneConfig}
"""What was trained, by its key in the header."""


def trained_names(encoder: nn.Module) -> frozenset[str]:
    """Names of what is trained of an encoder."""
    return frozenset(name for name, parameter in encoder.named_parameters() if parameter.requires_grad)


def adapter_tensors(
    encoder: Any, trained_parameters: frozenset[str] | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split the trained tensors of an encoder.

    Args:
        encoder: a ViT after ``apply_explora`` or ``apply_finetuning``.
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
            lora[_peft_name(name)] = tensor
        else:
            trained[name] = tensor
    return lora, trained


def save_adapter(
    folder: Path,
    encoder: Any,
    config: ExploraConfig | FinetuneConfig,
    spec: EncoderSpec,
    trained_parameters: frozenset[str] | None = None,
) -> None:
    """Write what was trained.

    Of AdaLoRA all singular values are stored, those taken away as zeros, so that stock peft gives the same output.

    Args:
        folder: the adapter's folder, made if need be.
        encoder: a ViT after ``apply_explora`` or ``apply_finetuning``.
        config: what was trained; stored in the header.
        spec: the encoder's description; its ``source`` says which weights the adapter fits.
        trained_parameters: see ``adapter_tensors``.

    Raises:
        ConfigError: if the encoder was fine-tuned by a method without adapters: all of it was trained, or nothing.
        RunError: if it cannot be written.
    """
    if isinstance(config, FinetuneConfig) and not config.has_adapters:
        raise ConfigError(f"method {config.method} has no adapter to store", "Store the encoder itself.")
    lora, trained = adapter_tensors(encoder, trained_parameters)
    kind = next(key for key, cls in _CONFIGS.items() if isinstance(config, cls))
    header = spec.to_metadata() | {"geoexplora": "adapter", kind: json.dumps(vars(config))}
    if lora:
        settings = encoder.peft_config[ADAPTER].to_dict()
        if "target_r" in settings:  # AdaLoRA's: its pattern tells peft which singular values a file leaves out
            settings["rank_pattern"] = None
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


def read_adapter(folder: Path) -> tuple[EncoderSpec, ExploraConfig | FinetuneConfig, dict[str, Tensor]]:
    """Read an adapter.

    Args:
        folder: an adapter's folder.

    Returns:
        The description of the adapted encoder, what was trained, and the tensors under the names that they have in an
        encoder after ``apply_explora`` or ``apply_finetuning``.

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
    kind = next((key for key in _CONFIGS if key in header), None)
    if kind is None:
        raise WeightsError(f"{folder / TRAINED_FILE} does not say what was trained", "Name the adapter/ of a run.")
    spec = EncoderSpec.from_metadata(header)
    try:
        settings: dict[str, Any] = json.loads(header[kind])
        settings = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
        config = _CONFIGS[kind](**settings)
    except (ValueError, TypeError) as problem:
        raise WeightsError(f"{folder / TRAINED_FILE}: damaged header ({problem})", "Take another copy.") from problem
    return spec, config, tensors | {_own_name(name): tensor for name, tensor in lora.items()}


def load_adapter(folder: Path, encoder: Any, source: SourceWeights | None) -> ExploraConfig | FinetuneConfig:
    """Restore what was trained onto the source weights, in place.

    Args:
        folder: an adapter's folder.
        encoder: a plain ViT of the same architecture with the source weights loaded.
        source: those weights; ``None`` if the adapter was trained on random ones.

    Returns:
        What was trained; the encoder is as after ``apply_explora`` or ``apply_finetuning`` and training.

    Raises:
        WeightsError: if a file is missing or damaged, the adapter was trained on other weights than these (by their
            digest), or its tensors are not exactly those of the encoder.
    """
    spec, config, tensors = read_adapter(folder)
    _check_base(folder, spec, source)
    _restore(folder, encoder, config, tensors)
    return config


def load_adapted_encoder(folder: Path, base: str | Path) -> tuple[nn.Module, EncoderSpec]:
    """Put source weights and an adapter together: W_S + Delta_T, or W_T + Delta_task.

    Args:
        folder: an adapter's folder.
        base: the weights that it was trained on, in whatever form ``read_weights`` takes.

    Returns:
        The encoder, merged and plain, in evaluation mode, and its description.

    Raises:
        WeightsError: as ``load_adapter``, if the base cannot be read, or if frozen weights started at random.
    """
    spec, config, tensors = read_adapter(folder)
    if isinstance(config, FinetuneConfig) and spec.band_init == "random":
        raise WeightsError(
            f"the adapter {folder} was trained on patch embeddings that started at random, which it does not hold",
            "Use the merged encoder of its run.",
        )
    source = read_weights(base)
    _check_base(folder, spec, source)
    encoder: Any = build_encoder(spec)
    # Patch embeddings of new bands start as they did; where pre-training trained them, the adapter brings them
    load_into(
        encoder, source, spec=spec, policy=spec.band_init or "mean", patch_resize=spec.patch_resize or "pseudo-inverse",
        allowed=Allowed(normalization=True, bands=True),
    )  # fmt: skip
    _restore(folder, encoder, config, tensors)
    return merge_lora(encoder).eval(), spec


def _peft_name(name: str) -> str:
    """The name in peft's files: without the adapter's name, and DoRA's magnitudes without ``weight``."""
    name = name.replace(f".{ADAPTER}", "")
    return _PEFT_PREFIX + (name.removesuffix(".weight") if _MAGNITUDE in name else name)


def _own_name(name: str) -> str:
    name = name.removeprefix(_PEFT_PREFIX) + (".weight" if name.endswith(_MAGNITUDE) else "")
    return re.sub(r"\.lora_\w+", rf"\g<0>.{ADAPTER}", name, count=1)


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


def _restore(folder: Path, encoder: Any, config: ExploraConfig | FinetuneConfig, tensors: Mapping[str, Tensor]) -> None:
    if isinstance(config, FinetuneConfig):
        apply_finetuning(encoder, config)
    else:
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
