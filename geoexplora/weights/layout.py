"""Finding the model in a file: which wrapper and prefix its tensors stand under.

Training code stores a model under ``model``, ``teacher``, ``state_dict``, ..., and its tensors behind ``module.``,
``backbone.``, ``encoder.``, ..., in any combination. A class token, which every vision transformer here has, shows
where.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from geoexplora.errors import WeightsError

_ANCHOR = "cls_token"
_HUB_ANCHOR = "embeddings.cls_token"
_DEEPEST = 8
_NOT_A_MODEL = {"optimizer", "optimizer_states", "lr_schedulers", "scaler", "callbacks", "loops"}
_MODEL_PART = re.compile(r"(blocks|patch_embed|norm|pos_embed|cls_token|channel_embed|decoder_\w+)\b")


@dataclass(frozen=True)
class Found:
    """A model as it was found in a file.

    Attributes:
        tensors: the tensors behind the prefix, without it.
        prefix: the wrapper and prefix, such as ``teacher.backbone.``; empty for a bare state dict.
        outside: names of the tensors that do not stand behind the prefix, such as heads.
        hub_names: whether the names are those of Hugging Face's transformers.
        content: the file's whole content.
    """

    tensors: dict[str, Tensor]
    prefix: str
    outside: tuple[str, ...]
    hub_names: bool
    content: Mapping[str, Any]


def find_model(content: Mapping[str, Any], path: Any) -> Found | None:
    """Find the model in a file's content.

    Args:
        content: the content, nested as it is.
        path: the file, for messages.

    Returns:
        The model; ``None`` if nothing in the file looks like a vision transformer. Of several, averaged weights
        (teacher, EMA) come first, a student's and a momentum copy last.

    Raises:
        WeightsError: if a part of the model is no tensor, or the model carries LoRA that is not merged, or the file
            holds LoRA only.
    """
    entries = dict(_flatten(content))
    lora = [name for name in entries if ".lora_" in name or "lora_A" in name]
    anchors = [name for name in entries if name == _ANCHOR or name.endswith(f".{_ANCHOR}")]
    if lora and not anchors:
        raise WeightsError(
            f"{path} holds LoRA only ({lora[0]}, ...), without the weights that it adapts",
            "Merge it into its base first: geoexplora export ADAPTER --base FILE --format safetensors --output NEW.",
        )
    if lora:
        raise WeightsError(
            f"{path} carries LoRA that is not merged ({lora[0]}, ...)",
            "Merge it with the code that trained it (peft: model.merge_and_unload()) and save the result.",
        )
    if not anchors:
        return None
    best = min(anchors, key=_rank)
    hub_names = best.endswith(_HUB_ANCHOR)
    prefix = best.removesuffix(_HUB_ANCHOR if hub_names else _ANCHOR)
    inside = {name.removeprefix(prefix): value for name, value in entries.items() if name.startswith(prefix)}
    strange = [name for name, value in inside.items() if not isinstance(value, Tensor) and _MODEL_PART.match(name)]
    if strange:
        raise WeightsError(f"{path}: {', '.join(strange[:5])} is no tensor", "Take another copy of the file.")
    outside = tuple(
        name for name, value in entries.items() if not name.startswith(prefix) and isinstance(value, Tensor)
    )
    tensors = {name: value for name, value in inside.items() if isinstance(value, Tensor)}
    return Found(tensors, prefix, outside, hub_names, content)


def _flatten(content: Mapping[Any, Any], prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Names and values of everything in nested mappings, but for what belongs to the training and not to a model."""
    if depth > _DEEPEST:  # a damaged file may hold itself
        return
    for name, value in content.items():
        if not isinstance(name, str) or (not prefix and name in _NOT_A_MODEL):
            continue
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.", depth + 1)
        else:
            yield prefix + name, value


def _rank(anchor: str) -> tuple[bool, bool, int, str]:
    """Order of several models in one file: averaged weights first, copies of training last, then the outermost."""
    words = set(re.split(r"[._]", anchor))
    copies = bool(words & {"student", "momentum", "target"})
    return not words & {"teacher", "ema"}, copies, anchor.count("."), anchor
