"""What is exported, and what every format must be able to do with it.

Shapes: B batch, C bands, S image side, N tokens, D width, G channel groups.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from geoexplora.bands import RGB
from geoexplora.transforms.normalization import WIDTH
from geoexplora.weights.load import build_encoder
from geoexplora.weights.spec import EncoderSpec


@dataclass(frozen=True)
class Content:
    """An encoder to export, merged and plain, with what is known of it.

    Attributes:
        spec: what the encoder is.
        tensors: its tensors under timm's names, queries, keys and values fused.
        decoder: the tensors of its decoder under Meta's names; empty if it has none.
        settings: the decoder's settings, if it has one.
        step: the optimizer step it was taken at, if known.
        trained: which parts were trained, if known.
        assumed: what of the description was taken for granted when the encoder was read.
    """

    spec: EncoderSpec
    tensors: Mapping[str, Tensor]
    decoder: Mapping[str, Tensor] = field(default_factory=dict)
    settings: Mapping[str, Any] | None = None
    step: int | None = None
    trained: Any = None
    assumed: tuple[str, ...] = ()

    def header(self) -> dict[str, str]:
        """The description as our own files have it, to be read back from others'."""
        header = self.spec.to_metadata()
        if self.step is not None:
            header["step"] = str(self.step)
        for name in ("trained", "assumed"):
            if value := getattr(self, name):
                header[name] = json.dumps(value)
        return header

    def to(self, dtype: torch.dtype) -> Content:
        """The same with floating-point tensors of another type."""
        return replace(self, tensors=_to(self.tensors, dtype), decoder=_to(self.decoder, dtype))

    def build(self) -> Any:
        """The encoder, in evaluation mode and single precision."""
        with torch.device("meta"):
            model = build_encoder(self.spec)
        model.load_state_dict(_to(self.tensors, torch.float32), strict=True, assign=True)
        return model.eval()


def _to(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in tensors.items()}


def save_pickled(content: Mapping[str, Any], path: Path) -> None:
    """Write what ``torch.load(weights_only=True)`` reads: mappings, strings and tensors.

    Args:
        content: what to write.
        path: the file.

    Raises:
        OSError: if it cannot be written.
    """
    with path.open("wb") as file:  # given the path, torch's own writer does not say why it failed
        torch.save(dict(content), file)


class Exporter(ABC):
    """A format: how it is written, and how its own library reads it.

    Attributes:
        library: who reads it, for messages.
        holds_decoder: whether the decoder is written as well.
    """

    library: str
    holds_decoder = False

    def prepare(self, content: Content) -> Content:
        """Bring an encoder into the form that the format can hold.

        Args:
            content: the encoder, in single precision.

        Returns:
            One of the same outputs.

        Raises:
            WeightsError: if the format cannot hold it, or a library is missing.
        """
        return content

    @abstractmethod
    def write(self, content: Content, path: Path) -> None:
        """Write what ``prepare`` returned to a file or folder that does not exist yet."""

    @abstractmethod
    def outputs(self, content: Content, path: Path, image: Tensor) -> Mapping[str, Tensor]:
        """Load what was written in its library, and run it.

        Args:
            content: what was written.
            path: where.
            image: (B, C, S, S), normalized.

        Returns:
            Any of what ``vit_outputs`` returns, in single precision.
        """

    @abstractmethod
    def usage(self, content: Content, path: Path) -> str:
        """The Python line that loads it."""


def vit_outputs(model: Any, image: Tensor, pool: str) -> dict[str, Tensor]:
    """What a timm-style ViT makes of images.

    Args:
        model: the ViT, in evaluation mode.
        image: (B, C, S, S), normalized.
        pool: ``mean`` or ``cls``.

    Returns:
        ``tokens`` (B, N, D), after the final norm unless that comes after pooling, and ``features``: the mean of the
        patch tokens of each channel group, side by side (B, G * D), or the class token (B, D).
    """
    tokens = model.forward_features(image)
    if pool == "cls":
        features = tokens[:, 0]
    elif isinstance(model.norm, nn.Identity):  # its norm comes after pooling
        features = model.forward_head(tokens, pre_logits=True)
    else:
        groups = getattr(model, "num_groups", 1)
        features = tokens[:, model.num_prefix_tokens :].unflatten(1, (groups, -1)).mean(2).flatten(1)
    return {"tokens": tokens, "features": features}


def restyled(spec: EncoderSpec, **changes: Any) -> EncoderSpec:
    """The description of the same encoder in another style, such as ``layer_scale=False``."""
    return EncoderSpec.of(
        spec.model, image_size=spec.image_size, patch_size=spec.patch_size, sensor=spec.sensor, bands=spec.bands,
        normalization=spec.normalization, groups=spec.groups, antialias=spec.antialias, source=spec.source,
        band_init=spec.band_init, patch_resize=spec.patch_resize, pool=spec.pool, style=replace(spec.style, **changes),
        sizes=(spec.width, spec.depth, spec.heads),
    )  # fmt: skip


def scaling(spec: EncoderSpec) -> tuple[list[float], list[float]] | None:
    """Mean and deviation that normalize images of 0..1, for libraries of photographs; ``None`` if there are none.

    The clipping methods also cut off what lies outside 0..1 afterwards, which those libraries do not.
    """
    if spec.sensor != RGB.name or not spec.normalization:
        return None
    mean, std = list(spec.normalization["mean"]), list(spec.normalization["std"])
    if spec.normalization["method"] != "standardize":
        mean, std = [m - WIDTH * s for m, s in zip(mean, std, strict=True)], [2 * WIDTH * s for s in std]
    return [value / 255 for value in mean], [value / 255 for value in std]
