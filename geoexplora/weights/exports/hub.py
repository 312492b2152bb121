"""Exports for Hugging Face's transformers: ``Dinov2Model`` and ``Dinov2WithRegistersModel``.

Shapes: D width, M hidden width of the MLP.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from geoexplora.errors import WeightsError
from geoexplora.registry import usual_mlp_width
from geoexplora.weights.exports.base import Content, Exporter, restyled, scaling
from geoexplora.weights.spec import EncoderSpec

WEIGHTS, CONFIG, PREPROCESSOR = "model.safetensors", "config.json", "preprocessor_config.json"
_OTHERS = "Export to timm or torchgeo instead."
_RENAMES = (
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^reg_token$", "embeddings.register_tokens"),
    (r"^cls_token$", "embeddings.cls_token"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^norm\.", "layernorm."),
    (r"^blocks\.(\d+)\.", r"encoder.layer.\1."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.ls([12])\.gamma$", r".layer_scale\1.lambda1"),
)
_SWIGLU_RENAMES = ((r"\.mlp\.fc1\.", ".mlp.weights_in."), (r"\.mlp\.fc2\.", ".mlp.weights_out."))


class HubExporter(Exporter):
    """A folder as transformers saves DINOv2."""

    library = "transformers"

    def prepare(self, content: Content) -> Content:
        """Give it LayerScale, which Dinov2Model always has: by ones, which change nothing."""
        spec = content.spec
        if spec.groups is not None:
            raise WeightsError("transformers' Dinov2Model knows no channel groups, which the encoder has", _OTHERS)
        if spec.style.pooled_norm:
            raise WeightsError("transformers' Dinov2Model has its norm before pooling, the encoder behind it", _OTHERS)
        _mlp_ratio(spec)
        if spec.style.layer_scale:
            return content
        gammas = {
            f"blocks.{block}.ls{branch}.gamma": torch.ones(spec.width)
            for block in range(spec.depth)
            for branch in (1, 2)
        }
        tensors = {**content.tensors, **gammas}
        return replace(content, spec=restyled(spec, layer_scale=True), tensors=tensors)

    def write(self, content: Content, path: Path) -> None:
        """Write weights, configuration and, where it tells all of the normalization, that of the image processor."""
        path.mkdir()
        save_file(_renamed(content), path / WEIGHTS, {"format": "pt"})
        _write(path / CONFIG, _config(content))
        scaled = scaling(content.spec)
        if scaled is not None and content.spec.normalization["method"] == "standardize":
            _write(path / PREPROCESSOR, _preprocessor(content.spec.image_size, *scaled))

    def outputs(self, content: Content, path: Path, image: Tensor) -> Mapping[str, Tensor]:
        """Load without a missing or surplus tensor."""
        import transformers

        with _silent(transformers):
            model, report = getattr(transformers, _class(content.spec)).from_pretrained(
                path, torch_dtype=torch.float32, output_loading_info=True
            )
        # The mask token stands for hidden patches, of which a finished encoder sees none
        wrong = {*report["missing_keys"], *report["unexpected_keys"]} - {"embeddings.mask_token"}
        if wrong:
            raise WeightsError(
                f"transformers {transformers.__version__} does not find its own names: {', '.join(sorted(wrong)[:5])}",
                "Please report this with the version of transformers.",
            )
        return {"tokens": model.eval()(pixel_values=image).last_hidden_state}

    def usage(self, content: Content, path: Path) -> str:
        """By the class that the configuration names."""
        return f"import transformers; transformers.AutoModel.from_pretrained({str(path)!r})"


def _class(spec: EncoderSpec) -> str:
    return "Dinov2WithRegistersModel" if spec.style.registers else "Dinov2Model"


def _mlp_ratio(spec: EncoderSpec) -> int:
    """The ``mlp_ratio``, a whole number there, from which Dinov2Model makes this MLP width.

    Raises:
        WeightsError: if there is none.
    """
    gated, width = spec.style.swiglu, spec.width
    wanted = spec.style.mlp_width or usual_mlp_width(width, gated)
    for ratio in range(1, 33):
        made = 2 * ((width * ratio * 2 // 3 + 7) // 8 * 8) if gated else width * ratio
        if made == wanted:
            return ratio
    raise WeightsError(f"transformers' Dinov2Model cannot have an MLP {wanted} wide on tokens {width} wide", _OTHERS)


def _renamed(content: Content) -> dict[str, Tensor]:
    """Tensors under the names of transformers' files; queries, keys and values apart."""
    rules = _RENAMES + _SWIGLU_RENAMES * content.spec.style.swiglu
    tensors = {}
    for name, value in content.tensors.items():
        if name == "pos_embed" and content.spec.style.registers:  # no position is added to timm's class token there
            value = torch.cat([torch.zeros_like(value[:, :1]), value], dim=1)
        new = name
        for pattern, replacement in rules:
            new = re.sub(pattern, replacement, new)
        if ".attn.qkv." not in new:
            tensors[new] = value.contiguous()
            continue
        for part, chunk in zip(("query", "key", "value"), value.chunk(3), strict=True):
            tensors[new.replace(".attn.qkv.", f".attention.attention.{part}.")] = chunk.clone()
    # Hidden patches occur in pre-training only; the model with registers always has a token for them
    mask_token = {"embeddings.mask_token": tensors["embeddings.cls_token"].new_zeros(1, content.spec.width)}
    return tensors | (mask_token if content.spec.style.registers else {})


def _config(content: Content) -> dict[str, Any]:
    spec, style = content.spec, content.spec.style
    registers = {"num_register_tokens": style.registers} if style.registers else {"use_mask_token": False}
    return {
        "architectures": [_class(spec)],
        "model_type": "dinov2_with_registers" if style.registers else "dinov2",
        "hidden_size": spec.width,
        "num_hidden_layers": spec.depth,
        "num_attention_heads": spec.heads,
        "mlp_ratio": _mlp_ratio(spec),
        "use_swiglu_ffn": style.swiglu,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "qkv_bias": True,
        "image_size": spec.image_size,
        "patch_size": spec.patch_size,
        "num_channels": len(spec.bands),
        "torch_dtype": str(content.tensors["cls_token"].dtype).removeprefix("torch."),
        "geoexplora": content.header(),
    } | registers


def _preprocessor(size: int, mean: list[float], std: list[float]) -> dict[str, Any]:
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": round(size / 0.875)},
        "resample": 3,  # bicubic, as in our own evaluation
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": std,
    }


def _write(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _silent(transformers: Any) -> Iterator[None]:
    """Without transformers' own progress bars and reports."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
