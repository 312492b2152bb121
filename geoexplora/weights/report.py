"""What became of every tensor when weights were loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class LoadReport:
    """What became of every tensor of the model and of the source.

    Attributes:
        matched: tensors taken as they are.
        converted: tensors made for other bands, with how.
        resampled: tensors brought to another patch or image size, with from what to what.
        kept: tensors of the model that the source cannot give by its nature, left as initialized, with why.
        missing: tensors that the source lacks and the caller allowed it to lack, left as initialized.
        unexpected: tensors of the source that the model lacks and the caller allowed to be ignored.
        left_out: tensors of the file that belong to no encoder or decoder, such as a classification head, with why.
        assumed: what was taken for granted about the source because its file does not tell.
        band_init: the policy by which patch embeddings of new bands were made; None if there was no need.
        patch_resize: how patch embeddings changed their patch size; None if there was no need.
    """

    matched: tuple[str, ...]
    converted: Mapping[str, str] = field(default_factory=dict)
    resampled: Mapping[str, str] = field(default_factory=dict)
    kept: Mapping[str, str] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)
    assumed: tuple[str, ...] = ()
    band_init: str | None = None
    patch_resize: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, for run.json; the matched tensors only by their number."""
        return {
            "matched": len(self.matched),
            "converted": dict(self.converted),
            "resampled": dict(self.resampled),
            "kept": dict(self.kept),
            "missing": list(self.missing),
            "unexpected": list(self.unexpected),
            "left_out": dict(self.left_out),
            "assumed": list(self.assumed),
            "band_init": self.band_init,
            "patch_resize": self.patch_resize,
        }

    def summary(self) -> str:
        """A line on how many tensors matched, and one for each thing that became of others."""
        lines = [f"{len(self.matched)} tensors matched"]
        for label, entries in (
            ("converted", self.converted),
            ("resampled", self.resampled),
            ("kept", self.kept),
            ("left out", self.left_out),
        ):
            lines += [f"{label} {names}: {how}" for names, how in grouped(entries).items()]
        lines += [f"missing {name}: left as initialized" for name in self.missing]
        lines += [f"ignored {name}" for name in self.unexpected]
        lines += [f"assumed {what}: the file does not tell" for what in self.assumed]
        return "\n".join(lines)


def grouped(entries: Mapping[str, str]) -> dict[str, str]:
    """Names with what became of them, those of the same fate as one entry: the first, and how many more."""
    names: dict[str, list[str]] = {}
    for name, how in entries.items():
        names.setdefault(how, []).append(name)
    return {same[0] if len(same) == 1 else f"{same[0]} and {len(same) - 1} more": how for how, same in names.items()}
