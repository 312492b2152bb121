"""Exports that TorchGeo's own tasks take as ``weights=PATH``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from geoexplora.errors import WeightsError
from geoexplora.models.geometry import Geometry
from geoexplora.registry import CUSTOM
from geoexplora.weights.exports.base import Content, Exporter, save_pickled, vit_outputs
from geoexplora.weights.spec import EncoderSpec

CLASSIFICATION_PREFIX = "model."
SEGMENTATION_PREFIX = "model.backbone.model.model."
_DPT_BLOCKS = 4


def name_of(spec: EncoderSpec) -> str:
    """The name by which timm builds exactly this encoder once ``geoexplora`` is imported, without a head.

    Args:
        spec: the encoder's description.
    """
    geometry = Geometry(
        image_size=spec.image_size,
        patch_size=spec.patch_size,
        channels=len(spec.bands),
        groups=None if spec.groups is None else tuple(map(tuple, spec.timm_args["groups"])),
        sizes=(spec.width, spec.depth, spec.heads) if spec.model == CUSTOM else None,
        style=replace(spec.style, channel_width=spec.timm_args.get("channel_width")),
    )
    return geometry.name("vit_tiny" if spec.model == CUSTOM else spec.model)


class TorchGeoExporter(Exporter):
    """A checkpoint of TorchGeo's ``Classification``, or of ``SemanticSegmentation`` with smp's DPT.

    Args:
        segmentation: for ``SemanticSegmentation``.
    """

    library = "TorchGeo"

    def __init__(self, segmentation: bool) -> None:
        self.segmentation = segmentation

    def prepare(self, content: Content) -> Content:
        """DPT taps four blocks."""
        if self.segmentation and content.spec.depth < _DPT_BLOCKS:
            raise WeightsError(
                f"TorchGeo's segmentation by DPT taps {_DPT_BLOCKS} blocks, the encoder has {content.spec.depth}",
                "Leave out --task segmentation: TorchGeo's Classification takes it.",
            )
        return content

    def write(self, content: Content, path: Path) -> None:
        """Write a checkpoint of plain types, which loads without running code."""
        prefix = SEGMENTATION_PREFIX if self.segmentation else CLASSIFICATION_PREFIX
        name = self._name(content.spec)
        checkpoint = {
            "hyper_parameters": {"backbone": name} if self.segmentation else {"model": name},
            "state_dict": {prefix + key: value for key, value in content.tensors.items()},
            "geoexplora": content.header(),
        }
        save_pickled(checkpoint, path)

    def outputs(self, content: Content, path: Path, image: Tensor) -> Mapping[str, Tensor]:
        """Build the task with the weights."""
        from torchgeo.tasks import Classification, SemanticSegmentation

        name, channels = self._name(content.spec), len(content.spec.bands)
        task: Any
        if self.segmentation:
            task = SemanticSegmentation("dpt", name, str(path), in_channels=channels, num_classes=2)
            model = task.model.encoder.model
        else:
            task = Classification(name, str(path), in_channels=channels, num_classes=2)
            model = task.model
        return vit_outputs(model.eval(), image, content.spec.pool)

    def usage(self, content: Content, path: Path) -> str:
        """The task with the weights."""
        name = self._name(content.spec)
        ours = "" if name == content.spec.timm_name else "import geoexplora; "
        task = "SemanticSegmentation" if self.segmentation else "Classification"
        model = f'model="dpt", backbone="{name}"' if self.segmentation else f'model="{name}"'
        return (
            f"{ours}from torchgeo.tasks import {task};"
            f" {task}({model}, weights={str(path)!r}, in_channels={len(content.spec.bands)}, num_classes=...)"
        )

    def _name(self, spec: EncoderSpec) -> str:
        if self.segmentation:
            return f"tu-{name_of(spec)}"
        # TorchGeo gives timm no other argument than the number of bands and classes
        return name_of(spec) if spec.timm_args.keys() - {"in_chans", "num_classes"} else spec.timm_name
