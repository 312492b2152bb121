"""Opens what a command works on: the dataset, and an encoder that takes its images."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from geoexplora.bands import SENSORS
from geoexplora.datamodules.tiles import TilesDataModule
from geoexplora.errors import ConfigError
from geoexplora.registry import find_dataset, load
from geoexplora.tasks.encoders import fit_encoder
from geoexplora.tasks.parallel import useful_workers
from geoexplora.transforms.normalization import Normalization
from geoexplora.weights.contract import Allowed
from geoexplora.weights.files import read_weights
from geoexplora.weights.source_weights import SourceWeights
from geoexplora.weights.spec import EncoderSpec

IMAGE_SIZE, PATCH_SIZE, NORMALIZATION = 96, 8, "clip-uint8"
"""What an encoder of random weights has where nothing else is said, as in ``geoexplora pretrain``."""


@dataclass(frozen=True)
class OpenedEncoder:
    """An encoder and the data that fit it.

    Attributes:
        encoder: a timm-style ViT in evaluation mode.
        spec: what it is.
        datamodule: gives images as the encoder takes them: its bands, normalization and size.
        record: where its weights come from, in plain JSON types; None for random ones.
        sha256: digest of what decides its weights.
    """

    encoder: Any
    spec: EncoderSpec
    datamodule: TilesDataModule
    record: dict[str, Any] | None
    sha256: str


def open_data(options: Any, target: str | None = None, **settings: Any) -> TilesDataModule:
    """The datamodule that the options name.

    Args:
        options: settings of a command, with ``DataOptions``.
        target: the kind of target, where the dataset has several.
        settings: further arguments of the datamodule; by default the options' own.

    Raises:
        ConfigError: if the dataset is unknown or a setting does not suit it.
        DataError: if it is not there or not what it should be.
    """
    entry = find_dataset(options.dataset)
    if target is not None and entry.targets:
        if target not in entry.targets:
            raise ConfigError(
                f"{options.dataset} has no targets of the kind {target}", f"It has: {', '.join(entry.targets)}."
            )
        settings["target"] = target
    names = ("image_size", "normalization", "statistics", "antialias", "crop_scale", "bands")
    own = {name: getattr(options, name) for name in names if getattr(options, name, None) is not None}
    datamodule: TilesDataModule = load(entry.datamodule)(
        options.root,
        **entry.arguments,
        **{name: getattr(options, name) for name in entry.settings},
        batch_size=options.batch_size,
        num_workers=useful_workers(options.num_workers),
        years=options.years,
        missing=options.missing,
        max_unreadable=options.max_unreadable,
        seed=options.seed,
        **(own | settings),
    )
    return datamodule


def open_encoder(options: Any, target: str | None = None) -> OpenedEncoder:
    """The encoder that ``--init`` names, or one of random weights, with the dataset as it takes it.

    The dataset is read in the encoder's own bands, normalization and resizing, but for what the options ask for. Where
    that is another input, the encoder is built for it and takes the source's weights as a pre-training does.

    Args:
        options: settings of a command, with ``EncoderOptions`` and ``DataOptions``.
        target: the kind of target, where the dataset has several.

    Raises:
        ConfigError: if encoder and dataset do not fit each other.
        DataError: if the dataset is not what it should be.
        WeightsError: if the weights cannot be used.
    """
    source = None if options.init is None else read_weights(options.init)
    spec = None if source is None else source.described()
    datamodule = _open_input(options, spec, target)
    fitted = fit_encoder(
        source,
        sensor=datamodule.sensor.name,
        bands=datamodule.bands,
        groups=options.groups,
        normalization=datamodule.normalization.to_dict(),
        image_size=datamodule.image_size,
        patch_size=options.patch_size or (PATCH_SIZE if spec is None else None),
        antialias=datamodule.antialias,
        model=options.model,
        band_init=options.band_init,
        patch_resize=options.patch_resize,
        allowed=Allowed(options.allow_normalization_mismatch, options.allow_band_mismatch),
        seed=options.seed,
    )
    record = None if source is None else source.record()
    return OpenedEncoder(fitted.encoder, fitted.spec, datamodule, record, _digest(source, fitted.spec, options.seed))


def _digest(source: SourceWeights | None, spec: EncoderSpec, seed: int) -> str:
    """Of what decides an encoder's weights: the file's bytes, not its name, and the seed only where some are drawn."""
    header = {name: value for name, value in spec.to_metadata().items() if name != "source"}
    drawn = source is None or spec.band_init == "random"
    parts = [None if source is None else source.sha256, header, seed if drawn else None]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _open_input(options: Any, spec: EncoderSpec | None, target: str | None) -> TilesDataModule:
    """The dataset in the input that the options ask for; what they leave open is the encoder's own."""
    if spec is None:
        normalization = options.normalization or NORMALIZATION
        return open_data(
            options, target, image_size=options.image_size or IMAGE_SIZE, normalization=normalization,
            antialias=bool(options.antialias),
        )  # fmt: skip
    sensor = find_dataset(options.dataset).sensor  # None: only the opened data tell
    bands = tuple(options.bands or spec.bands)
    if sensor is not None:
        if not options.bands:
            _refuse_other_sensor(spec, options.dataset, sensor)
        bands = SENSORS[sensor].select(bands)
    method = options.normalization or spec.normalization.get("method")
    if method is None:
        raise ConfigError(
            f"{options.init} does not tell with what normalization it was trained",
            "Name one: --normalization (and --statistics).",
        )

    def opened(normalization: Normalization | str, bands: tuple[str, ...]) -> TilesDataModule:
        datamodule = open_data(
            options, target, bands=bands, image_size=options.image_size or spec.image_size,
            normalization=normalization, antialias=spec.antialias if options.antialias is None else options.antialias,
        )  # fmt: skip
        if not options.bands:
            _refuse_other_sensor(spec, options.dataset, datamodule.sensor.name)
        return datamodule

    known = options.statistics != "dataset" and method == spec.normalization.get("method")
    names = bands if sensor is not None else _names_of(spec.sensor, bands)
    if known and sensor in {None, spec.sensor} and set(names) <= set(spec.bands):
        own = Normalization.from_dict(spec.normalization)
        try:
            datamodule = opened(own if names == spec.bands else own.select(names), names)
        except ConfigError:
            if names == bands:
                raise
        else:  # of another sensor, its bands only have the same names
            if datamodule.sensor.name == spec.sensor:
                return datamodule
    return opened(method, bands)


def _names_of(sensor: str, bands: tuple[str, ...]) -> tuple[str, ...]:
    """Bands as a sensor calls them (B2 for B02 or blue); as they are where it does not have them."""
    try:
        return SENSORS[sensor].select(bands)
    except ConfigError:
        return bands


def open_for(options: Any, spec: EncoderSpec, target: str | None = None) -> TilesDataModule:
    """The dataset as an encoder takes it: its bands, normalization and resizing.

    Args:
        options: as for ``open_data``.
        spec: what the encoder is.
        target: the kind of target, where the dataset has several.

    Raises:
        ConfigError: if the dataset lacks a band.
        DataError: if the dataset is not what it should be.
    """
    return open_data(
        options,
        target,
        bands=spec.bands,
        image_size=spec.image_size,
        normalization=Normalization.from_dict(spec.normalization),
        antialias=spec.antialias,
    )


def _refuse_other_sensor(spec: EncoderSpec, dataset: str, sensor: str) -> None:
    if sensor != spec.sensor:
        raise ConfigError(
            f"the encoder was trained on {spec.sensor}, {dataset} is {sensor}",
            "Adapt it first: geoexplora pretrain --init FILE; or name the bands that it shall take as they are:"
            " --bands (and --groups), with --statistics.",
        )
