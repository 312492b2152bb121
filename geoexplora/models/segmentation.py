"""Semantic segmentation with a plain or group-channel ViT.

Shapes: B batch, C bands, H W image, P patch, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

from torch import Tensor, nn
from torch.nn import functional as F

from geoexplora.errors import ConfigError
from geoexplora.models.pyramid import (
    GroupFeatures,
    check_group_features,
    feature_channels,
    feature_maps,
    resolve_levels,
)
from geoexplora.models.segmentation_heads import Head, build_head


class SegmentationModel(nn.Module):
    """An encoder and a head that tells the class of every pixel.

    Parameters of the encoder that no output depends on (blocks above the last level, a classification head) are
    frozen: distributed training fails on trainable ones without a gradient. Whoever makes parameters trainable
    afterwards calls ``freeze_unused`` again.

    Args:
        encoder: a timm-style ViT, plain or group-channel; built with ``dynamic_img_size`` where images are of other
            sizes than its own. It is used, not copied.
        num_classes: K.
        head: ``linear``, ``upernet`` or ``dpt``.
        levels: 1-based blocks to take features from, rising; by default the last of each quarter of the depth.
        group_features: what becomes of the channel groups' features of a position: their ``mean`` or ``concat``.
        width: channels inside ``upernet`` and ``dpt``.

    Attributes:
        levels: the blocks that features are taken from.

    Raises:
        ConfigError: if a setting is unknown or out of range, or the head cannot use that many levels.
    """

    def __init__(
        self,
        encoder: Any,
        num_classes: int,
        *,
        head: Head = "linear",
        levels: Sequence[int] | None = None,
        group_features: GroupFeatures = "mean",
        width: int = 256,
    ) -> None:
        super().__init__()
        if head not in get_args(Head):
            raise ConfigError(f"unknown segmentation head {head!r}", f"Choose among {', '.join(get_args(Head))}.")
        if min(num_classes, width) < 1:
            raise ConfigError(f"cannot tell {num_classes} classes with a head {width} wide", "Use 1 or more of each.")
        check_group_features(group_features)
        self.levels = resolve_levels(levels, len(encoder.blocks))
        self.group_features: GroupFeatures = group_features
        channels = feature_channels(encoder, group_features)
        self.encoder = encoder
        self.head = build_head(head, channels, len(self.levels), num_classes, width)
        self.freeze_unused()

    def freeze_unused(self) -> None:
        """Freeze the encoder's parameters that no output depends on, in place."""
        unused = [*self.encoder.blocks[self.levels[-1] :], self.encoder.head]
        for module in filter(None, [*unused, self.encoder.attn_pool]):
            module.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Class scores of every pixel.

        Sides that are no multiples of P are filled up at the bottom and right with the edge's own values, and the
        scores there are cut off: a user's tiles come in any size, and zeros would be an edge that the land has not.

        Args:
            images: (B, C, H, W), any H and W with a ``dynamic_img_size`` encoder.

        Returns:
            (B, K, H, W), logits.

        Raises:
            ConfigError: if the encoder takes images of one size only and these, filled up, are of another.
        """
        height, width = images.shape[-2:]
        images = self._fill_up(images)
        features = feature_maps(self.encoder, images, self.levels, self.group_features)
        logits = F.interpolate(self.head(features), images.shape[-2:], mode="bilinear", align_corners=False)
        return logits[..., :height, :width]

    def _fill_up(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        embedding = self.encoder.patch_embed
        bottom, right = (-side % patch for side, patch in zip((height, width), embedding.patch_size, strict=True))
        own = tuple(embedding.img_size)
        if not self.encoder.dynamic_img_size and (height + bottom, width + right) != own:
            raise ConfigError(
                f"images of {height} x {width} px do not fit an encoder for {own[0]} x {own[1]} px",
                "Resize them, or build the encoder with dynamic_img_size=True: it interpolates position encodings.",
            )
        return F.pad(images, (0, right, 0, bottom), mode="replicate") if bottom or right else images
