"""Segmentation heads on the features of a ViT: linear, UPerNet and DPT.

No head has a transposed convolution, and none has batch statistics: segmentation-models-pytorch's batch norms, which
fail on a batch of one image where a map is pooled to one pixel, give way to LayerNorms over the channels, as in
ViTDet. So heads compute the same in training and evaluation, but for dropout, in batches of any size, and in any
number of processes without synchronization.

Shapes: B batch, K classes, h w patch grid, F channels of a feature map, W head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from segmentation_models_pytorch.base.initialization import initialize_decoder
from segmentation_models_pytorch.decoders.dpt.decoder import FusionBlock
from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from geoexplora.models.pyramid import FeaturePyramid, same_size

Head = Literal["linear", "upernet", "dpt"]


class LinearHead(nn.Module):
    """One linear map from the features of all levels side by side, as in linear segmentation with DINOv2.

    Args:
        channels: F.
        levels: number of levels.
        num_classes: K.
    """

    def __init__(self, channels: int, levels: int, num_classes: int) -> None:
        super().__init__()
        self.classifier = _classifier(levels * channels, num_classes)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Logits (B, K, h, w) from features (B, F, h, w) of each level."""
        return self.classifier(torch.cat(list(features), dim=1))


class UPerNetHead(nn.Module):
    """UPerNet (Xiao et al. 2018, arXiv 1807.10221) on a pyramid: pooling at four sizes, top-down fusion.

    Args:
        channels: F.
        levels: number of levels, at most 4.
        num_classes: K.
        width: W.

    Raises:
        ConfigError: if there are more than 4 levels.
    """

    def __init__(self, channels: int, levels: int, num_classes: int, width: int) -> None:
        super().__init__()
        self.pyramid = FeaturePyramid(channels, levels, width)
        # The decoder skips the first two of its maps.
        self.decoder = UPerNetDecoder([0, 0, *[width] * 4], encoder_depth=5, decoder_channels=width)
        _replace_batch_norms(self.decoder)
        initialize_decoder(self)
        self.classifier = _classifier(width, num_classes)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Logits (B, K, 4 h, 4 w) from features (B, F, h, w) of each level."""
        maps = self.pyramid(features)
        return self.classifier(self.decoder([maps[0], maps[0], *maps]))


class DPTHead(nn.Module):
    """DPT (Ranftl et al. 2021, arXiv 2103.13413) on a pyramid: residual units, from the coarsest map to the finest.

    Of segmentation-models-pytorch's decoder the fusion blocks are used; its own reassembling has transposed
    convolutions. Maps are enlarged to the next one's size, so the grid may have any sides, and logits are computed at
    the finest map's.

    Args:
        channels: F.
        levels: number of levels, at most 4.
        num_classes: K.
        width: W.
        dropout: before the last layer.

    Raises:
        ConfigError: if there are more than 4 levels.
    """

    def __init__(self, channels: int, levels: int, num_classes: int, width: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.pyramid = FeaturePyramid(channels, levels, width)
        scales = len(self.pyramid.scales)
        self.reassemble = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(scales))
        self.fuse = nn.ModuleList(_Fusion(width) for _ in range(scales))
        self.head = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False), LayerNorm2d(width), nn.ReLU(), nn.Dropout(dropout)
        )
        _replace_batch_norms(self)
        initialize_decoder(self)
        self.classifier = _classifier(width, num_classes)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Logits (B, K, 4 h, 4 w) from features (B, F, h, w) of each level."""
        fused: Tensor | None = None
        stages = zip(self.pyramid(features), self.reassemble, self.fuse, strict=True)
        for x, reassemble, fuse in reversed(list(stages)):
            fused = fuse(reassemble(x), fused)
        return self.classifier(self.head(fused))


class _Fusion(FusionBlock):
    """Enlarges what comes from the coarser map, not its own output: a convolution of size 1 may come before as well."""

    def forward(self, feature: Tensor, previous_feature: Tensor | None = None) -> Tensor:
        feature = self.residual_conv_block1(feature)
        if previous_feature is not None:
            feature = feature + same_size(previous_feature, feature)
        return self.project(self.residual_conv_block2(feature))


def build_head(head: Head, channels: int, levels: int, num_classes: int, width: int) -> nn.Module:
    """Build a head by its name.

    Args:
        head: ``linear``, ``upernet`` or ``dpt``.
        channels: F.
        levels: number of levels.
        num_classes: K.
        width: W; ``linear`` has none.
    """
    if head == "linear":
        return LinearHead(channels, levels, num_classes)
    return {"upernet": UPerNetHead, "dpt": DPTHead}[head](channels, levels, num_classes, width)


def _classifier(channels: int, num_classes: int) -> nn.Module:
    classifier: Any = nn.Conv2d(channels, num_classes, 1)
    nn.init.normal_(classifier.weight, std=0.01)
    nn.init.zeros_(classifier.bias)
    return classifier


def _replace_batch_norms(decoder: nn.Module) -> None:
    for module in list(decoder.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, LayerNorm2d(child.num_features))
