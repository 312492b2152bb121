"""What is trained, by part: counted, logged, stored with the run."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from geoexplora.explora.apply import NORMS


@dataclass(frozen=True)
class PartCount:
    """Parameters of one part of the model.

    Attributes:
        part: its name.
        trainable: number of trainable parameters.
        frozen: number of frozen ones.
    """

    part: str
    trainable: int
    frozen: int


ENCODER_PARTS = (
    "whole blocks",
    "LoRA",
    "norms",
    "other block weights",
    "patch embedding",
    "position encoding",
    "channel encoding",
    "class token",
    "other",
)
"""Parts of the encoder, in the order of the table."""

_BY_NAME = {
    "patch_embed": "patch embedding",
    "pos_embed": "position encoding",
    "channel_embed": "channel encoding",
    "channel_cls_embed": "channel encoding",
    "cls_token": "class token",
}


def part_of(name: str, norms: frozenset[str], whole_blocks: Iterable[int]) -> str:
    """The part of the encoder that a parameter belongs to.

    Args:
        name: the parameter's name in the encoder.
        norms: names of all parameters of normalization layers.
        whole_blocks: 1-based numbers of the blocks trained whole.
    """
    if ".lora_" in name or ".ranknum." in name:  # AdaLoRA's constant divisor
        return "LoRA"
    block = re.match(r"blocks\.(\d+)\.", name)
    if block and int(block[1]) + 1 in set(whole_blocks):
        return "whole blocks"
    if name in norms:
        return "norms"
    return "other block weights" if block else _BY_NAME.get(name.split(".")[0], "other")


def norm_parameters(model: nn.Module) -> frozenset[str]:
    """Names of the parameters of all normalization layers."""
    return frozenset(
        f"{prefix}.{name}".lstrip(".")
        for prefix, module in model.named_modules()
        if isinstance(module, NORMS)
        for name, _ in module.named_parameters(recurse=False)
    )


def parameter_table(encoder: nn.Module, whole_blocks: Iterable[int] = (), **heads: nn.Module) -> list[PartCount]:
    """Count trainable and frozen parameters by part.

    Args:
        encoder: the ViT, after ``apply_explora`` or ``apply_finetuning``.
        whole_blocks: 1-based numbers of the blocks trained whole.
        heads: further modules by name, such as ``decoder``; each is one part.

    Returns:
        The parts that have parameters: the encoder's in a fixed order, then the heads.
    """
    norms, whole = norm_parameters(encoder), frozenset(whole_blocks)
    counts: dict[str, list[int]] = {part: [0, 0] for part in (*ENCODER_PARTS, *heads)}
    for name, parameter in encoder.named_parameters():
        counts[part_of(name, norms, whole)][not parameter.requires_grad] += parameter.numel()
    for head, module in heads.items():
        for parameter in module.parameters():
            counts[head][not parameter.requires_grad] += parameter.numel()
    return [PartCount(part, *count) for part, count in counts.items() if any(count)]


def format_table(table: list[PartCount]) -> str:
    """The table as aligned text, with a total line."""
    rows = [("part", "trainable", "frozen")]
    rows += [(row.part, f"{row.trainable:,}", f"{row.frozen:,}") for row in table]
    trainable, frozen = sum(row.trainable for row in table), sum(row.frozen for row in table)
    rows.append((f"total ({trainable / max(1, trainable + frozen):.1%} trained)", f"{trainable:,}", f"{frozen:,}"))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}" for a, b, c in rows)


def table_to_json(table: list[PartCount]) -> list[dict[str, Any]]:
    """Plain JSON types, for ``run.json``."""
    return [asdict(row) for row in table]
