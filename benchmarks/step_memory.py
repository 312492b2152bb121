"""Does a DINOv2 step of ExPLoRA fit into a GPU's memory? Bytes counted on a CPU, for ``training_step.py``.

Bytes do not depend on the device where shapes, types and kernels' saved tensors are the same. So the model is built
without the package's paths for CPUs (attention in bf16, frozen weights cast by autocast at each call, as on a GPU), and
two small batches are run. All but what is held grows with the batch; a line through the two gives the batch asked for.
Hidden tokens grow by jumps: the JSON has their number on the line (``at_batch``) beside that of the batch itself
(``drawn_at_batch``). Not counted: what a kernel takes inside, the allocator's gaps, CUDA's own context (about 0.5 GiB).
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

from geoexplora.objectives.dinov2 import DINOv2

CARD = 16 * 2**30
VARIANT = DINOv2Variant("explora", "bf16")
COUNTED = (2, 4)
"""Batches that are run; KoLeo needs two images."""


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Counts what a forward pass saves for the backward pass, each storage once, without ``held`` tensors."""

    def __init__(self, held: Iterable[Tensor]) -> None:
        self._held = {tensor.untyped_storage()._cdata for tensor in held}
        self._saved: dict[int, Any] = {}
        super().__init__(self._pack, lambda tensor: tensor)

    def take_total(self) -> int:
        """The bytes until now; lets go of what was counted, which could else not be freed."""
        total = sum(storage.nbytes() for storage in self._saved.values())
        self._saved.clear()
        return total

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


def build(model: str, checkpointing: bool) -> DINOv2:
    """The student and teacher that a GPU would train, with the recipe's stochastic depth."""
    return VARIANT.build(model, cpu_paths=False, checkpointing=checkpointing, drop_path_rate=0.3)


def count_step(model: str, batch: int, checkpointing: bool) -> dict[str, Any]:
    """Bytes of a step: what is held by kind, what is saved for the backward pass, and the peak of all that lives."""
    built, inputs = build(model, checkpointing), VARIANT.inputs(batch)
    optimizer = adamw(built)
    held: dict[str, int] = {}
    optimizer.register_step_post_hook(lambda *_: held.update(distinct_bytes(kinds(built, optimizer))))
    with mock.patch("geoexplora.explora.attention.attend", F.scaled_dot_product_attention):
        VARIANT.step(built, inputs, optimizer)()  # the moments come into being
        lasting = [tensor for group in held_tensors(built, optimizer).values() for tensor in group]
        saved = SavedBytes([*lasting, *inputs])
        with LiveBytes([*lasting, *inputs]) as live:
            with saved:
                loss = VARIANT.loss(built, inputs)
            activations = saved.take_total()
            loss.backward()
            optimizer.step()
    return {"rows": VARIANT.rows(batch), "held": held, "activations": activations, "peak": live.peak}


def kinds(model: DINOv2, optimizer: torch.optim.Optimizer) -> dict[str, Iterable[Tensor]]:
    """What is held, by kind; ``distinct_bytes`` counts a tensor where it comes first."""
    rest = held_tensors(model, optimizer)
    del rest["weights"]
    return {
        "frozen weights": (p for p in model.student.parameters() if not p.requires_grad),
        "trained weights": model.student.parameters(),
        "teacher's own weights": model.teacher.parameters(),
    } | rest


def estimate(model: str, batch: int) -> dict[str, Any]:
    """Bytes at the batch asked for, by lines through the batches that were run; on a GPU also the measured peak."""
    result: dict[str, Any] = {"batch": batch, "card": CARD, "checkpointing": {}}
    for checkpointing in (False, True):
        counted = {size: count_step(model, size, checkpointing) for size in COUNTED}
        found: dict[str, Any] = {"counted": counted, "held": counted[COUNTED[0]]["held"]}
        for what in ("rows", "activations", "peak"):
            (small, low), (large, high) = ((size, counted[size][what]) for size in COUNTED)
            slope = (high - low) / (large - small)
            found[what] = {"slope": slope, "intercept": low - slope * small, "at_batch": low + slope * (batch - small)}
        found["rows"]["drawn_at_batch"] = VARIANT.rows(batch)
        if DEVICE.type == "cuda":
            found["measured_peak"] = gpu_peak(model, batch, checkpointing)
        result["checkpointing"]["on" if checkpointing else "off"] = found
    return result


def gpu_peak(model: str, batch: int, checkpointing: bool) -> int:
    """Peak of what torch allocates on the GPU in two steps."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    step = VARIANT.step(build(model, checkpointing), VARIANT.inputs(batch))
    step()
    step()
    return torch.cuda.max_memory_allocated()


def memory_table(model: str, result: dict[str, Any]) -> str:
    """The estimate as a Markdown table, in GiB."""
    off, on = (result["checkpointing"][key] for key in ("off", "on"))
    rows = {kind: [off["held"][kind], on["held"][kind]] for kind in off["held"]}
    rows["held"] = [sum(found["held"].values()) for found in (off, on)]
    rows["saved for the backward pass"] = [found["activations"]["at_batch"] for found in (off, on)]
    scores = [found["rows"]["at_batch"] * HEADS.prototypes * 4 for found in (off, on)]
    rows["one matrix of scores in fp32, several of which live"] = scores
    rows["peak of all living tensors"] = [found["peak"]["at_batch"] for found in (off, on)]
    if "measured_peak" in off:
        rows["measured peak"] = [off["measured_peak"], on["measured_peak"]]
    rows[f"left of {result['card'] / 2**30:.0f} GiB"] = [result["card"] - peak for peak in rows[list(rows)[-1]]]
    lines = [
        f"{model}, DINOv2 {VARIANT.name}, batch {result['batch']} from a line through batches "
        f"{' and '.join(map(str, COUNTED))}, GiB",
        "",
        "| | without checkpointing | with |",
        "| --- | ---: | ---: |",
    ]
    lines += [f"| {name} | {' | '.join(f'{size / 2**30:.2f}' for size in sizes)} |" for name, sizes in rows.items()]
    return "\n".join(lines)
