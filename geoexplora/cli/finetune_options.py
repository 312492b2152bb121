"""Options of fine-tuning. Torch-free. See ``geoexplora.cli.options``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from geoexplora.cli.options import Options
from geoexplora.cli.values import blocks, class_weights, interval, setting


@dataclass(frozen=True, kw_only=True)
class TaskOptions(Options):
    """Task.

    Attributes:
        task: what the labels say of an image: its class, any number of labels, the class of each pixel, or a value.
        num_classes: number of classes, checked against the data (none: as the data say).
        pool: features of an image: its class token, the mean of its patch tokens in each channel group, or both
            (none: as the encoder was trained).
        head: segmentation head: linear, or UPerNet's or DPT's decoder.
        head_width: channels inside a upernet or dpt head.
        levels: blocks whose features a segmentation head takes; L is the last (none: the last of each quarter).
        group_features: what becomes of the channel groups of a position in segmentation.
        ignore_index: mask value that is no class (none: the dataset's own).
    """

    task: Literal["classification", "multilabel", "segmentation", "regression"] = "classification"
    num_classes: int | None = setting(None, "N")
    pool: Literal["cls", "mean", "cls+mean"] | None = None
    head: Literal["linear", "upernet", "dpt"] = "upernet"
    head_width: int = setting(256, "N")
    levels: tuple[int | str, ...] | None = setting(None, "N,N,...", blocks, expects="block numbers such as 3,6,9,L")
    group_features: Literal["mean", "concat"] = "mean"
    ignore_index: int | None = setting(None, "VALUE")


@dataclass(frozen=True, kw_only=True)
class MethodOptions(Options):
    """What is trained.

    Attributes:
        method: linear trains the head alone; lora, adalora and dora also low-rank updates of Q and V in all blocks;
            full everything.
        rank: rank of the updates; of adalora the mean rank that is left.
        alpha: their scale is alpha / rank (none: alpha = rank).
        drop_path: rate of stochastic depth in the last block, rising evenly from 0 in the first.
    """

    method: Literal["linear", "lora", "adalora", "dora", "full"] = "lora"
    rank: int = setting(8, "N")
    alpha: float | None = setting(None, "X")
    drop_path: float = setting(0.2, "RATE")


@dataclass(frozen=True, kw_only=True)
class LossOptions(Options):
    """Augmentation and loss.

    Attributes:
        crop_scale: smallest and largest share of the area that a random crop keeps.
        random_erasing: share of training images that lose a box.
        mixup: alpha of mixup (0: none).
        cutmix: alpha of cutmix (0: none); with mixup each batch takes one of them.
        label_smoothing: share of the target that is spread over all classes.
        loss: ce, jaccard, focal and dice as in TorchGeo; bce for several labels; mse or mae for values
            (none: ce, bce or mse by the task).
        class_weights: weight of each class in ce: none, balanced (by the labels of the training images), or numbers.
    """

    crop_scale: tuple[float, float] = setting((0.2, 1.0), "LOW,HIGH", interval, expects="two shares such as 0.2,1")
    random_erasing: float = setting(0.0, "SHARE")
    mixup: float = setting(0.0, "ALPHA")
    cutmix: float = setting(0.0, "ALPHA")
    label_smoothing: float = setting(0.0, "SHARE")
    loss: Literal["ce", "jaccard", "focal", "dice", "bce", "mse", "mae"] | None = None
    class_weights: tuple[float, ...] | Literal["balanced"] | None = setting(
        None, "balanced|X,X,...", class_weights, expects="balanced, or a number for each class such as 1,2.5,1"
    )


@dataclass(frozen=True, kw_only=True)
class SelectionOptions(Options):
    """Validation.

    Attributes:
        monitor: metric whose best value on the validation split decides which weights are kept, as metrics.csv names
            it (none: accuracy, F1, mean IoU or RMSE by the task).
        eval_every: optimizer steps between two validations, the last after the last step (none: an epoch).
        patience: validations without a better value before training stops (none: never).
    """

    monitor: str | None = setting(None, "NAME")
    eval_every: int | None = setting(None, "STEPS")
    patience: int | None = setting(None, "N")
