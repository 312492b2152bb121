"""Meta's masked autoencoders (He et al., CVPR 2022, arXiv 2111.06377): ``mae_pretrain_vit_*``, ``mae_visualize_vit_*``.

Their encoder has timm's names already. They were trained on images scaled to 0-1 and standardized by ImageNet's
statistics, at 224 px, with fixed sin-cos position encodings. The second kind holds the decoder as well.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import isqrt
from pathlib import Path
from typing import Any

from torch import Tensor

from geoexplora.bands import IMAGENET_STATISTICS, RGB
from geoexplora.errors import WeightsError
from geoexplora.registry import MODELS
from geoexplora.weights.spec import EncoderSpec

_NEEDED = ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "norm.weight")


def recognises_meta_mae(content: Mapping[str, Any]) -> bool:
    """Whether a pickled file is one of Meta's MAE models: a plain ViT under ``model``, without LayerScale."""
    state = content.get("model")
    return isinstance(state, Mapping) and all(name in state for name in _NEEDED) and "blocks.0.ls1.gamma" not in state


def read_meta_mae(
    path: Path, state: Mapping[str, Any]
) -> tuple[EncoderSpec | None, dict[str, Tensor], dict[str, Any] | None]:
    """Describe the model and give its tensors under canonical names, which are the file's own.

    Args:
        path: the file, for messages.
        state: what stands under ``model``.

    Returns:
        The description (None if the sizes are of no model known here), the tensors, and the decoder's settings.

    Raises:
        WeightsError: if an entry is not a tensor, or the tensors do not fit together.
    """
    strange = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if strange:
        raise WeightsError(f"{path}: {', '.join(strange[:5])} is no tensor", "Take another copy of the file.")
    tensors = dict(state)
    width, channels, patch, _ = _kernel(path, tensors)
    depth = _depth(tensors, "blocks")
    positions = tensors["pos_embed"].shape[1] - 1
    side = isqrt(positions)
    if side * side != positions:
        raise WeightsError(f"{path}: {positions} positions are no square grid", "Take another copy of the file.")
    names = [name for name, known in MODELS.items() if (known.width, known.depth) == (width, depth)]
    spec = None
    if len(names) == 1 and channels == 3:
        statistics = IMAGENET_STATISTICS
        spec = EncoderSpec.of(
            names[0],
            image_size=side * patch,
            patch_size=patch,
            sensor=RGB.name,
            bands=RGB.band_names,
            normalization={
                "method": "standardize",
                "bands": list(statistics.bands),
                "mean": list(statistics.mean),
                "std": list(statistics.std),
            },
        )
    if "decoder_embed.weight" not in tensors:
        return spec, tensors, None
    decoder = {"width": tensors["decoder_embed.weight"].shape[0], "depth": _depth(tensors, "decoder_blocks")}
    return spec, tensors, decoder


def _kernel(path: Path, tensors: Mapping[str, Tensor]) -> tuple[int, int, int, int]:
    shape = tuple(tensors["patch_embed.proj.weight"].shape)
    if len(shape) != 4:
        raise WeightsError(f"{path}: patch_embed.proj.weight has shape {shape}", "Take another copy of the file.")
    return shape


def _depth(tensors: Mapping[str, Tensor], blocks: str) -> int:
    found = (re.match(rf"{blocks}\.(\d+)\.", name) for name in tensors)
    return 1 + max((int(match[1]) for match in found if match), default=-1)
