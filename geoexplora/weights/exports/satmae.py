"""Exports under the names of MAE's and SatMAE's files, with the decoder where there is one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from geoexplora.errors import WeightsError
from geoexplora.weights.exports.base import Content, Exporter, restyled, save_pickled, vit_outputs
from geoexplora.weights.files import read_weights
from geoexplora.weights.load import load_encoder

_BRANCHES = {"ls1": "attn.proj", "ls2": "mlp.fc2"}
"""LayerScale and the linear layer before it."""


class SatMAEExporter(Exporter):
    """``{"model": {...}}``; SatMAE's code may not be copied, so our own reader of its files checks it."""

    library = "geoexplora's reader of SatMAE's files"
    holds_decoder = True

    def prepare(self, content: Content) -> Content:
        """Put LayerScale, which these models do not know, into the layer before it: gamma * (W x + b)."""
        style = content.spec.style
        if unknown := [name for name in ("registers", "swiglu") if getattr(style, name)]:
            raise WeightsError(
                f"MAE's and SatMAE's models know no {' and no '.join(unknown)}, which the encoder has",
                "Export to timm, torchgeo or hf-dinov2 instead.",
            )
        if not style.layer_scale:
            return content
        tensors = dict(content.tensors)
        for block in range(content.spec.depth):
            for scale, linear in _BRANCHES.items():
                gamma = tensors.pop(f"blocks.{block}.{scale}.gamma")
                name = f"blocks.{block}.{linear}"
                tensors[f"{name}.weight"] = tensors[f"{name}.weight"] * gamma[:, None]
                tensors[f"{name}.bias"] = tensors[f"{name}.bias"] * gamma
        return replace(content, spec=restyled(content.spec, layer_scale=False), tensors=tensors)

    def write(self, content: Content, path: Path) -> None:
        """Write both encoder and decoder."""
        settings = {} if content.settings is None else {"decoder": json.dumps(dict(content.settings))}
        tensors = {**content.tensors, **content.decoder}
        save_pickled({"model": tensors, "geoexplora": content.header() | settings}, path)

    def outputs(self, content: Content, path: Path, image: Tensor) -> Mapping[str, Tensor]:
        """Read it as a file of SatMAE's."""
        weights = read_weights(path)
        if weights.decoder_tensors.keys() != content.decoder.keys():
            raise WeightsError("the decoder is not read back as it was written", "Please report this.")
        encoder, spec = load_encoder(weights)
        return vit_outputs(encoder, image, spec.pool)

    def usage(self, content: Content, path: Path) -> str:
        """As MAE's and SatMAE's scripts load it."""
        return f'import torch; model.load_state_dict(torch.load({str(path)!r}, weights_only=True)["model"])'
