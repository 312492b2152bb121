"""Makes the models known to timm: ``plain_*`` and ``group_channel_*``, with or without a geometry behind the name."""

from __future__ import annotations

from typing import Any

from timm.layers import SwiGLUPacked, to_2tuple
from timm.models import build_model_with_cfg, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from geoexplora.bands import FMOW_SENTINEL_BANDS, FMOW_SENTINEL_GROUPS, SENTINEL2, resolve_groups
from geoexplora.errors import WeightsError
from geoexplora.models.geometry import Geometry
from geoexplora.models.group_channel_vit import GroupChannelVisionTransformer
from geoexplora.registry import MODELS, Architecture

_SATMAE_GROUPS = resolve_groups(FMOW_SENTINEL_GROUPS, FMOW_SENTINEL_BANDS, SENTINEL2)
_DEFAULTS = {
    "plain": (VisionTransformer, Geometry(224, 16, 3)),
    "group_channel": (GroupChannelVisionTransformer, Geometry(96, 8, len(FMOW_SENTINEL_BANDS), _SATMAE_GROUPS)),
}


def _register(kind: str, model: str, architecture: Architecture) -> None:
    name = f"{kind}_{model}"
    built, default = _DEFAULTS[kind]

    def create(pretrained: bool = False, pretrained_cfg: Any = None, **kwargs: Any) -> nn.Module:
        geometry, settings = default, pretrained_cfg
        if isinstance(pretrained_cfg, str):  # what stands behind the dot of the name
            geometry, settings = _read(name, pretrained_cfg, kwargs.get("in_chans")), None
        if pretrained and settings is None:
            raise WeightsError(f"{name} has no weights of its own", "Load a file: geoexplora.load_encoder(path).")
        arguments = geometry.arguments(architecture) | kwargs
        if arguments.pop("swiglu"):  # an argument in plain JSON types for DINOv2's gated MLP
            arguments |= {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU}
        return build_model_with_cfg(
            built, name, pretrained=pretrained, pretrained_cfg=settings or _settings(arguments),
            feature_cfg={"out_indices": 3, "feature_cls": "getter"}, **arguments,
        )  # fmt: skip

    create.__name__ = name
    create.__doc__ = (
        f"A {kind.replace('_', '-')} {model}, of the sizes that stand behind its name or of the usual ones."
    )
    register_model(create)


def _read(name: str, tag: str, channels: int | None) -> Geometry:
    geometry = Geometry.parse(tag)
    kind = "plain" if geometry.groups is None else "group_channel"
    if not name.startswith(kind):
        raise WeightsError(f"{name} cannot have the sizes {tag}", f"They are of a {kind}_* model.")
    if channels not in {None, geometry.channels}:
        raise WeightsError(
            f"{name}.{tag} takes {geometry.channels} bands, not {channels}",
            f"Give in_channels={geometry.channels} to TorchGeo's tasks, in_chans={geometry.channels} to timm.",
        )
    return geometry


def _settings(arguments: dict[str, Any]) -> dict[str, Any]:
    """What other libraries read of a model: timm's ``pretrained_cfg``."""
    groups = arguments.get("groups")
    channels = arguments["in_chans"] if groups is None else sum(len(group) for group in groups)
    return {
        "num_classes": 0,
        "classifier": "head",
        "input_size": (channels, *to_2tuple(arguments["img_size"])),
        "fixed_input_size": True,
        "first_conv": "patch_embed.proj" if groups is None else None,
    }


for _kind in _DEFAULTS:
    for _model, _architecture in MODELS.items():
        _register(_kind, _model, _architecture)
