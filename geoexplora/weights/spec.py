"""What an encoder is and what it expects: architecture, bands, groups, normalization, source. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from geoexplora.bands import SENSORS, resolve_groups
from geoexplora.errors import ConfigError, WeightsError
from geoexplora.registry import CUSTOM, MODELS, Architecture, Style, look_up
from geoexplora.weights.timm_names import group_channel_model, plain_model

FORMAT_VERSION = 1
"""Version of the header; raised when older readers could misread it."""


@dataclass(frozen=True)
class EncoderSpec:
    """An encoder's description, as it stands in the header of ``encoder.safetensors``.

    ``timm.create_model(spec.timm_name, **spec.timm_args)`` builds the encoder.

    Attributes:
        model: our name of the architecture, such as ``vit_base``; ``custom`` for sizes without a name.
        timm_name: timm's name of the model.
        timm_args: keyword arguments for ``timm.create_model``, plain JSON types.
        width: token width.
        depth: number of blocks.
        heads: attention heads.
        image_size: image side in pixels.
        patch_size: patch side in pixels.
        sensor: name of the sensor, as in ``geoexplora.bands.SENSORS``.
        bands: names of the input bands, in the order of the channels.
        groups: channel groups by band names; None for a plain ViT.
        normalization: ``Normalization.to_dict()``: method, bands, mean, std.
        units: what pixel values mean before normalization.
        antialias: whether images were resized with antialiasing.
        source: where the weights came from: path or name, sha256, format; None if trained from scratch.
        band_init: the policy by which patch embeddings of new bands were started; None if there was no need.
        patch_resize: how the source's patch embedding changed its patch size; None if there was no need.
        pool: how the encoder's tokens become one feature vector by default: ``mean`` of the patch tokens, or ``cls``.
        style: what it has beside its sizes: LayerScale, registers, ...
    """

    model: str
    timm_name: str
    timm_args: Mapping[str, Any]
    width: int
    depth: int
    heads: int
    image_size: int
    patch_size: int
    sensor: str
    bands: tuple[str, ...]
    groups: tuple[tuple[str, ...], ...] | None
    normalization: Mapping[str, Any]
    units: str
    antialias: bool = False
    source: Mapping[str, Any] | None = field(default=None)
    band_init: str | None = None
    patch_resize: str | None = None
    pool: str = "mean"
    style: Style = field(default_factory=Style)

    @classmethod
    def of(
        cls,
        model: str,
        *,
        image_size: int,
        patch_size: int,
        sensor: str,
        bands: Sequence[str],
        normalization: Mapping[str, Any],
        groups: Sequence[Sequence[str]] | None = None,
        antialias: bool = False,
        source: Mapping[str, Any] | None = None,
        band_init: str | None = None,
        patch_resize: str | None = None,
        pool: str = "mean",
        style: Style | None = None,
        sizes: tuple[int, int, int] | None = None,
    ) -> EncoderSpec:
        """Describe an encoder by our model name and its bands; timm's name and arguments follow from these.

        Args:
            model: a name in ``geoexplora.registry.MODELS``, or ``custom``.
            image_size: image side in pixels.
            patch_size: patch side in pixels.
            sensor: name of the sensor.
            bands: input bands in the order of the channels.
            normalization: ``Normalization.to_dict()`` for these bands.
            groups: channel groups by band names; None for a plain ViT.
            antialias: whether images are resized with antialiasing.
            source: where the weights came from.
            band_init: policy for the patch embeddings of new bands.
            patch_resize: how the patch embedding changed its patch size.
            pool: ``mean`` or ``cls``.
            style: what it has beside its sizes; plain by default.
            sizes: width, depth and heads of a ``custom`` model; not used for others.

        Raises:
            ConfigError: for an unknown model, sensor or band, wrong groups, sizes that do not fit each other, or an
                image size that is not a multiple of the patch size.
        """
        architecture = _custom(sizes) if model == CUSTOM and sizes else look_up("model", model, MODELS)
        style = style or Style()
        known = look_up("sensor", sensor, SENSORS)
        names = known.select(bands)
        if patch_size < 1 or image_size < patch_size or image_size % patch_size:
            raise ConfigError(
                f"image size {image_size} is not a multiple of patch size {patch_size}",
                "Choose --image-size as a multiple of --patch-size.",
            )
        if groups is None:
            grouped = None
            timm_name, timm_args = plain_model(model, architecture, style, image_size, patch_size, len(names))
        else:
            indices = resolve_groups(groups, names, known)
            grouped = tuple(tuple(names[i] for i in group) for group in indices)
            timm_name, timm_args = group_channel_model(
                model, architecture, style, image_size, patch_size, [list(group) for group in indices]
            )
        return cls(
            model, timm_name, timm_args, architecture.width, architecture.depth, architecture.heads,
            image_size, patch_size, sensor, names, grouped, dict(normalization), known.units, antialias,
            None if source is None else dict(source), band_init, patch_resize, pool, style,
        )  # fmt: skip

    @property
    def prefix_positions(self) -> int:
        """Rows of the position encoding that belong to no patch: those of the class and register tokens."""
        if self.groups is not None:
            return 1 + self.style.registers
        return 0 if self.style.registers else 1

    def at_size(self, image_size: int) -> EncoderSpec:
        """The same for another image size.

        Args:
            image_size: image side in pixels.

        Raises:
            ConfigError: if it is not a multiple of the patch size.
        """
        given = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name not in _DERIVED}
        return EncoderSpec.of(**given | {"sizes": (self.width, self.depth, self.heads), "image_size": image_size})

    def to_metadata(self) -> dict[str, str]:
        """The description as a safetensors header: every value is JSON, but for strings, which stand as they are."""
        header = {"format": "pt", "geoexplora": "encoder", "version": str(FORMAT_VERSION)}
        values = asdict(self) | {"style": self.style.to_dict() or None}
        return header | {name: _encode(value) for name, value in values.items() if value is not None}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> EncoderSpec:
        """Read a safetensors header back.

        A header comes from whoever made the file, and timm takes names and arguments that fetch files and unpickle
        them. So what a header says must be what ``of`` makes of its model, sensor, bands, groups and sizes.

        Args:
            metadata: the header's strings.

        Raises:
            WeightsError: if it is not a header of ours, is damaged, contradicts itself, or comes from a newer version
                of this package.
        """
        if metadata.get("geoexplora") not in {"encoder", "decoder", "adapter"}:
            raise WeightsError("the file has no description of an encoder", "Name an encoder.safetensors or a run.")
        if not metadata.get("version", "").isdigit() or int(metadata["version"]) > FORMAT_VERSION:
            raise WeightsError(
                f"the file's header has version {metadata.get('version')!r}, this package reads {FORMAT_VERSION}",
                "Update geoexplora: pip install --upgrade geoexplora.",
            )
        problems: list[str] = []
        values: dict[str, Any] = {}
        for entry in fields(cls):
            if entry.name in metadata:
                try:
                    values[entry.name] = _decode(entry.name, metadata[entry.name])
                except (ValueError, TypeError) as problem:
                    problems.append(f"{entry.name} ({problem})")
            elif entry.name == "groups":
                values["groups"] = None
            elif entry.name not in _OPTIONAL:
                problems.append(f"{entry.name} (missing)")
        if problems:
            raise WeightsError(f"the file's header is damaged: {', '.join(problems)}", "Take another copy of the file.")
        return cls(**values)._checked()

    def _checked(self) -> EncoderSpec:
        """This description, if it is the one that ``of`` makes.

        Raises:
            WeightsError: if it is not.
        """
        remedy = "Take a file written by geoexplora; one by a newer version needs: pip install --upgrade geoexplora."
        try:
            expected = self.at_size(self.image_size)
        except ConfigError as problem:
            raise WeightsError(f"the file's header describes no encoder known here: {problem}", remedy) from problem
        differing = [entry.name for entry in fields(self) if getattr(self, entry.name) != getattr(expected, entry.name)]
        if differing:
            told = "; ".join(f"{name} is {getattr(self, name)}, not {getattr(expected, name)}" for name in differing)
            raise WeightsError(f"the file's header contradicts itself: {told}", remedy)
        return self


_TEXT = ("model", "timm_name", "sensor", "units", "band_init", "patch_resize", "pool")
_NUMBERS = ("width", "depth", "heads", "image_size", "patch_size")
_DERIVED = ("timm_name", "timm_args", "width", "depth", "heads", "units")
_OPTIONAL = ("antialias", "source", "band_init", "patch_resize", "pool", "style")


def _encode(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _decode(name: str, text: str) -> Any:
    if name == "pool" and text not in {"mean", "cls"}:
        raise ValueError(f"{text!r} is neither mean nor cls")
    if name in _TEXT:
        return text
    value = json.loads(text)
    if name in _NUMBERS:
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{value!r} is not a positive whole number")
        return value
    if name == "bands":
        return tuple(str(band) for band in value)
    if name == "groups":
        return tuple(tuple(str(band) for band in group) for group in value)
    if name == "antialias":
        return bool(value)
    if not isinstance(value, dict):
        raise TypeError(f"{value!r} is not a set of values")
    if name == "normalization" and value:
        _check_normalization(value)
    return Style.from_dict(value) if name == "style" else value


def _check_normalization(stored: Mapping[str, Any]) -> None:
    if set(stored) != {"method", "bands", "mean", "std"}:
        raise ValueError(f"it has {', '.join(sorted(stored))} instead of method, bands, mean and std")
    lists = [stored[name] for name in ("bands", "mean", "std")]
    if not all(isinstance(one, list) and len(one) == len(lists[0]) for one in lists):
        raise ValueError("bands, mean and std are not of one length")
    if not all(isinstance(value, int | float) for one in lists[1:] for value in one):
        raise ValueError("mean and std are not numbers")


def _custom(sizes: tuple[int, int, int]) -> Architecture:
    width, depth, heads = sizes
    if min(sizes) < 1 or width % heads or width % 4:
        raise ConfigError(
            f"no vision transformer is {width} wide with {depth} blocks and {heads} heads",
            "The width must be a multiple of the heads and of 4.",
        )
    return Architecture(width, depth, heads, width // 16 * 4, MODELS["vit_tiny"].timm)
