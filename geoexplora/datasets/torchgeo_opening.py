"""Which datasets TorchGeo has, and how one is opened."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import torchgeo.datasets
from rasterio.errors import RasterioError
from torchgeo.datasets import DatasetNotFoundError, DependencyNotFoundError, GeoDataset, NonGeoDataset

from geoexplora.errors import ConfigError, DataError, SplitNotFoundError
from geoexplora.torchgeo_facts import FACTS

SPLITS = {"train": ("train",), "val": ("val", "validation", "dev"), "test_gt": ("test",)}
"""Names of the splits here, and what TorchGeo's datasets call them."""


def find_class(name: str) -> type[NonGeoDataset]:
    """The class of a dataset of TorchGeo.

    Raises:
        ConfigError: if there is none of that name, or it is none of image chips with an index.
    """
    found = getattr(torchgeo.datasets, name, None)
    if isinstance(found, type) and issubclass(found, GeoDataset):
        raise ConfigError(
            f"TorchGeo's {name} is a GeoDataset: whole scenes, without chips that could be counted",
            "Name a NonGeoDataset such as torchgeo:RESISC45.",
        )
    if not (isinstance(found, type) and issubclass(found, NonGeoDataset)) or inspect.isabstract(found):
        raise ConfigError(
            f"TorchGeo has no dataset {name!r} that can be opened", "Name a NonGeoDataset such as torchgeo:RESISC45."
        )
    return found


def find_splits(dataset_class: type[NonGeoDataset]) -> dict[str, str | None]:
    """The splits ``train``, ``val`` and ``test_gt`` that a class has, and what it calls them.

    Returns:
        None stands for the class's own default: where there are no splits, or ``split`` means something else.
    """
    parameter = inspect.signature(dataset_class).parameters.get("split")
    values = () if parameter is None else get_args(parameter.annotation) or getattr(dataset_class, "splits", ())
    found: dict[str, str | None] = {"train": None}
    return found | {ours: value for ours, known in SPLITS.items() for value in known if value in values}


def open_torchgeo(dataset_class: type[NonGeoDataset], root: Path, split: str) -> NonGeoDataset:
    """Open a split of a dataset that lies in a folder; nothing is downloaded, and no checksum computed.

    Args:
        dataset_class: a class of TorchGeo.
        root: what its constructor takes as ``root``.
        split: one of ``find_splits``.

    Raises:
        SplitNotFoundError: if TorchGeo does not find it.
        DataError: if it cannot be opened otherwise.
        ConfigError: if its constructor needs more than a folder, or a package that is not installed.
    """
    name = dataset_class.__name__
    facts, parameters = FACTS.get(name), inspect.signature(dataset_class).parameters
    arguments: dict[str, Any] = {
        "root": root,
        "download": False,
        "checksum": False,
        "split": find_splits(dataset_class)[split],
    }
    arguments = {key: value for key, value in arguments.items() if key in parameters and value is not None}
    arguments |= facts.arguments if facts else {}
    named = [key for key, one in parameters.items() if one.kind not in {one.VAR_POSITIONAL, one.VAR_KEYWORD}]
    needed = [key for key in named if parameters[key].default is inspect.Parameter.empty and key not in arguments]
    if needed or "root" not in parameters:
        raise ConfigError(
            f"TorchGeo's {name} needs more than a folder: {', '.join(needed) or 'it has no root'}",
            "Name a dataset that opens with its root alone.",
        )
    if not root.is_dir():
        raise DataError(
            f"{root} {'is not a folder' if root.exists() else 'does not exist'}", f"Name the folder that holds {name}."
        )
    try:
        return dataset_class(**arguments)
    except DatasetNotFoundError as error:
        raise SplitNotFoundError(
            f"TorchGeo finds no {name} in {root}{_of(arguments)}",
            "Nothing is downloaded: put its files there as TorchGeo's documentation says, or correct --root.",
        ) from error
    except DependencyNotFoundError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"TorchGeo's {name} cannot be opened: {reason}", "Install that package.") from error
    except (OSError, RasterioError) as error:
        raise DataError(
            f"TorchGeo's {name} cannot read {root}{_of(arguments)}: {error}", "Copy or unpack the dataset again."
        ) from error
    except (RuntimeError, LookupError, ValueError, TypeError, AssertionError) as error:
        raise DataError(
            f"TorchGeo's {name} cannot be opened in {root}{_of(arguments)}: {type(error).__name__}: {error}",
            "Check that the folder is as TorchGeo expects it.",
        ) from error


def _of(arguments: Mapping[str, Any]) -> str:
    return f" (split {arguments['split']})" if "split" in arguments else ""
