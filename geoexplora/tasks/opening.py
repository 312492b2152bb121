"""Opens what a command works on: the dataset, and an encoder that takes its images."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from typing import Any

from geoexplora.bands import SENSORS
from geoexplora.datamodules.tiles import TilesDataModule
from geoexplora.errors import ConfigError
from geoexplora.registry import find_dataset, load
from geoexplora.tasks.parallel import useful_workers
from geoexplora.tasks.sources import fit_encoder, is_own_input
from geoexplora.transforms.normalization import Normalization
from geoexplora.weights.contract import Allowed
from geoexplora.weights.files import read_weights
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

    The dataset is read in the encoder's own bands, normalization and resizing. Where the options ask for other bands,
    groups or patches, the encoder is built for these and takes the source's weights as a pre-training does.

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
    if (
        source is not None
        and spec is not None
        and is_own_input(
            spec,
            bands=options.bands,
            groups=options.groups,
            patch_size=options.patch_size,
            method=options.normalization,
        )
    ):
        sensor = find_dataset(options.dataset).sensor
        if sensor is not None:
            _refuse_other_sensor(spec, options.dataset, sensor)
        fitted = fit_encoder(source, sensor=spec.sensor, image_size=options.image_size)
        own = fitted.spec if options.antialias is None else replace(fitted.spec, antialias=options.antialias)
        datamodule = open_for(options, own, target)
        _refuse_other_sensor(spec, options.dataset, datamodule.sensor.name)
        return OpenedEncoder(fitted.encoder, own, datamodule, source.record(), source.sha256)
    antialias = spec is not None and spec.antialias if options.antialias is None else options.antialias
    datamodule = open_data(
        options,
        target,
        image_size=options.image_size or (IMAGE_SIZE if spec is None else spec.image_size),
        normalization=_normalization(options, spec),
        antialias=antialias,
    )
    fitted = fit_encoder(
        source,
        sensor=datamodule.sensor.name,
        bands=datamodule.bands,
        groups=options.groups,
        normalization=datamodule.normalization.to_dict(),
        image_size=datamodule.image_size,
        patch_size=options.patch_size or (PATCH_SIZE if spec is None else None),
        antialias=antialias,
        model=options.model,
        band_init=options.band_init,
        patch_resize=options.patch_resize,
        allowed=Allowed(options.allow_normalization_mismatch, options.allow_band_mismatch),
        seed=options.seed,
    )
    parts = [fitted.spec.to_metadata(), options.seed]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    record = None if source is None else source.record()
    return OpenedEncoder(fitted.encoder, fitted.spec, datamodule, record, digest)


def _normalization(options: Any, spec: EncoderSpec | None) -> Normalization | str:
    """The encoder's own where it knows the bands and nothing else is asked for; else a method, with new statistics."""
    method: str = options.normalization or (NORMALIZATION if spec is None else spec.normalization["method"])
    known = spec is not None and find_dataset(options.dataset).sensor == spec.sensor
    if spec is None or not known or options.normalization is not None or options.statistics == "dataset":
        return method
    bands = SENSORS[spec.sensor].select(options.bands or spec.bands)
    return Normalization.from_dict(spec.normalization).select(bands) if set(bands) <= set(spec.bands) else method


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
