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
        band_init: the policy by which patch embeddings of new bands were made; None if there was no need.
    """

    matched: tuple[str, ...]
    converted: Mapping[str, str] = field(default_factory=dict)
    resampled: Mapping[str, str] = field(default_factory=dict)
    kept: Mapping[str, str] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    band_init: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, for run.json; the matched tensors only by their number."""
        return {
            "matched": len(self.matched),
            "converted": dict(self.converted),
            "resampled": dict(self.resampled),
            "kept": dict(self.kept),
            "missing": list(self.missing),
            "unexpected": list(self.unexpected),
            "band_init": self.band_init,
        }

    def summary(self) -> str:
        """A line on how many tensors matched, and one for each thing that became of others."""
        lines = [f"{len(self.matched)} tensors matched"]
        for label, entries in (("converted", self.converted), ("resampled", self.resampled), ("kept", self.kept)):
            lines += [f"{label} {_named(names)}: {how}" for how, names in _by_value(entries).items()]
        lines += [f"missing {name}: left as initialized" for name in self.missing]
        lines += [f"ignored {name}" for name in self.unexpected]
        return "\n".join(lines)


def _by_value(entries: Mapping[str, str]) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    for name, how in entries.items():
        names.setdefault(how, []).append(name)
    return names


def _named(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
