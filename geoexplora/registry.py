"""Names to implementations, as ``module:Class`` strings, so that the command line starts without torch."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from geoexplora.bands import nearest
from geoexplora.errors import ConfigError
from geoexplora.torchgeo_facts import FACTS


@dataclass(frozen=True)
class Architecture:
    """Sizes of a vision transformer.

    Attributes:
        width: token width D.
        depth: number of blocks.
        heads: attention heads.
        channel_width: how much of D encodes the channel group (SatMAE: 256), the rest encodes the position.
        timm: the stock timm model with this geometry, or with this geometry once its sizes are overridden.
    """

    width: int
    depth: int
    heads: int
    channel_width: int
    timm: str


MODELS: dict[str, Architecture] = {
    "vit_pico": Architecture(128, 8, 4, 32, "vit_tiny_patch16_224"),
    "vit_tiny": Architecture(192, 12, 3, 48, "vit_tiny_patch16_224"),
    "vit_small": Architecture(384, 12, 6, 96, "vit_small_patch16_224"),
    "vit_base": Architecture(768, 12, 12, 256, "vit_base_patch16_224"),
    "vit_large": Architecture(1024, 24, 16, 256, "vit_large_patch16_224"),
    "vit_huge": Architecture(1280, 32, 16, 256, "vit_huge_patch14_224"),
    "vit_giant": Architecture(1536, 40, 24, 256, "vit_giant_patch14_dinov2"),
}

CUSTOM = "custom"
"""The model name of a vision transformer whose sizes are none of those in ``MODELS``."""

FROM_SOURCE = "source"
"""What ``--model`` says to take the model's sizes from the source weights."""


def model_name(width: int, depth: int, heads: int) -> str:
    """The name of the model of these sizes, ``CUSTOM`` if there is none."""
    sizes = (width, depth, heads)
    named = (name for name, known in MODELS.items() if (known.width, known.depth, known.heads) == sizes)
    return next(named, CUSTOM)


@dataclass(frozen=True)
class Style:
    """What a vision transformer has beside its sizes; the default is the plain one of MAE and SatMAE.

    Attributes:
        layer_scale: blocks scale their branches (DINOv2).
        registers: number of register tokens behind the class token; they and the class token carry no position.
        swiglu: the MLP is gated by SiLU (DINOv2's ViT-g).
        mlp_width: outputs of the MLP's first layer (with ``swiglu`` gates and values together); ``None`` is usual:
            4 widths, or with ``swiglu`` two thirds of that, twice.
        channel_width: how much of a group-channel token's width encodes its group; ``None`` is the model's usual.
        class_token_encoding: the class token carries a position and channel encoding (SatMAE's fine-tuned encoders).
        pooled_norm: the final norm comes after the mean of the patch tokens, not before it (timm's ``fc_norm``).
    """

    layer_scale: bool = False
    registers: int = 0
    swiglu: bool = False
    mlp_width: int | None = None
    channel_width: int | None = None
    class_token_encoding: bool = False
    pooled_norm: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Only what is not as in a plain ViT, in plain JSON types."""
        return {name: value for name, value in vars(self).items() if value != getattr(Style, name)}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Style:
        """The style that ``to_dict`` stored.

        Raises:
            ValueError: if an entry is unknown or of another type.
        """
        kinds: dict[str, Any] = {
            name: bool if isinstance(default, bool) else int for name, default in vars(cls()).items()
        }
        for name, value in stored.items():
            if type(value) is not kinds.get(name) or value < 0:
                raise ValueError(f"{name} = {value!r}")
        return cls(**stored)


def usual_mlp_width(width: int, swiglu: bool) -> int:
    """Outputs of the first layer of the MLP where nothing else is said."""
    return 2 * ((width * 8 // 3 + 7) // 8 * 8) if swiglu else 4 * width


def resolve_blocks(blocks: Sequence[int | str], depth: int) -> tuple[int, ...]:
    """Turn block numbers such as ``[1, "L-1", "L"]`` into ascending 1-based numbers.

    Args:
        blocks: numbers counted from 1, ``L`` for the last block, ``L-1`` for the one before it, ...
        depth: number of blocks L.

    Raises:
        ConfigError: if a block cannot be read or lies outside 1..L, or is named twice.
    """
    numbers = []
    for block in blocks:
        read = re.fullmatch(r"(L)(?:-(\d+))?|(\d+)", str(block).strip().upper())
        if read is None:
            raise ConfigError(f"cannot read block {block!r}", "Write a number from 1, L, or L-1, L-2, ...")
        last, back, plain = read.groups()
        number = depth - int(back or 0) if last else int(plain)
        if not 1 <= number <= depth:
            raise ConfigError(
                f"whole block {block} is out of range: the model has {depth} blocks",
                f"Count from 1 to {depth}, or write L for the last.",
            )
        numbers.append(number)
    if len(set(numbers)) < len(numbers):
        raise ConfigError(f"whole blocks {','.join(map(str, blocks))} name a block twice", "Name each block once.")
    return tuple(sorted(numbers))


@dataclass(frozen=True)
class DatasetEntry:
    """A dataset that the command line knows.

    Attributes:
        datamodule: ``module:Class`` of its datamodule.
        sensor: name of its sensor in ``geoexplora.bands.SENSORS``; None: only the opened data tell.
        needs_root: whether the user must say where the data lies.
        arguments: of the datamodule, beside the settings.
        settings: names of settings that only this datamodule takes.
        targets: kinds of targets among which its argument ``target`` chooses; empty: it has no such argument.
    """

    datamodule: str
    sensor: str | None
    needs_root: bool = True
    arguments: Mapping[str, Any] = field(default_factory=dict)
    settings: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()

    @property
    def is_torchgeo(self) -> bool:
        """Whether one of TorchGeo's classes reads it."""
        return self.datamodule == _TORCHGEO_DATAMODULE


