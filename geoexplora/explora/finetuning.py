"""Fine-tuning of an encoder for a task: what of it trains, by method.

The encoder is plain, such as a merged one after ExPLoRA, so that W_task = W_S + Delta_T + Delta_task.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from geoexplora.errors import RunError
from geoexplora.explora.adalora import RankBudget, adalora_settings, orthogonality
from geoexplora.explora.config import FinetuneConfig, Method
from geoexplora.explora.injection import inject, lora_settings, refuse_adapters

__all__ = ["FineTuning", "FinetuneConfig", "Method", "apply_finetuning"]


class FineTuning:
    """What a training loop owes the method beyond gradients; nothing, unless it is AdaLoRA.

    Args:
        encoder: the ViT, as ``apply_finetuning`` left it.
        config: what is trained.
        budget: AdaLoRA's.
    """

    def __init__(self, encoder: Any, config: FinetuneConfig, budget: RankBudget | None = None) -> None:
        self.encoder = encoder
        self.config = config
        self._budget = budget

    @property
    def whole_blocks(self) -> tuple[int, ...]:
        """1-based numbers of the blocks that are trained whole, as parameter tables and groups ask for them."""
        return tuple(range(1, len(self.encoder.blocks) + 1)) if self.config.method == "full" else ()

    def regularization(self) -> Tensor | None:
        """AdaLoRA's orthogonality penalty, weighted, to be added to the loss; ``None`` of other methods."""
        return None if self._budget is None else self._budget.penalty_weight * orthogonality(self.encoder)

    def after_step(self, step: int) -> None:
        """Follow AdaLoRA's budget: call it after every ``optimizer.step()``, before gradients are cleared.

        Only after the step, as the optimizer would move the singular values that are set to zero (algorithm 1 of the
        paper does it in this order).

        Args:
            step: number of optimizer steps done, this one included; inside Lightning's ``optimizer_step`` hook, which
                counts when it returns, ``global_step + 1``.

        Raises:
            ValueError: if a step was left out or told twice, or there are no gradients.
        """
        if self._budget is not None:
            self._budget.update(step)

    def ranks(self) -> dict[str, int]:
        """AdaLoRA's current rank of each adapted projection; empty of other methods."""
        return {} if self._budget is None else self._budget.ranks()

    @property
    def has_final_ranks(self) -> bool:
        """Whether AdaLoRA's ranks have fallen as far as they will; of other methods always."""
        return self._budget is None or self._budget.is_final

    def state_dict(self) -> dict[str, Any]:
        """What a run goes on from beside the encoder's own tensors: plain numbers, texts and tensors."""
        budget = {} if self._budget is None else {"budget": self._budget.state_dict()}
        return {"method": self.config.method, **budget}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state.

        Raises:
            RunError: if it belongs to another method, encoder or rank; nothing is then changed.
        """
        if state["method"] != self.config.method:
            raise RunError(
                f"the checkpoint is of method {state['method']}, not {self.config.method}", "Resume with its method."
            )
        if self._budget is not None:
            self._budget.load_state_dict(state["budget"])


def apply_finetuning(encoder: Any, config: FinetuneConfig) -> FineTuning:
    """Freeze a ViT but for what the method trains, and add its adapters, in place.

    The output does not change: adapters start at zero. ``full`` trains everything, position and channel encodings
    too: MAE and SatMAE fix them at the sin-cos formula while pre-training only, MAE's own fine-tuning trains them as
    timm does, and those of DINOv2 and of ExPLoRA on new bands are learned anyway.

    Args:
        encoder: a timm-style ViT with merged weights.
        config: what to train.

    Returns:
        What the training loop owes the method.

    Raises:
        ConfigError: if the model carries adapters already, the rank exceeds the width, or the attention cannot be
            split. The model is then unchanged.
    """
    refuse_adapters(encoder)
    tuner: Any = None
    if config.has_adapters:
        tuner = inject(encoder, _peft_settings(config), range(1, len(encoder.blocks) + 1), config.targets)
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_(config.method == "full" or ".lora_" in name)
    return FineTuning(encoder, config, RankBudget(tuner) if config.method == "adalora" else None)


def _peft_settings(config: FinetuneConfig) -> Any:
    if config.method == "adalora":
        assert config.total_steps is not None  # FinetuneConfig sees to it
        return adalora_settings(config.rank, config.alpha, config.total_steps)
    return lora_settings(config.rank, config.alpha, use_dora=config.method == "dora")
