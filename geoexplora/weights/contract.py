"""What weights were trained for and what they are asked to do must be the same, or the caller must say otherwise."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from geoexplora.errors import WeightsError
from geoexplora.weights.spec import EncoderSpec

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Allowed:
    """Differences between weights and data that the caller allows by name.

    Attributes:
        normalization: other statistics or another method of normalization.
        bands: other bands of the same sensor; their patch embeddings then start by the policy for new bands.
    """

    normalization: bool = False
    bands: bool = False


def check_contract(label: str, source: EncoderSpec, wanted: EncoderSpec, *, told: bool, allowed: Allowed) -> None:
    """Check bands and normalization of weights against those they are to be used with.

    Weights of another sensor are adapted by a policy, so there is nothing to hold them to.

    Args:
        label: the weights, for messages.
        source: what the weights were trained for.
        wanted: what they are to be used for.
        told: whether the file itself tells bands and normalization; what is only assumed of it is warned about.
        allowed: differences that may be.

    Raises:
        WeightsError: if they differ in a way that is not allowed; says in what.
    """
    if source.sensor != wanted.sensor:
        return
    plain = source.groups is None  # channel groups hold to their bands by themselves
    if told and plain and set(source.bands) != set(wanted.bands) and not allowed.bands:
        lacking = [band for band in wanted.bands if band not in source.bands]
        surplus = [band for band in source.bands if band not in wanted.bands]
        differing = [f"it does not know {','.join(lacking)}"] * bool(lacking)
        differing += [f"{','.join(surplus)} would be missing"] * bool(surplus)
        raise WeightsError(
            f"{label} was trained on the bands {','.join(source.bands)}, not on {','.join(wanted.bands)}:"
            f" {' and '.join(differing)}",
            f"Select its bands by name: --bands {','.join(source.bands)}; or let new bands start by --band-init:"
            " allow_band_mismatch (--allow-band-mismatch).",
        )
    differing = normalization_differences(source.normalization, wanted.normalization)
    if not differing:
        return
    text = f"{label} was trained with another normalization than asked for: {'; '.join(differing)}"
    if told and not allowed.normalization:
        raise WeightsError(
            text,
            "Use the normalization of the weights (--normalization, --statistics; geoexplora inspect shows it), or go"
            " on with the other one: allow_normalization_mismatch (--allow-normalization-mismatch).",
        )
    log.warning("%s", text)


def normalization_differences(source: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """In what two normalizations (``Normalization.to_dict()``) differ, for the bands that both have."""
    if not source or not wanted:
        return []
    found = []
    if source["method"] != wanted["method"]:
        found.append(f"method {source['method']}, now {wanted['method']}")
    for statistic in ("mean", "std"):
        before = dict(zip(source["bands"], source[statistic], strict=True))
        after = dict(zip(wanted["bands"], wanted[statistic], strict=True))
        others = [band for band in after if band in before and not _close(before[band], after[band])]
        if others:
            band = others[0]
            more = f" and {len(others) - 1} more" if len(others) > 1 else ""
            found.append(f"{statistic} of {band} {before[band]:g}, now {after[band]:g}{more}")
    return found


def _close(one: float, other: float) -> bool:
    return abs(one - other) <= 1e-6 * max(abs(one), abs(other))