TORCHGEO = "torchgeo:"
"""What precedes the name of a TorchGeo dataset."""

_TORCHGEO_DATAMODULE = "geoexplora.datamodules.torchgeo_source:TorchGeoDataModule"


def _torchgeo(name: str) -> DatasetEntry:
    facts = FACTS.get(name)
    sensor = facts.sensor.name if facts and facts.all_bands else None
    return DatasetEntry(_TORCHGEO_DATAMODULE, sensor, arguments={"name": name})


DATASETS: dict[str, DatasetEntry] = {
    "fmow-sentinel": DatasetEntry("geoexplora.datamodules.fmow_sentinel:FMoWSentinelDataModule", "sentinel-2"),
    "fmow-rgb": DatasetEntry(
        "geoexplora.datamodules.fmow_rgb:FMoWRGBDataModule", "rgb", settings=("crop", "variant", "false_detection")
    ),
    "photographs": DatasetEntry("geoexplora.datamodules.photographs:PhotographsDataModule", "rgb", needs_root=False),
    "sample": DatasetEntry(
        "geoexplora.datamodules.sample:SampleDataModule",
        "sentinel-2",
        needs_root=False,
        settings=("tile_size", "fold"),
        targets=("class", "mask"),
    ),
    "eurosat": _torchgeo("EuroSAT"),
    "eurosat100": _torchgeo("EuroSAT100"),
    "resisc45": _torchgeo("RESISC45"),
    "ucmerced": _torchgeo("UCMerced"),
    "so2sat": _torchgeo("So2Sat"),
    "bigearthnet": _torchgeo("BigEarthNet"),
    "ssl4eo-s12": _torchgeo("SSL4EOS12"),
    "loveda": _torchgeo("LoveDA"),
    "tropical-cyclone": _torchgeo("TropicalCyclone"),
}

DATASET_NAMES = (*DATASETS, f"{TORCHGEO}NAME")
"""Names of datasets, as help and messages list them."""


def look_up[Entry](kind: str, name: str, entries: Mapping[str, Entry]) -> Entry:
    """The entry of that name.

    Raises:
        ConfigError: if there is none; names the nearest ones.
    """
    if name in entries:
        return entries[name]
    raise ConfigError(f"unknown {kind} {name!r}", f"{nearest(name, entries)}Known: {', '.join(entries)}.")


def find_dataset(name: str) -> DatasetEntry:
    """The dataset of that name, one of ``DATASETS`` or ``torchgeo:NAME``.

    Raises:
        ConfigError: if there is none; names the nearest ones.
    """
    if name.startswith(TORCHGEO):
        chosen = name.removeprefix(TORCHGEO)
        known = torchgeo_names()
        if chosen not in known:
            raise ConfigError(
                f"TorchGeo has no dataset {chosen!r}",
                f"{nearest(chosen, known)}Write the name of a class of torchgeo.datasets, such as torchgeo:RESISC45.",
            )
        return _torchgeo(chosen)
    if name not in DATASETS:
        raise ConfigError(f"unknown dataset {name!r}", f"{nearest(name, DATASETS)}Known: {', '.join(DATASET_NAMES)}.")
    return DATASETS[name]


@cache
def torchgeo_names() -> tuple[str, ...]:
    """What ``torchgeo.datasets`` exports, read from its source: importing it imports torch."""
    package = importlib.util.find_spec("torchgeo")
    if package is None or package.origin is None:
        return ()
    tree = ast.parse((Path(package.origin).parent / "datasets" / "__init__.py").read_text(encoding="utf-8"))
    exported = [
        node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    return tuple(name for value in exported for name in ast.literal_eval(value))


def load(target: str) -> Any:
    """Import ``module:Class``."""
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)
