"""Options of the self-supervised objectives. Torch-free. See ``geoexplora.cli.options``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from geoexplora.cli.options import Options
from geoexplora.cli.values import interval, setting


@dataclass(frozen=True, kw_only=True)
class ObjectiveOptions(Options):
    """Objective.

    Attributes:
        objective: self-supervised task: mae, a masked autoencoder, or dinov2, self-distillation; pretrain takes its
            defaults from the dataset's recipe for it.
    """

    objective: Literal["mae", "dinov2"] = "mae"


@dataclass(frozen=True, kw_only=True)
class MAEOptions(Options):
    """Masked autoencoder (--objective mae).

    Attributes:
        mask_ratio: share of tokens that the encoder does not see.
        mask: draw each token independently, or whole positions in all channel groups.
        norm_pix_loss: reconstruct pixels normalized within each patch.
        pairing: which band a prediction is compared with: its own, or reference, which repeats SatMAE's defect
            (predictions in group order, bands in data order) for exact reproduction.
    """

    mask_ratio: float = setting(0.75, "SHARE")
    mask: Literal["independent", "spatial"] = "independent"
    norm_pix_loss: bool = True
    pairing: Literal["own", "reference"] = "own"


@dataclass(frozen=True, kw_only=True)
class DINOv2Options(Options):
    """DINOv2 (--objective dinov2).

    Attributes:
        load_size: side of the square that a whole tile is read at, from which crops are cut, in pixels
            (none: so that the smallest global crop is not enlarged).
        local_size: side of a local crop, in pixels; must be a multiple of the patch. Global crops have --image-size.
        local_crops: local crops of each image (0: none).
        global_scale: smallest and largest share of the area that a global crop keeps.
        local_scale: the same for a local crop.
        augmentation: colour is DINOv2's (jitter, grey, blur, solarize), bands one for any sensor (gain and offset by
            band, blur); auto takes colour for red, green and blue.
        prototypes: outputs of the projection heads.
        head_layers: linear layers of a head before the prototypes.
        head_hidden: their width.
        head_bottleneck: width before the prototypes.
        separate_heads: a head of its own for hidden tokens (iBOT), instead of the class token's (DINO).
        centering: what keeps the teacher from collapse, softmax with a moving center or Sinkhorn-Knopp.
        ibot_weight: weight of the loss of hidden tokens.
        koleo_weight: weight of KoLeo, which spreads the features of a batch (0: none).
        mask_probability: share of global crops with hidden tokens.
        mask_range: smallest and largest share of hidden tokens in such a crop.
        teacher_momentum: of the teacher's moving average at the start; rises to 1.
        teacher_temperature: of the teacher's outputs, after its warm-up.
        teacher_temperature_start: before it.
        teacher_warmup_epochs: epochs in which the teacher's temperature rises.
        teacher_warmup_steps: optimizer steps instead (none: as --teacher-warmup-epochs says).
        freeze_last_epochs: epochs in which the prototypes stay as they are, so that new heads do not ruin features.
        freeze_last_steps: optimizer steps instead (none: as --freeze-last-epochs says).
    """

    load_size: int | None = setting(None, "PIXELS")
    local_size: int = setting(98, "PIXELS")
    local_crops: int = setting(8, "N")
    global_scale: tuple[float, float] = setting((0.32, 1.0), "LOW,HIGH", interval, expects="two shares such as 0.32,1")
    local_scale: tuple[float, float] = setting(
        (0.05, 0.32), "LOW,HIGH", interval, expects="two shares such as 0.05,0.32"
    )
    augmentation: Literal["auto", "colour", "bands", "none"] = "auto"
    prototypes: int = setting(65536, "N")
    head_layers: int = setting(3, "N")
    head_hidden: int = setting(2048, "N")
    head_bottleneck: int = setting(256, "N")
    separate_heads: bool = False
    centering: Literal["softmax", "sinkhorn"] = "softmax"
    ibot_weight: float = setting(1.0, "X")
    koleo_weight: float = setting(0.1, "X")
    mask_probability: float = setting(0.5, "SHARE")
    mask_range: tuple[float, float] = setting((0.1, 0.5), "LOW,HIGH", interval, expects="two shares such as 0.1,0.5")
    teacher_momentum: float = setting(0.992, "X")
    teacher_temperature: float = setting(0.07, "X")
    teacher_temperature_start: float = setting(0.04, "X")
    teacher_warmup_epochs: float = setting(30.0, "N")
    teacher_warmup_steps: int | None = setting(None, "N")
    freeze_last_epochs: float = setting(3.0, "N")
    freeze_last_steps: int | None = setting(None, "N")
