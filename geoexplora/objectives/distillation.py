"""Targets and losses of self-distillation: DINO, iBOT, Sinkhorn-Knopp (arXiv 2104.14294, 2111.07832, 2006.09882).

lightly's losses of the same names compute the softmax of the teacher inside and know no Sinkhorn-Knopp; here targets
come first, so that both ways of centering share the losses, and the health of the targets can be watched.

Shapes: V student crops and T teacher crops of each image, B images, R masked tokens, K prototypes.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, distributed

STUDENT_TEMPERATURE = 0.1


def _without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else nullcontext()


def _sum_over_processes(x: Tensor) -> Tensor:
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(x)
    return x


def _maximum_over_processes(x: Tensor) -> Tensor:
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(x, distributed.ReduceOp.MAX)
    return x


@torch.no_grad()
def centered_targets(logits: Tensor, center: Tensor, temperature: float) -> Tensor:
    """The teacher's distributions, centered so that no prototype wins everywhere (DINO, section 3.1).

    Args:
        logits: (..., K).
        center: (K,), see ``update_center``.
        temperature: below 1 sharpens.
    """
    return ((logits.float() - center) / temperature).softmax(-1)


@torch.no_grad()
def sum_of_rows(logits: Tensor) -> Tensor:
    """What a center needs of a batch of scores (R, K): their sum, and R behind it, (K + 1,)."""
    return torch.cat([logits.float().sum(0), logits.new_tensor([len(logits)], dtype=torch.float)])


@torch.no_grad()
def update_center(center: Tensor, total: Tensor, momentum: float = 0.9) -> None:
    """Move the center to the mean of the teacher's scores of all processes (DINO, equation 4), in place.

    Args:
        center: (K,).
        total: ``sum_of_rows`` of the scores, or the sum of several; without rows in any process the center stays.
        momentum: of the moving average.
    """
    total = _sum_over_processes(total.clone())
    count = total[-1]
    mean = total[:-1] / count.clamp_min(1)
    center.lerp_(torch.where(count > 0, mean, center), 1 - momentum)


@torch.no_grad()
def sinkhorn_targets(logits: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """The teacher's distributions, such that all prototypes are used alike by the batch (SwAV, section 3.1).

    Args:
        logits: (R, K); rows of all processes are balanced together.
        temperature: below 1 sharpens.
        iterations: of Sinkhorn and Knopp's alternating normalization.

    Returns:
        (R, K); every row sums to 1.
    """
    # By logarithms: scores of one row far below another's would vanish otherwise.
    log_q = logits.float() / temperature
    for _ in range(iterations):
        log_q = (log_q - _log_sum_of_columns(log_q)).log_softmax(1)
    return log_q.exp()


def _log_sum_of_columns(x: Tensor) -> Tensor:
    """Logsumexp over the rows of all processes, (R, K) to (K,)."""
    peak = torch.cat([x, x.new_full((1, x.shape[1]), torch.finfo(x.dtype).min)]).amax(0)
    peak = _maximum_over_processes(peak)
    return peak + _sum_over_processes((x - peak).exp().sum(0)).log()


def dino_loss(student: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of all pairs of a teacher's and another crop of the same image (DINO, equations 2 and 3).

    Args:
        student: (V, B, K), scores; its first T crops are those that the teacher sees.
        targets: (T, B, K), distributions.

    Returns:
        Scalar.
    """
    # With t summing to 1, -t.log_softmax(s) = logsumexp(s) - t.s: no matrix of log-probabilities is needed.
    scores = student.float() / STUDENT_TEMPERATURE
    with _without_autocast(scores.device):  # which would take the product in bf16
        overlap = torch.einsum("tbk,vbk->tv", targets, scores)
    entropy = scores.logsumexp(-1).sum(1) - overlap  # T V, summed over B
    same = torch.eye(*entropy.shape, dtype=torch.bool, device=entropy.device)
    pairs = same.numel() - len(targets)
    return entropy.masked_fill(same, 0.0).sum() / (pairs * student.shape[1])


def ibot_loss(student: Tensor, targets: Tensor, weight: Tensor, crops: int) -> Tensor:
    """Cross-entropy of hidden tokens; those of a crop together weigh as much as those of another (iBOT, equation 2).

    Args:
        student: (R, K), scores of the hidden tokens.
        targets: (R, K), the teacher's distributions of the same tokens, which it saw.
        weight: (R,), 1 / number of hidden tokens in the token's crop.
        crops: number of global crops, those without hidden tokens included, as in DINOv2.

    Returns:
        Scalar; 0 without hidden tokens.
    """
    scores = student.float() / STUDENT_TEMPERATURE
    entropy = scores.logsumexp(-1) - (targets * scores).sum(-1)
    return (entropy * weight).sum() / crops


def koleo_loss(features: Tensor, eps: float = 1e-8) -> Tensor:
    """Minus the mean logarithm of the distance to the nearest neighbour, which spreads features (arXiv 1806.03198).

    Args:
        features: (B, D) of different images; normalized here.
        eps: keeps the logarithm finite for equal features.

    Raises:
        ValueError: if there is only one image.
    """
    if len(features) < 2:
        raise ValueError("KoLeo compares images of a batch: a batch of one has none to compare")
    from lightly.loss import KoLeoLoss  # slow to import, and only this objective needs it

    with _without_autocast(features.device):
        return KoLeoLoss(eps=eps)(features.float())


@torch.no_grad()
def target_health(targets: Tensor) -> dict[str, Tensor]:
    """How sharp the teacher's distributions are, and whether they tell images apart.

    Args:
        targets: (R, K).

    Returns:
        ``teacher_entropy``: mean entropy of a row, in nats; log K is uniform, 0 one-hot. ``teacher_mean_entropy``:
        entropy of the mean row; equal to the former where all rows are the same, which is collapse.
    """
    return {"teacher_entropy": _entropy(targets).mean(), "teacher_mean_entropy": _entropy(targets.mean(0))}


def _entropy(distributions: Tensor) -> Tensor:
    return torch.special.entr(distributions).sum(-1)


def token_weights(mask: Tensor) -> Tensor:
    """Weights (R,) for ``ibot_loss`` of the hidden tokens of a mask (M, N), in order."""
    counts = mask.sum(1, keepdim=True).clamp_min(1)
    return (1.0 / counts).expand_as(mask)[mask]
