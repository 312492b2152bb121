"""The projection head of DINO, iBOT and DINOv2.

Shapes: R tokens, D token width, K prototypes.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from geoexplora.models.linear import linear


class ProjectionHead(nn.Module):
    """An MLP, L2 normalization, and scores against K prototypes (Caron et al. 2021, arXiv 2104.14294, section 3.1).

    Each prototype is a direction with a learned length that starts at 1 (DINOv2, arXiv 2304.07193). lightly's
    ``DINOv2ProjectionHead`` computes the same on torch's deprecated weight norm, which cannot be copied.

    Args:
        width: D.
        prototypes: K.
        layers: linear layers before the prototypes.
        hidden: their width.
        bottleneck: width of the last of them, which is normalized.
    """

    def __init__(
        self, width: int, prototypes: int = 65536, layers: int = 3, hidden: int = 2048, bottleneck: int = 256
    ) -> None:
        super().__init__()
        sizes = [width, *[hidden] * (layers - 1), bottleneck]
        modules: list[nn.Module] = []
        for before, after in pairwise(sizes):
            layer = nn.Linear(before, after)
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
            modules += [layer, nn.GELU()]
        self.mlp = nn.Sequential(*modules[:-1])
        last: nn.Module = nn.Linear(bottleneck, prototypes, bias=False)
        self.prototypes = weight_norm(last, dim=0)
        with torch.no_grad():
            self.prototypes.parametrizations.weight.original0.fill_(1.0)

    def forward(self, tokens: Tensor) -> Tensor:
        """Scores (R, K) of tokens (R, D)."""
        return linear(F.normalize(self.mlp(tokens), dim=-1), self.prototypes.weight, None)
