"""What the user calls source weights, turned into a file or folder on this machine; fetched if need be."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

from geoexplora.errors import WeightsError
from geoexplora.weights.sources.addresses import Address, exists, looks_like_path, parse_address
from geoexplora.weights.sources.fetch import MissingError, fetch
from geoexplora.weights.sources.libraries import from_timm, from_torchgeo
from geoexplora.weights.sources.shortcuts import BUNDLED, FORMS, SHORTCUTS, TORCHGEO_NAME, Hints


@dataclass(frozen=True)
class Located:
    """Weights on this machine.

    Attributes:
        path: the file or folder.
        name: what to call them in records: as the user did, of local ones the file's name.
        address: where they were fetched from; None for local ones.
        hints: what is known of them beside what the file tells.
        licence: their licence, or where to read it, if known.
    """

    path: Path
    name: str
    address: str | None
    hints: Hints = field(default_factory=Hints)
    licence: str | None = None


def locate(source: str | Path) -> Located:
    """Find weights, and fetch them if they are not on this machine.

    What is fetched is kept, and not fetched again: in the Hugging Face cache, or in ``geoexplora`` in torch's hub
    folder.

    Args:
        source: in this order: an existing file or folder; an ``https://`` or ``hf://owner/name[@revision][/file]``
            address, with ``#sha256=...`` behind it to have the digest checked; a shortcut, or ``sample-source``, which
            comes with this package; TorchGeo's name of weights; a timm model's name.

    Returns:
        Where they lie, and what is known of them.

    Raises:
        WeightsError: if there are no such weights, or they cannot be fetched or are not what they should be.
    """
    text = str(source)
    if not text.strip():
        raise WeightsError("no weights are named", FORMS)
    path = Path(source)
    if exists(path):
        return Located(path, path.name or path.resolve().name, None)
    if "://" in text:
        address = parse_address(text)
        public = address.text.partition("?")[0]  # what follows may be a signature, which is nobody's business
        return Located(fetch(address), public, public)
    if text in SHORTCUTS:
        known = SHORTCUTS[text]
        address = parse_address(known.address, known.sha256)
        hints = Hints(known.sensor, known.bands, known.normalization, known.format)
        return Located(fetch(address), text, address.text, hints, known.licence)
    if text in BUNDLED:
        return Located(Path(str(files("geoexplora").joinpath(BUNDLED[text]))), text, None)
    if isinstance(source, Path) or looks_like_path(text):
        hub = f" A model on the Hugging Face hub is hf://{text}." if re.fullmatch(r"[\w-]+/[\w.-]+", text) else ""
        raise WeightsError(f"{text}: no such file or folder", f"Check the path.{hub}")
    weights = from_torchgeo(text) if TORCHGEO_NAME.fullmatch(text) else from_timm(text)
    path, address = _fetch_first(weights.addresses)
    return Located(path, weights.name, address.text, weights.hints, weights.licence)


def _fetch_first(addresses: tuple[Address, ...]) -> tuple[Path, Address]:
    """Fetch what is there first."""
    *others, last = addresses
    for address in others:
        with suppress(MissingError):
            return fetch(address), address
    return fetch(last), last
