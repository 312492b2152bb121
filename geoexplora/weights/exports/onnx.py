"""Exports to ONNX, checked through onnxruntime.

Shapes: B batch, C bands, S image side, N tokens, F features.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from geoexplora.errors import WeightsError
from geoexplora.weights.exports.base import Content, Exporter, vit_outputs

OUTPUTS = ("tokens", "features")
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_TRACED_BATCH = 3


class OnnxExporter(Exporter):
    """A graph from ``image`` (B, C, S, S), normalized, to ``tokens`` (B, N, D) and ``features`` (B, F).

    B is free. The model's properties hold the description. Above 2 GB the weights stand in a second file beside it.
    """

    library = "onnxruntime"

    def prepare(self, content: Content) -> Content:
        """Check that the packages are there."""
        if missing := [name for name in _PACKAGES if importlib.util.find_spec(name) is None]:
            verb = "is" if len(missing) == 1 else "are"
            raise WeightsError(
                f"{' and '.join(missing)}, which exports to ONNX need, {verb} not installed",
                'Install them: pip install "geoexplora[onnx]".',
            )
        return content

    def write(self, content: Content, path: Path) -> None:
        """Trace the encoder and write its graph, with the description instead of the traces of this machine."""
        import onnx

        spec = content.spec
        # Nothing but its size matters; the batch must not be 1, which torch would take for a constant
        example = torch.zeros(_TRACED_BATCH, len(spec.bands), spec.image_size, spec.image_size)
        with _quiet():
            program: Any = torch.onnx.export(
                _Outputs(content.build(), spec.pool).eval(), (example,), dynamo=True, verbose=False,
                input_names=["image"], output_names=list(OUTPUTS),
                dynamic_shapes={"image": {0: torch.export.Dim("batch")}},
            )  # fmt: skip
            program.save(path)
        model = onnx.load(path, load_external_data=False)
        graph = model.graph
        for part in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
            del part.metadata_props[:]  # stack traces with the paths of this machine's files
            part.doc_string = ""
        onnx.helper.set_model_props(model, content.header())
        onnx.save(model, path)

    def outputs(self, content: Content, path: Path, image: Tensor) -> Mapping[str, Tensor]:
        """Run it on the CPU, with another batch size than that of the trace."""
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        values = session.run(list(OUTPUTS), {"image": image.numpy()})
        return dict(zip(OUTPUTS, map(torch.from_numpy, values), strict=True))

    def usage(self, content: Content, path: Path) -> str:
        """Tokens and features of one batch of normalized images."""
        return f'import onnxruntime; onnxruntime.InferenceSession({str(path)!r}).run(None, {{"image": images}})'


class _Outputs(nn.Module):
    """Names what the graph gives.

    Args:
        encoder: a timm-style ViT.
        pool: ``mean`` or ``cls``.
    """

    def __init__(self, encoder: nn.Module, pool: str) -> None:
        super().__init__()
        self.encoder, self.pool = encoder, pool

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and features of images (B, C, S, S)."""
        outputs = vit_outputs(self.encoder, image, self.pool)
        return outputs["tokens"], outputs["features"]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks about its own steps."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
