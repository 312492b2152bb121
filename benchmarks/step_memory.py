"""Does a DINOv2 step of ExPLoRA fit into a GPU's memory? Bytes counted on a CPU, for ``pretrain_step.py``.

Bytes do not depend on the device where shapes, types and kernels' saved tensors are the same. So the model is built
without the package's paths for CPUs (attention in bf16, frozen weights cast by autocast at each call, as on a GPU), and
two small batches are run. Everything but the weights grows in proportion to the batch; a line through the two gives the
batch asked for. Not counted: what a kernel takes inside, the allocator's gaps, CUDA's own context (about 0.5 GiB).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any
from unittest import mock

import torch
from step_measure import DEVICE, adamw, distinct_bytes, held_tensors
from step_variants_dinov2 import HEADS, DINOv2Variant
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CARD = 16 * 2**30
VARIANT = DINOv2Variant("explora", "bf16")


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Counts what a forward pass saves for the backward pass, each storage once, without ``held`` tensors."""

    def __init__(self, held: Iterable[Tensor]) -> None:
        self._held = {tensor.untyped_storage()._cdata for tensor in held}
        self._saved: dict[int, Any] = {}
        super().__init__(self._pack, lambda tensor: tensor)

    @property
    def total(self) -> int:
        """In bytes."""
        return sum(storage.nbytes() for storage in self._saved.values())

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._held:
            self._saved[storage._cdata] = storage
        return tensor


class LiveBytes(TorchDispatchMode):
    """Follows the bytes of all living storages that operations give out, and of ``tensors`` from the start."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, int] = {}
        for tensor in tensors:
            self._take(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute, and take note of what came out."""
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._take(leaf)
        return out

    def _take(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._alive:
            return
        self._alive[storage._cdata] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, storage._cdata)  # torch keeps a storage's object as long as its memory

    def _free(self, key: int) -> None:
        self.now -= self._alive.pop(key)


def count_step(model: str, batch: int, checkpointing: bool) -> dict[str, Any]:
    """Bytes of a step on the CPU: what is held by kind, saved activations, and the peak of all that lives."""
    built = VARIANT.build(model, torch.device("cpu"), cpu_paths=False, checkpointing=checkpointing)
    optimizer = adamw(built)
    inputs = VARIANT.inputs(batch, torch.device("cpu"))
    for parameter in built.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # the moments come into being
    student = list(built.student.parameters())
    held = distinct_bytes(
        {"frozen weights": (p for p in student if not p.requires_grad), "trained weights": student}
        | {"teacher's own weights": built.teacher.parameters()}
        | held_tensors(built, optimizer)
    )
    optimizer.zero_grad()
    tensors = [tensor for group in held_tensors(built, optimizer).values() for tensor in group]
    saved = SavedBytes(tensors)
    with (
        torch.autocast("cpu", torch.bfloat16),
        mock.patch("geoexplora.explora.attention.attend", F.scaled_dot_product_attention),
        saved,
    ):
        output = built(*inputs, 0.07)
    result = {"batch": batch, "rows": VARIANT.rows(batch), "held": held, "saved": saved.total}
    del output, saved
    with (
        mock.patch("geoexplora.explora.attention.attend", F.scaled_dot_product_attention),
        LiveBytes([*tensors, *inputs]) as live,
    ):
        VARIANT.step(built, inputs, optimizer)()
    return result | {"peak": live.peak}
