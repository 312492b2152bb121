"""An averaged twin of a model: what is trained is kept twice, what is frozen is shared."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


def averaged_twin[Module: nn.Module](model: Module) -> Module:
    """A copy for an exponential moving average, in evaluation mode.

    Frozen parameters and buffers are the same objects in both models: of a ViT-L under ExPLoRA the twin costs as much
    memory as what is trained, not as the model.

    Args:
        model: what is trained; which parameters are frozen must be settled.

    Returns:
        The twin; none of its parameters is trainable, all start equal to the model's.
    """
    shared = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    memo: dict[int, Tensor] = {id(tensor): tensor for tensor in (*shared, *model.buffers())}
    return copy.deepcopy(model, memo).requires_grad_(False).eval()


@torch.no_grad()
def update_twin(twin: nn.Module, model: nn.Module, momentum: float) -> None:
    """Move the twin to momentum * twin + (1 - momentum) * model, in place (DINO, arXiv 2104.14294, section 3.1).

    Args:
        twin: from ``averaged_twin``.
        model: what was trained.
        momentum: 0 copies the model, 1 leaves the twin.
    """
    pairs = zip(twin.parameters(), model.parameters(), strict=True)
    averaged, trained = zip(*((a, b) for a, b in pairs if a is not b), strict=True)
    torch._foreach_lerp_(list(averaged), list(trained), 1 - momentum)
