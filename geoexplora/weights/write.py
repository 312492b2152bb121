"""Writing encoders and decoders as safetensors files with a header that says what they are."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from geoexplora.errors import WeightsError
from geoexplora.weights.atomic import atomic_path
from geoexplora.weights.spec import EncoderSpec


def save_encoder(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    spec: EncoderSpec,
    *,
    step: int | None = None,
    trained: Any = None,
    assumed: Sequence[str] = (),
    dtype: torch.dtype | None = None,
) -> None:
    """Write an encoder, whole or not at all.

    Args:
        path: the file, usually ``encoder.safetensors``.
        tensors: the encoder's state dict, under timm's names, merged (no LoRA, fused qkv).
        spec: what it is; stands in the header.
        step: the optimizer step it was taken at.
        trained: which parts were trained, in plain JSON types.
        assumed: what of the description was taken for granted; it then binds no reader.
        dtype: store floating-point tensors in this type, such as ``torch.float16`` to halve the file.

    Raises:
        WeightsError: if a tensor holds NaN or Inf (also after the conversion to ``dtype``).
        RunError: if the file cannot be written (disk full, read-only); an old one stays as it was.
    """
    metadata = spec.to_metadata() | ({} if trained is None else {"trained": json.dumps(trained)})
    if assumed:
        metadata["assumed"] = json.dumps(list(assumed))
    _save(Path(path), tensors, metadata, step, dtype)


def save_decoder(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    spec: EncoderSpec,
    settings: Mapping[str, Any],
    *,
    step: int | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write the decoder of a masked autoencoder beside its encoder, whole or not at all.

    Args:
        path: the file, usually ``decoder.safetensors``.
        tensors: its tensors, under Meta's names (``decoder_embed.weight``, ..., ``mask_token``) or those of
            ``MAEDecoder``, which lack the ``decoder_``; stored under Meta's.
        spec: the encoder's description.
        settings: the decoder's sizes and what it was trained for: width, depth, heads, norm_pix_loss; plain JSON types.
        step: the optimizer step it was taken at.
        dtype: as in :func:`save_encoder`.

    Raises:
        WeightsError: as in :func:`save_encoder`.
        RunError: as in :func:`save_encoder`.
    """
    metadata = spec.to_metadata() | {"geoexplora": "decoder", "decoder": json.dumps(dict(settings))}
    named = {name if is_decoder(name) else f"decoder_{name}": value for name, value in tensors.items()}
    _save(Path(path), named, metadata, step, dtype)


def save_heads(path: str | Path, tensors: Mapping[str, Tensor], spec: EncoderSpec, *, step: int | None = None) -> None:
    """Write the projection heads and the mask token of DINOv2's objective beside their encoder, whole or not at all.

    DINOv2's own were never released: continuing from its backbones starts with new heads.

    Args:
        path: the file, usually ``heads.safetensors``.
        tensors: ``dino.*``, ``ibot.*`` if the heads are separate, and ``mask_token``.
        spec: the encoder's description.
        step: the optimizer step they were taken at.

    Raises:
        WeightsError: as in :func:`save_encoder`.
        RunError: as in :func:`save_encoder`.
    """
    _save(Path(path), tensors, spec.to_metadata() | {"geoexplora": "heads"}, step, None)


def save_task_head(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    spec: EncoderSpec,
    settings: Mapping[str, Any],
    *,
    step: int | None = None,
) -> None:
    """Write the head of a fine-tuned model beside its encoder, whole or not at all.

    Args:
        path: the file, usually ``task_head.safetensors``.
        tensors: the head's state dict.
        spec: the encoder's description.
        settings: what builds the head and reads its outputs: task, classes, kind of head; plain JSON types.
        step: the optimizer step they were taken at.

    Raises:
        WeightsError: as in :func:`save_encoder`.
        RunError: as in :func:`save_encoder`.
    """
    metadata = spec.to_metadata() | {"geoexplora": "task head", "settings": json.dumps(dict(settings))}
    _save(Path(path), tensors, metadata, step, None)


def is_decoder(name: str) -> bool:
    """Whether a tensor of that canonical name belongs to the decoder of a masked autoencoder."""
    return name.startswith("decoder_") or name == "mask_token"


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that hold NaN or Inf."""
    return [
        name
        for name, value in tensors.items()
        # A finite sum needs no second look, and takes no memory; one that is not may only be too large for its type
        if value.is_floating_point() and not value.sum().isfinite() and not value.isfinite().all()
    ]


def _save(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str], step: int | None, dtype: torch.dtype | None
) -> None:
    if step is not None:
        metadata["step"] = str(step)
    stored = {name: _storable(value, dtype) for name, value in tensors.items()}
    if bad := not_finite(stored):
        raise WeightsError(
            f"{path} is not written: {len(bad)} tensors hold NaN or Inf, such as {', '.join(bad[:5])}",
            "The training diverged: resume an earlier checkpoint with a lower --lr, or use --precision 32.",
        )
    with atomic_path(path) as temporary:
        save_file(stored, temporary, metadata)


def _storable(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    value = value.detach()
    if dtype is not None and value.is_floating_point():
        value = value.to(dtype)
    value = value.cpu().contiguous()
    # safetensors refuses tensors that share memory, such as slices of a fused weight
    return value if value.untyped_storage().nbytes() == value.nbytes else value.clone()
