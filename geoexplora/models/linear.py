"""Linear layers on oneDNN's fp32 matrix products where torch would take a slower library's.

On CPUs torch multiplies fp32 matrices with MKL, which is slow on AMD processors; oneDNN, which torch ships as well,
is faster there (``benchmarks/training_step.py``). bf16 and accelerators already take the fast path.

Shapes: ... leading sizes, I input width, O output width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

_HAS_ONEDNN = torch.backends.mkldnn.is_available()


def takes_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether a product of these fp32 matrices goes through oneDNN."""
    # oneDNN refuses empty products.
    plain = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and x.numel() > 0
    return plain and torch._C._get_mkldnn_enabled() and _HAS_ONEDNN and not torch.compiler.is_compiling()


def matmul(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute x W' + b without a graph, by the fastest library at hand.

    Args:
        x: (..., I).
        weight: (O, I), any strides.
        bias: (O,).

    Returns:
        (..., O).
    """
    if takes_onednn(x, weight):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


class _OneDNNLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # The input is needed for the weight's gradient only, and frozen weights have none.
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return matmul(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        grad = grad.contiguous()
        rows = grad.reshape(-1, grad.shape[-1])
        grad_x = matmul(grad, weight.T) if needs_x else None
        grad_weight = matmul(rows.T.contiguous(), x.reshape(-1, x.shape[-1]).T) if needs_weight else None
        return grad_x, grad_weight, rows.sum(0) if needs_bias else None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``torch.nn.functional.linear``, through oneDNN for fp32 on a CPU."""
    if not takes_onednn(x, weight) or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    return _OneDNNLinear.apply(x, weight, bias)


def _autocasts(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


class FastLinear(nn.Linear):
    """``torch.nn.Linear`` for training: fp32 by oneDNN on CPUs, frozen weights cast to bf16 once, not at each pass.

    torch's autocast keeps casts of weights that need gradients only; of a frozen one every pass of a step would make
    and save its own.
    """

    _kept: tuple[tuple[int, int, torch.dtype], Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., I) to (..., O)."""
        weight, bias = self.weight, self.bias
        if self.training and not weight.requires_grad and _autocasts(x.device.type):
            weight = self._cast(weight, torch.get_autocast_dtype(x.device.type))
        return linear(x, weight, bias)

    def train(self, mode: bool = True) -> FastLinear:
        """Switch between training and evaluation; casts are kept within a spell of training only."""
        # Writes through ``weight.data``, as peft merges LoRA, leave no trace that ``_cast`` could see.
        self._kept = None
        super().train(mode)
        return self

    def _cast(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight in another type, cast again only if it has changed."""
        state = (weight.data_ptr(), weight._version, dtype)
        if self._kept is None or self._kept[0] != state:
            self._kept = state, weight.detach().to(dtype)
        return self._kept[1]


def use_fast_linears(model: nn.Module) -> nn.Module:
    """Replace every plain ``nn.Linear`` by a ``FastLinear`` that holds the same parameters, in place."""
    for module in model.modules():
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                fast = FastLinear.__new__(FastLinear)
                fast.__dict__.update(child.__dict__)
                setattr(module, name, fast)
    return model
