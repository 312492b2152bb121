"""Exports for stock timm, and our own files, which hold the same tensors under the same names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor

from geoexplora.weights.exports.base import Content, Exporter, save_pickled, scaling, vit_outputs
from geoexplora.weights.load import load_encoder
from geoexplora.weights.write import save_encoder

HUB_WEIGHTS, HUB_CONFIG = "model.safetensors", "config.json"


class SafetensorsExporter(Exporter):
    """``encoder.safetensors`` of this package."""

    library = "geoexplora"

    def write(self, content: Content, path: Path) -> None:
        """Write the file."""
        _save(path, content)

    def outputs(self, content: Content, path: Path, image: Tensor) -> Mapping[str, Tensor]:
        """Load by ``load_encoder``."""
        encoder, spec = load_encoder(path)
        return vit_outputs(encoder, image, spec.pool)

    def usage(self, content: Content, path: Path) -> str:
        """Read the description along."""
        return f"import geoexplora; geoexplora.load_encoder({str(path)!r})"


class TimmExporter(Exporter):
    """A folder as timm keeps models on the Hugging Face hub, or the weights alone.

    The weights' header is that of our own files. TorchGeo's ``Classification("local-dir:PATH", weights=True)`` takes
    the folder too, of a plain ViT without importing this package.
    """

    library = "timm"

    def write(self, content: Content, path: Path) -> None:
        """Write the folder, or the weights alone."""
        if path.suffix == ".pth":
            save_pickled(content.tensors, path)
            return
        folder = path.suffix != ".safetensors"
        file = path / HUB_WEIGHTS if folder else path
        _save(file, content)
        if folder:
            (path / HUB_CONFIG).write_text(json.dumps(_config(content), indent=2) + "\n", encoding="utf-8")

    def outputs(self, content: Content, path: Path, image: Tensor) -> Mapping[str, Tensor]:
        """Load the folder as timm does, or the weights strictly into the model of their name."""
        if path.is_dir():
            model: Any = timm.create_model(f"local-dir:{path}", pretrained=True)
        else:
            model = timm.create_model(content.spec.timm_name, **content.spec.timm_args)
            weights = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
            model.load_state_dict(weights, strict=True)
        return vit_outputs(model.eval(), image, content.spec.pool)

    def usage(self, content: Content, path: Path) -> str:
        """Folders load by their name."""
        spec = content.spec
        imports = "import timm" if spec.groups is None else "import geoexplora, timm"
        if path.suffix not in {".safetensors", ".pth"}:
            return f"{imports}; timm.create_model({f'local-dir:{path}'!r}, pretrained=True)"
        arguments = "".join(f", {name}={value!r}" for name, value in spec.timm_args.items())
        return f'{imports}; timm.create_model("{spec.timm_name}"{arguments}, checkpoint_path={str(path)!r})'


def _save(path: Path, content: Content) -> None:
    known: dict[str, Any] = {"step": content.step, "trained": content.trained, "assumed": content.assumed}
    save_encoder(path, content.tensors, content.spec, **known)


def _config(content: Content) -> dict[str, Any]:
    spec = content.spec
    settings: dict[str, Any] = {
        "custom_load": False,
        "input_size": [len(spec.bands), spec.image_size, spec.image_size],
        "fixed_input_size": True,
        "num_classes": 0,
        "classifier": "head",
    }
    if spec.groups is None and len(spec.bands) == 3:
        settings["first_conv"] = "patch_embed.proj"  # older timm takes any stem that it knows of for one of RGB
    if (scaled := scaling(spec)) is not None:
        settings |= dict(zip(("mean", "std"), scaled, strict=True))
    return {
        "architecture": spec.timm_name,
        "num_classes": 0,
        "num_features": spec.width,
        "global_pool": "avg" if spec.style.pooled_norm else "token",
        "model_args": dict(spec.timm_args),
        "pretrained_cfg": settings,
    }
