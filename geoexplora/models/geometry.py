"""What the name of a registered model says of its sizes: ``group_channel_vit_base.s96_p8_g0-1-2-6_g3-4-5-7_g8-9``.

Libraries that build a timm model by its name alone, as TorchGeo's tasks do, pass no image size and no channel groups.
So these stand behind the name, where timm keeps the tag of pretrained weights.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from geoexplora.errors import WeightsError
from geoexplora.registry import Architecture, Style, usual_mlp_width

_PART = re.compile(r"([a-z]+)((?:\d+(?:-\d+)*)?)")
_REMEDY = (
    "Write for example s224_p16_c3, or s96_p8_g0-1-2-6_g3-4-5-7_g8-9: image size, patch size, and the number of bands"
    " or the bands of each channel group. geoexplora export tells the whole name of a model."
)


@dataclass(frozen=True)
class Geometry:
    """Sizes and style of a vision transformer, beside those of its architecture.

    The tag, joined by ``_``, every part at most once but for the groups, in this order:

    ======================= ==========================================================================================
    ``s96`` ``p8``          image and patch size in pixels
    ``c3``                  bands of a plain ViT
    ``g0-1-2-6``            a channel group: positions of its bands in the input, counted from 0; one for each group
    ``w192`` ``d12`` ``h3`` width, depth and heads, where they are not the architecture's
    ``e48``                 channel part of the width of a group-channel ViT, where it is not the architecture's
    ``ls`` ``r4``           LayerScale; number of register tokens
    ``swiglu`` ``m2048``    MLP gated by SiLU; outputs of the MLP's first layer, where they are not the usual ones
    ``cls`` ``avg``         the class token carries an encoding; the final norm comes after the mean of the patch tokens
    ======================= ==========================================================================================

    Attributes:
        image_size: image side in pixels.
        patch_size: patch side in pixels.
        channels: number of bands.
        groups: for each channel group the positions of its bands in the input; ``None`` for a plain ViT.
        sizes: width, depth and heads, where they are not the architecture's.
        style: what it has beside its sizes.
    """

    image_size: int
    patch_size: int
    channels: int
    groups: tuple[tuple[int, ...], ...] | None = None
    sizes: tuple[int, int, int] | None = None
    style: Style = field(default=Style())

    def __post_init__(self) -> None:
        """Check that the parts fit together.

        Raises:
            ValueError: if they do not; says what is wrong.
        """
        if min(self.image_size, self.patch_size, self.channels) < 1 or self.image_size % self.patch_size:
            raise ValueError(f"images of {self.image_size} px do not divide into patches of {self.patch_size} px")
        if self.groups is not None and sorted(chain(*self.groups)) != list(range(self.channels)):
            raise ValueError(f"the channel groups do not hold each of {self.channels} bands exactly once")
        if self.sizes is not None and (min(self.sizes) < 1 or self.sizes[0] % self.sizes[2]):
            raise ValueError("the width does not divide by the heads")
        if self.groups is None and (self.style.channel_width is not None or self.style.class_token_encoding):
            raise ValueError("e and cls are for models with channel groups")

    @property
    def tag(self) -> str:
        """The tag; models of the same tag are the same."""
        style = self.style
        parts = [f"s{self.image_size}", f"p{self.patch_size}"]
        parts += [f"c{self.channels}"] if self.groups is None else ["g" + "-".join(map(str, g)) for g in self.groups]
        if self.sizes is not None:
            parts += [f"{key}{value}" for key, value in zip("wdh", self.sizes, strict=True)]
        parts += [f"e{style.channel_width}"] * (style.channel_width is not None)
        parts += ["ls"] * style.layer_scale
        parts += [f"r{style.registers}"] * (style.registers > 0)
        parts += ["swiglu"] * style.swiglu
        parts += [f"m{style.mlp_width}"] * (style.mlp_width is not None)
        parts += ["cls"] * style.class_token_encoding
        parts += ["avg"] * style.pooled_norm
        return "_".join(parts)

    @classmethod
    def parse(cls, tag: str) -> Geometry:
        """Read a tag.

        Raises:
            WeightsError: if it is not one that ``tag`` gives; says what is wrong.
        """
        found: dict[str, list[tuple[int, ...]]] = {}
        for part in tag.split("_"):
            read = _PART.fullmatch(part)
            if read is None:
                raise WeightsError(f"cannot read {part!r} in {tag!r}", _REMEDY)
            found.setdefault(read[1], []).append(tuple(map(int, read[2].split("-"))) if read[2] else ())
        one = {key: values[0][0] for key, values in found.items() if values[0]}
        try:
            groups = tuple(found["g"]) if "g" in found else None
            geometry = cls(
                image_size=one["s"],
                patch_size=one["p"],
                channels=one["c"] if groups is None else len(list(chain(*groups))),
                groups=groups,
                sizes=(one["w"], one["d"], one["h"]) if "w" in one else None,
                style=Style(
                    layer_scale="ls" in found,
                    registers=one.get("r", 0),
                    swiglu="swiglu" in found,
                    mlp_width=one.get("m"),
                    channel_width=one.get("e"),
                    class_token_encoding="cls" in found,
                    pooled_norm="avg" in found,
                ),
            )
        except KeyError as missing:
            raise WeightsError(f"{tag!r} lacks the part {missing}", _REMEDY) from missing
        except ValueError as problem:
            raise WeightsError(f"{tag!r} describes no model: {problem}", _REMEDY) from problem
        if geometry.tag != tag:  # unknown, repeated or swapped parts: one model has one name
            raise WeightsError(f"{tag!r} is no tag of a model; the nearest is {geometry.tag!r}", _REMEDY)
        return geometry

    def name(self, model: str) -> str:
        """The name to give to ``timm.create_model`` once ``geoexplora`` is imported.

        Args:
            model: name in ``geoexplora.registry.MODELS``; which one does not matter where there are ``sizes``.
        """
        return f"{'plain' if self.groups is None else 'group_channel'}_{model}.{self.tag}"

    def arguments(self, architecture: Architecture) -> dict[str, Any]:
        """Arguments of timm's ``VisionTransformer`` and of ``GroupChannelVisionTransformer``.

        Args:
            architecture: the sizes where there are none of its own.
        """
        style = self.style
        width, depth, heads = self.sizes or (architecture.width, architecture.depth, architecture.heads)
        arguments: dict[str, Any] = {
            "img_size": self.image_size,
            "patch_size": self.patch_size,
            "embed_dim": width,
            "depth": depth,
            "num_heads": heads,
            "init_values": 1e-5 if style.layer_scale else None,  # DINOv2's; loaded weights replace it
            "reg_tokens": style.registers,
            "swiglu": style.swiglu,
        }
        if style.swiglu or style.mlp_width is not None:
            # timm truncates the product with the width, so half an output more gives the wanted number
            arguments["mlp_ratio"] = ((style.mlp_width or usual_mlp_width(width, style.swiglu)) + 0.5) / width
        if style.pooled_norm:
            arguments["global_pool"] = "avg"
        if self.groups is None:
            return arguments | {"in_chans": self.channels, "no_embed_class": style.registers > 0}
        return arguments | {
            "groups": self.groups,
            "channel_width": style.channel_width or architecture.channel_width,
            "class_token_encoding": style.class_token_encoding,
        }
