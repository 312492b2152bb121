"""Query, key and value projections with LoRA in one product: W + BA merged forward, low-rank backward.

peft's own forward makes three more passes over (N, O) and (N, I) matrices for each LoRA layer. Parameters, saving and
merging remain peft's.

Shapes: B batch, N tokens, D width, r rank.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from geoexplora.models.linear import matmul

Factors = tuple[Tensor, Tensor, float]


def is_fusible(layer: Any) -> bool:
    """Whether ``lora_projections`` computes what the layer itself would.

    It does for a plain linear layer with frozen parameters, bare or with one LoRA adapter that is no more than s BA.
    DoRA, dropout, several adapters, merged or disabled ones, and other methods such as AdaLoRA are peft's to compute.
    """
    base = base_layer(layer)
    if not isinstance(base, nn.Linear) or any(parameter.requires_grad for parameter in base.parameters()):
        return False
    if base is layer:
        return True
    adapters = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.merged or layer.disable_adapters or layer.lora_variant or len(adapters) != 1:
        return False
    return isinstance(layer.lora_dropout[adapters[0]], nn.Identity) and layer.lora_B[adapters[0]].bias is None


def lora_factors(layer: Any) -> Factors | None:
    """The factors A (r, D), B (D, r) and the scale of a fusible layer's LoRA, or ``None`` if it carries none."""
    if not _carries_lora(layer):
        return None
    name = next(name for name in layer.active_adapters if name in layer.lora_A)
    down, up = (factors[name].weight for factors in (layer.lora_A, layer.lora_B))
    return down, up, layer.scaling[name]


def base_layer(layer: Any) -> Any:
    """The projection itself, without its LoRA."""
    return layer.get_base_layer() if _carries_lora(layer) else layer


def _carries_lora(layer: Any) -> bool:
    return isinstance(layer, LoraLinear)


class _LoRAProjections(torch.autograd.Function):
    """Several projections of one input, their weights frozen, some with LoRA.

    ``tensors`` holds weight, bias, A and B of each projection (bias, A, B may be None).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scales: tuple[float, ...], *tensors: Tensor | None) -> Tensor:
        weight, bias = _merge(scales, tensors, x.dtype)
        ctx.save_for_backward(x, *tensors)
        ctx.scales = scales
        return matmul(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, *tensors = ctx.saved_tensors
        grad = grads[0].contiguous()
        grad_x = None
        if ctx.needs_input_grad[0]:
            # Merging again costs r D^2, keeping the merged weights costs 3 D^2 floats a block.
            grad_x = matmul(grad, _merge(ctx.scales, tensors, grad.dtype)[0].T)
        rows = x.flatten(0, -2)
        out: list[Tensor | None] = []
        for part, scale, down, up in zip(
            grad.flatten(0, -2).chunk(len(ctx.scales), dim=1), ctx.scales, tensors[2::4], tensors[3::4], strict=True
        ):
            out += [None, None]
            if down is None:
                out += [None, None]
                continue
            low, grad_low = rows @ down.T.to(rows.dtype), part @ up.to(part.dtype)
            out += [(grad_low.T @ rows).to(down.dtype).mul_(scale), (part.T @ low).to(up.dtype).mul_(scale)]
        return grad_x, None, *out


def _merge(scales: tuple[float, ...], tensors: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    weights, biases = [], []
    for scale, weight, bias, down, up in zip(
        scales, tensors[0::4], tensors[1::4], tensors[2::4], tensors[3::4], strict=True
    ):
        # peft may keep factors in fp32 beside weights in bf16.
        weights.append(weight if down is None else torch.addmm(weight.to(up.dtype), up, down, alpha=scale))
        biases.append(bias)
    merged = torch.cat([weight.to(dtype) for weight in weights])
    return merged, None if biases[0] is None else torch.cat(biases).to(dtype)


def lora_projections(x: Tensor, layers: tuple[nn.Module, ...]) -> Tensor:
    """Apply projections of equal size to one input.

    Args:
        x: (B, N, D).
        layers: linear layers, with or without peft's LoRA, for which ``is_fusible`` holds.

    Returns:
        (B, N, len(layers) * D), the outputs side by side.
    """
    scales, tensors = [], []
    for layer in layers:
        down, up, scale = lora_factors(layer) or (None, None, 0.0)
        base = base_layer(layer)
        scales.append(scale)
        tensors += [base.weight, base.bias, down, up]
    device = x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return _LoRAProjections.apply(x, tuple(scales), *tensors)
    with torch.autocast(device, enabled=False):
        return _LoRAProjections.apply(x.to(torch.get_autocast_dtype(device)), tuple(scales), *tensors)
