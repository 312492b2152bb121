"""AdaLoRA: the budget of singular values that falls during training, and what keeps their vectors orthogonal.

Zhang et al., ICLR 2023, arXiv 2303.10512: an update is B diag(e) A; the e that matter least are set to zero, until r
are left in the average projection. Layers, importance and allocation are peft's.

Shapes: M adapted projections, r rank at the start, D width.
"""

from __future__ import annotations

import math
from typing import Any, cast

import peft
import torch
from peft.tuners.adalora import AdaLoraLayer
from torch import Tensor, nn

from geoexplora.errors import RunError
from geoexplora.explora.injection import ADAPTER

_IMPORTANCE = ("ipt", "exp_avg_ipt", "exp_avg_unc")
_SINGULAR_VALUES = f".lora_E.{ADAPTER}"


def adalora_settings(rank: int, alpha: float | None, total_steps: int) -> peft.AdaLoraConfig:
    """AdaLoRA as peft describes it.

    Every projection starts with 1.5 r singular values. All are kept for the first eighth of the run, the budget falls
    by the paper's cubic (section 3.3) until half of the run is left, and the ranks then stay. The authors' own runs
    keep all for 9 % (MNLI) and 12 % (SST-2) of their steps, and the ranks for the last 58 % and 44 %. All other values
    are peft's defaults.

    Args:
        rank: average rank in the end.
        alpha: the update is scaled by alpha / rank, by 1 where it is ``None``; as in peft, the scale does not change
            when ranks fall.
        total_steps: number of optimizer steps; ranks fall to r in runs of two and more.
    """
    start = math.ceil(1.5 * rank)
    scale = 1.0 if alpha is None else alpha / rank
    total_steps = max(2, total_steps)  # one step to learn what matters, one to choose
    return peft.AdaLoraConfig(
        target_r=rank,
        init_r=start,
        lora_alpha=cast(int, scale * start),  # peft divides by the rank at the start
        lora_dropout=0.0,
        bias="none",
        tinit=total_steps // 8,
        tfinal=min(total_steps // 2, total_steps - 2),
        total_step=total_steps,
    )


def orthogonality(encoder: nn.Module) -> Tensor:
    """How far the singular vectors are from orthonormal.

    As in peft, the mean over all A and B of the Frobenius norms |A A' - I| and |B' B - I|; the paper (section 3.1) has
    the sum of their squares.

    Args:
        encoder: a ViT with AdaLoRA.

    Returns:
        A scalar in the vectors' own precision, with a graph.
    """
    layers: list[Any] = [module for module in encoder.modules() if isinstance(module, AdaLoraLayer)]
    rights = torch.stack([layer.lora_A[ADAPTER] for layer in layers])  # (M, r, D)
    lefts = torch.stack([layer.lora_B[ADAPTER].T for layer in layers])  # (M, r, D)
    with torch.autocast(rights.device.type, enabled=False):  # bf16 could not tell a product from I
        vectors = torch.cat([rights @ rights.mT, lefts @ lefts.mT])
        identity = torch.eye(vectors.shape[-1], dtype=vectors.dtype, device=vectors.device)
        return (vectors - identity).flatten(1).norm(dim=1).mean()


class RankBudget:
    """Takes away the least important singular values after each optimizer step.

    Args:
        tuner: peft's tuner of an encoder with AdaLoRA.
    """

    def __init__(self, tuner: peft.AdaLoraModel) -> None:
        self.tuner: Any = tuner
        self.step = 0

    @property
    def penalty_weight(self) -> float:
        """Factor of ``orthogonality`` in the loss."""
        return float(self.tuner.peft_config[ADAPTER].orth_reg_weight)

    @property
    def is_final(self) -> bool:
        """Whether the budget has fallen to r on average; the ranks then stay."""
        settings = self.tuner.peft_config[ADAPTER]
        return bool(self.step >= settings.total_step - settings.tfinal)

    def update(self, step: int) -> None:
        """Learn from the gradients, and set the singular values beyond the budget to zero.

        Args:
            step: number of optimizer steps done, this one included.

        Raises:
            ValueError: if a step was left out or told twice, or there are no gradients.
        """
        if step != self.step + 1:
            raise ValueError(f"AdaLoRA's budget is to follow every step: {step} came after {self.step}")
        parameters = self._parameters()
        for name, parameter in parameters.items():
            if parameter.grad is None:
                raise ValueError(f"{name} has no gradient: update AdaLoRA's budget before gradients are cleared")
            # A step that the gradient scaler of fp16 left out would spoil the averages for good.
            parameter.grad.nan_to_num_(0.0, 0.0, 0.0)
        for table in self._tables().values():
            for name in table:  # a checkpoint may be read before the encoder moves to its device
                table[name] = table[name].to(parameters[name].device)
        self.tuner.update_and_allocate(step)
        self.step = step

    def ranks(self) -> dict[str, int]:
        """Number of singular values left to each projection."""
        settings = self.tuner.peft_config[ADAPTER]
        masks = settings.rank_pattern or {}
        return {
            name.removesuffix(_SINGULAR_VALUES): sum(masks[name]) if name in masks else settings.init_r
            for name in self._parameters()
            if name.endswith(_SINGULAR_VALUES)
        }

    def state_dict(self) -> dict[str, Any]:
        """What a run goes on from, beside the encoder's own tensors: the step, the importance averages, the masks."""
        masks = self.tuner.peft_config[ADAPTER].rank_pattern or {}
        tables = {key: dict(table) for key, table in self._tables().items()}
        return {"step": self.step, **tables, "masks": {name: torch.tensor(mask) for name, mask in masks.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state.

        Raises:
            RunError: if it belongs to another encoder or rank; nothing is then changed.
        """
        shapes = {name: parameter.shape for name, parameter in self._parameters().items()}
        masks = {name: mask.unsqueeze(1) for name, mask in state["masks"].items()}
        for table in (*(state[key] for key in _IMPORTANCE), masks):
            wrong = [name for name, tensor in table.items() if tensor.shape != shapes.get(name)]
            if wrong:
                raise RunError(f"AdaLoRA's state does not fit the encoder: {wrong[0]}", "Resume the run it is of.")
        self.step = state["step"]
        for key, table in self._tables().items():
            table.clear()
            table.update(state[key])
        self.tuner.peft_config[ADAPTER].rank_pattern = {n: m.tolist() for n, m in state["masks"].items()} or None

    def _parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.tuner.model.named_parameters() if ".lora_" in name}

    def _tables(self) -> dict[str, dict[str, Tensor]]:
        return {key: getattr(self.tuner.rankallocator, key) for key in _IMPORTANCE}
