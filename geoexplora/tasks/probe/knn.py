"""Nearest neighbours by cosine similarity, with weighted votes (Wu et al. 2018, arXiv 1805.01978; DINO's protocol).

Shapes: N training rows, M test rows, n and m of them at once, F features, K classes, k neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from geoexplora.tasks.probe.rows import FeatureRows, Index, chunks

TEMPERATURE = 0.07
"""Wu et al. 2018, section 3.4; DINO's and DINOv2's."""


def usable_neighbours(wanted: Sequence[int], samples: int) -> tuple[int, ...]:
    """The numbers of neighbours, none above the number of training samples, each once."""
    return tuple(dict.fromkeys(min(k, samples) for k in wanted))


@torch.inference_mode()
def knn_predict(
    features: FeatureRows,
    labels: Index,
    train: Index,
    test: Index,
    neighbours: Sequence[int],
    classes: int,
    *,
    columns: slice = slice(None),
    temperature: float = TEMPERATURE,
    device: torch.device | str = "cpu",
    chunk: tuple[int, int] = (32_768, 2_048),
) -> NDArray[np.int64]:
    """Classify test rows by their nearest training rows: a vote weighs exp(cosine similarity / temperature).

    The similarities are computed once, for all numbers of neighbours, and never held as a whole.

    Args:
        features: of all rows.
        labels: (all rows,).
        train: (N,) rows to compare with.
        test: (M,) rows to classify.
        neighbours: numbers k of neighbours, none above N.
        classes: K.
        columns: which features.
        temperature: of the votes.
        device: where to compute.
        chunk: training and test rows at once.

    Returns:
        (number of k, M) classes; of equal votes the first.
    """
    most = max(neighbours)
    best = torch.full((len(test), most), -torch.inf)
    voters = torch.zeros((len(test), most), dtype=torch.int64)
    known = torch.from_numpy(labels)
    start = 0
    for bank in features.stream(chunks(train, chunk[0]), columns, device):
        bank = F.normalize(bank.float(), dim=1)
        names = known[torch.from_numpy(train[start : start + len(bank)])].to(device)
        start += len(bank)
        done = 0
        for queries in features.stream(chunks(test, chunk[1]), columns, device):
            at = slice(done, done + len(queries))
            done += len(queries)
            similar = F.normalize(queries.float(), dim=1) @ bank.T
            near, which = similar.topk(min(most, len(bank)), dim=1)
            near, which = torch.cat([best[at].to(device), near], 1), torch.cat([voters[at].to(device), names[which]], 1)
            near, order = near.topk(most, dim=1)
            best[at], voters[at] = near.cpu(), which.gather(1, order).cpu()
    return torch.stack([_vote(best[:, :k], voters[:, :k], classes, temperature) for k in neighbours]).numpy()


def _vote(similar: Tensor, voters: Tensor, classes: int, temperature: float) -> Tensor:
    # Relative to the most similar one, so that no weight overflows at a low temperature.
    weights = ((similar - similar[:, :1]) / temperature).exp()
    return weights.new_zeros(len(similar), classes).scatter_add_(1, voters, weights).argmax(1)
