"""What a training step costs: seconds, FLOPs, bytes."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from geoexplora.models.linear import matmul

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
META = torch.device("meta")


@dataclass(frozen=True)
class Variant(ABC):
    """One way to train a model.

    Attributes:
        mode: what is trained and how, one of ``modes``.
        precision: ``fp32`` or ``bf16``, the latter by autocast.
    """

    mode: str
    precision: str

    title: ClassVar[str]
    modes: ClassVar[tuple[str, ...]]
    equal_modes: ClassVar[tuple[str, ...]] = ()
    """Modes that compute the same numbers."""

    @classmethod
    def all(cls) -> list[Variant]:
        """Every mode in every precision, in the order of the table."""
        return [cls(mode, precision) for precision in ("fp32", "bf16") for mode in cls.modes]

    @property
    def name(self) -> str:
        """For the table."""
        return f"{self.mode} {self.precision}"

    @property
    @abstractmethod
    def baseline(self) -> Variant:
        """The variant that this one is compared with."""

    @property
    def counted(self) -> Variant:
        """The variant whose FLOPs are counted for this one: they are alike in both precisions."""
        return replace(self, precision="fp32")

    @abstractmethod
    def build(self, model: str, device: torch.device = DEVICE) -> nn.Module:
        """The model as this variant trains it, the same weights each time."""

    @abstractmethod
    def inputs(self, batch: int, device: torch.device = DEVICE) -> Any:
        """A batch."""

    @abstractmethod
    def loss(self, model: Any, inputs: Any) -> Tensor:
        """The loss of a batch."""

    @abstractmethod
    def product_sizes(self, model: str, batch: int) -> list[tuple[int, int, int]]:
        """Rows, input and output width of the largest matrix products."""

    @abstractmethod
    def after_step(self, model: Any) -> None:
        """What follows the optimizer's step."""

    def autocast(self) -> torch.autocast:
        """The precision as a context."""
        return torch.autocast(DEVICE.type, torch.bfloat16, enabled=self.precision == "bf16")

    def step(
        self, model: nn.Module, inputs: Any, optimizer: torch.optim.Optimizer | None = None
    ) -> Callable[[], Tensor]:
        """A whole training step, which returns the loss."""
        optimizer = optimizer or adamw(model)

        def run() -> Tensor:
            loss = self.loss(model, inputs)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            self.after_step(model)
            return loss.detach()

        return run


class Cost(NamedTuple):
    """What can be counted without computing.

    Attributes:
        flops: of matrix products, attention and convolutions in a step; only gradients that are needed.
        held_bytes: weights, buffers, gradients and the optimizer's moments, each storage once.
    """

    flops: int
    held_bytes: int


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of what is trained."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4)


def count(variant: Variant, model: str, batch: int) -> Cost:
    """Costs of a step on tensors without values."""
    variant = variant.counted
    held: dict[str, int] = {}
    with torch.device("meta"):
        built = variant.build(model, META)
        optimizer = adamw(built)
        optimizer.register_step_post_hook(lambda *_: held.update(distinct_bytes(held_tensors(built, optimizer))))
        step = variant.step(built, variant.inputs(batch, META), optimizer)
        with FlopCounterMode(display=False) as counter:
            step()
    return Cost(int(counter.get_total_flops()), sum(held.values()))


def held_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Iterable[Tensor]]:
    """What stays from step to step, and the gradients."""
    states: Iterator[Any] = chain.from_iterable(state.values() for state in optimizer.state.values())
    return {
        "weights": model.parameters(),
        "buffers": model.buffers(),
        "gradients": (p.grad for p in model.parameters() if p.grad is not None),
        "moments": (value for value in states if isinstance(value, Tensor)),
    }


def distinct_bytes(groups: dict[str, Iterable[Tensor]]) -> dict[str, int]:
    """Bytes of each group's storages, without those that an earlier tensor of any group has."""
    seen: set[int] = set()
    sizes = dict.fromkeys(groups, 0)
    for name, tensors in groups.items():
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in seen:  # data_ptr() is 0 for all tensors without values
                seen.add(storage._cdata)
                sizes[name] += storage.nbytes()
    return sizes


def product_rates(sizes: list[tuple[int, int, int]], rounds: int) -> dict[str, float]:
    """The fastest rate of matrix products of these sizes, in FLOP/s, by precision."""
    best = {"fp32": 0.0, "bf16": 0.0}
    for _ in range(rounds):
        for n, i, o in sizes:
            x, weight = torch.randn(n, i, device=DEVICE), torch.randn(o, i, device=DEVICE)
            x16, weight16 = x.bfloat16(), weight.bfloat16()
            for precision, product in (
                ("fp32", lambda x=x, w=weight: matmul(x, w)),
                ("fp32", lambda x=x, w=weight: x @ w.T),
                ("bf16", lambda x=x16, w=weight16: x @ w.T),
            ):
                best[precision] = max(best[precision], 2 * n * i * o / min(seconds(product) for _ in range(3)))
    return best


def seconds(action: Callable[[], Any]) -> float:
    """Duration of an action."""
    synchronize()
    begin = time.perf_counter()
    action()
    synchronize()
    return time.perf_counter() - begin


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def peak_of_steps(variant: Variant, model: str, batch: int) -> float:
    """Peak memory of two steps in this process, which did nothing else, in MiB above what it took at the start."""
    before = resident("VmRSS")
    step = variant.step(variant.build(model), variant.inputs(batch))
    step()
    step()
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resident("VmHWM") - before


def resident(which: str) -> float:
    """Memory of this process, now (VmRSS) or at its peak (VmHWM), in MiB; getrusage's peak is a parent's too."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 2**10 for line in lines if line.startswith(which))
