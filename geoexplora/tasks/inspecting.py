"""``geoexplora inspect``: what weights, a run or an adapter are."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from geoexplora.explora import is_adapter, read_adapter
from geoexplora.weights import inspect
from geoexplora.weights.inspect import count_tensors, describe_encoder


def describe(source: str, *, tensors: bool = False) -> dict[str, Any]:
    """Describe weights, a run folder or an adapter.

    Args:
        source: what ``read_weights`` takes, a run folder, or an adapter's folder.
        tensors: also list every tensor with its shape and type.

    Returns:
        What ``geoexplora.weights.inspect.describe`` returns; for an adapter plain JSON types with ``kind`` ``adapter``,
        ``adapter`` (what is trained), ``encoder`` (of which), and the counts of its own tensors.

    Raises:
        WeightsError: if it is missing, damaged or of no known format.
    """
    folder = Path(source)
    if not is_adapter(folder):
        return inspect.describe(source, tensors=tensors)
    spec, config, trained = read_adapter(folder)
    return {
        "path": source,
        "kind": "adapter",
        "base": spec.source,
        "adapter": {"name": config.name} | json.loads(json.dumps(asdict(config))),
        "encoder": describe_encoder(spec),
        "bytes": sum(file.stat().st_size for file in folder.iterdir() if file.is_file()),
    } | count_tensors(trained, tensors)
