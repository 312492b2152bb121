"""Augmentation of whole batches for fine-tuning: mixup, cutmix, random erasing.

Shapes: B batch, C bands, S image side, K classes.
"""

from __future__ import annotations

import torch
from kornia.augmentation import RandomErasing
from torch import Tensor, nn
from torchvision.transforms.v2 import CutMix, MixUp


class BatchMixing(nn.Module):
    """Mixup (Zhang et al. 2018) or cutmix (Yun et al. 2019) of a batch, each with probability 1/2 if both are on.

    Draws from torch's global generator.

    Args:
        num_classes: K.
        mixup: alpha of mixup's beta distribution; 0: no mixup.
        cutmix: alpha of cutmix's; 0: no cutmix.
    """

    def __init__(self, num_classes: int, mixup: float = 0.0, cutmix: float = 0.0) -> None:
        super().__init__()
        kinds = ((MixUp, mixup), (CutMix, cutmix))
        self.kinds = [kind(alpha=alpha, num_classes=num_classes) for kind, alpha in kinds if alpha > 0]

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mix.

        Args:
            images: (B, C, S, S).
            labels: (B,) class indices, or (B, K) of 0-1.

        Returns:
            Images (B, C, S, S) and labels (B, K) of 0-1; both as they are where neither is on.
        """
        if not self.kinds:
            return images, labels
        chosen = self.kinds[int(torch.randint(len(self.kinds), ()))]
        mixed: tuple[Tensor, Tensor] = chosen(images, labels)
        return mixed


def random_erasing(probability: float) -> nn.Module:
    """Random erasing (Zhong et al. 2020) of single images: a box of all bands becomes 0, the mean after normalization.

    Args:
        probability: share of the images that lose a box.
    """
    return RandomErasing(p=probability, scale=(0.02, 0.33), ratio=(0.3, 3.3)) if probability else nn.Identity()
