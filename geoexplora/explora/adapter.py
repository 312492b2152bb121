"""Delta_T on disk: peft's LoRA files, and beside them every other tensor that was trained. Nothing frozen is stored.

``adapter_config.json`` and ``adapter_model.safetensors`` open with stock ``peft.PeftModel.from_pretrained`` on the
same ViT with ``attn_layer=SplitAttention``; ``trained.safetensors`` holds whole blocks, norms, class token and
embeddings under stock timm names (queries, keys and values fused).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from geoexplora.errors import WeightsError
from geoexplora.explora.apply import ADAPTER, apply_explora
from geoexplora.explora.config import ExploraConfig
from geoexplora.weights.atomic import atomic_path, write_text

TRAINED_FILE = "trained.safetensors"
LORA_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
_PEFT_PREFIX = "base_model.model."


def adapter_tensors(encoder: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split the trained tensors of an encoder.

    Args:
        encoder: a ViT after ``apply_explora``.

    Returns:
        LoRA tensors under peft's names, and all other trainable tensors under their own.
    """
    lora, trained = {}, {}
    for name, parameter in encoder.named_parameters():
        if not parameter.requires_grad:
            continue
        tensor = parameter.detach().cpu().contiguous()
        if ".lora_" in name:
            lora[_PEFT_PREFIX + name.replace(f".{ADAPTER}.", ".")] = tensor
        else:
            trained[name] = tensor
    return lora, trained


def save_adapter(folder: Path, encoder: Any, config: ExploraConfig, source: Mapping[str, Any] | None) -> None:
    """Write what was trained.

    Args:
        folder: the adapter's folder, made if need be.
        encoder: a ViT after ``apply_explora``.
        config: what was trained; stored in the header.
        source: the record of the source weights (name, sha256, format); the adapter fits no others.

    Raises:
        RunError: if it cannot be written.
    """
    lora, trained = adapter_tensors(encoder)
    header = {"format": "pt", "explora": json.dumps(vars(config)), "source": json.dumps(source)}
    if lora:
        settings = encoder.peft_config[ADAPTER].to_dict()
        settings = {key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()}
        write_text(folder / CONFIG_FILE, json.dumps(settings | {"inference_mode": True}, indent=2, default=str) + "\n")
        with atomic_path(folder / LORA_FILE) as temporary:
            save_file(lora, temporary, {"format": "pt"})
    with atomic_path(folder / TRAINED_FILE) as temporary:
        save_file(trained, temporary, header)


def load_adapter(folder: Path, encoder: Any) -> ExploraConfig:
    """Restore what was trained onto the source weights, in place.

    Args:
        folder: an adapter's folder.
        encoder: a plain ViT of the same architecture with the source weights loaded.

    Returns:
        What was trained; the encoder is as after ``apply_explora`` and training.

    Raises:
        WeightsError: if a file is missing or damaged, or its tensors are not exactly those of the encoder.
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
    settings: dict[str, Any] = json.loads(header["explora"])
    settings = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
    config = ExploraConfig(**settings)
    apply_explora(encoder, config)
    for name, tensor in lora.items():
        stem, _, kind = name.removeprefix(_PEFT_PREFIX).rpartition(".")
        tensors[f"{stem}.{ADAPTER}.{kind}"] = tensor
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
    return config
