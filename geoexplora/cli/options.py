"""Options that several commands share, one dataclass for each group of the help. Torch-free.

Commands combine them by inheritance, so that one word means one thing everywhere. The first line of a class is the
title of its group in ``--help``, and its ``Attributes`` are the help of the options.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from geoexplora.cli.values import blocks, interval, name_groups, names, path, plain, setting, source
from geoexplora.registry import DATASET_NAMES, FROM_SOURCE, MODELS


@dataclass(frozen=True, kw_only=True)
class Options:
    """Settings of a command, resolved and checked."""

    def to_config(self) -> dict[str, Any]:
        """The settings in plain types, as ``config.yaml`` holds them: feeding them back repeats the run."""
        return {
            field.name: plain(getattr(self, field.name))
            for field in dataclasses.fields(self)
            if field.name != "resume"  # says how this process starts, not what the run is
        }


@dataclass(frozen=True, kw_only=True)
class DataOptions(Options):
    """Data.

    Attributes:
        dataset: the dataset's name; pretrain takes its defaults from the dataset's recipe.
        root: folder that holds the dataset (photographs, sample: not needed).
        years: first and last year of acquisition to keep.
        missing: what to do when the csv names files that are not there: stop, or go on without them.
        max_unreadable: share of unreadable or empty tiles above which to stop; fewer are replaced with a warning.
        num_workers: processes that read data, for each device; the results do not depend on it.
    """

    dataset: str | None = setting(None, "NAME", known=DATASET_NAMES, required=True)
    root: str | None = setting(None, "DIR", path)
    years: tuple[int, int] = setting((2000, 2020), "FIRST,LAST", interval, expects="two years such as 2000,2020")
    missing: Literal["error", "skip"] = "error"
    max_unreadable: float = setting(0.1, "SHARE")
    num_workers: int = setting(4, "N")


@dataclass(frozen=True, kw_only=True)
class FMoWRGBOptions(Options):
    """fMoW-RGB (--dataset fmow-rgb).

    Attributes:
        crop: what of an image is a sample: baseline is the box with the context of fMoW's baseline, tight the box
            alone, full the whole image.
        variant: rgb is pan-sharpened, msrgb coarser.
        false_detection: keep the 63rd class, boxes without a building or place.
    """

    crop: Literal["baseline", "tight", "full"] = "baseline"
    variant: Literal["rgb", "msrgb"] = "rgb"
    false_detection: bool = False


@dataclass(frozen=True, kw_only=True)
class SampleOptions(Options):
    """Bundled sample (--dataset sample).

    Attributes:
        tile_size: side of a tile, in pixels of 10 m.
        fold: the area of the scene to test on, from 0 to 7; two others validate.
    """

    tile_size: int = setting(16, "PIXELS")
    fold: int = setting(0, "N")


@dataclass(frozen=True, kw_only=True)
class InputOptions(Options):
    """Model input.

    Attributes:
        bands: input bands, by name (none: all bands of the dataset's sensor).
        groups: channel groups, by band names, each with its own patch embedding; semicolons part the groups
            (none: one patch embedding for all bands).
        image_size: side of the square input, in pixels.
        normalization: clip-uint8 is SatMAE's (clip to mean +- 2 std, truncate to 256 levels), clip-float the same
            without truncation, standardize (x - mean) / std; stored with the weights.
        statistics: band means and deviations for the normalization: reference takes those published with the dataset,
            dataset those of the training tiles at hand (up to 2048 of them); stored with the weights.
        antialias: whether resizing smooths first; stored with the weights.
        crop_scale: smallest and largest share of the area that a random crop keeps.
    """

    bands: tuple[str, ...] | None = setting(None, "B,B,...", names, expects="band names such as B2,B3,B4")
    groups: tuple[tuple[str, ...], ...] | None = setting(
        None, "B,B;B,B", name_groups, expects="groups of band names such as B2,B3,B4;B11,B12"
    )
    image_size: int = setting(96, "PIXELS")
    normalization: Literal["clip-uint8", "clip-float", "standardize"] = "clip-uint8"
    statistics: Literal["reference", "dataset"] = "reference"
    antialias: bool = False
    crop_scale: tuple[float, float] = setting((0.2, 1.0), "LOW,HIGH", interval, expects="two shares such as 0.2,1")


@dataclass(frozen=True, kw_only=True)
class ModelOptions(Options):
    """Model.

    Attributes:
        model: encoder; source takes the sizes of the weights that --init names.
        patch_size: side of a patch, in pixels; the image size must be a multiple.
        init: weights to start from: a weights file of any known format, a run or Hugging Face folder, an https:// or
            hf:// address, a shortcut such as dinov2-vitl14, TorchGeo's or timm's name of weights (none: random).
        band_init: how a band that the source weights do not know starts: RGB slices by band name and the mean of
            RGB elsewhere, the mean everywhere, the RGB slice nearest in wavelength, or random.
        patch_resize: how the source's patch embedding changes its patch size, FlexiViT's way or as an image.
        allow_normalization_mismatch: start from weights of this package that were trained with another normalization.
        allow_band_mismatch: start from weights of this package that were trained on other bands of the same sensor.
        decoder_width: token width of the decoder.
        decoder_depth: blocks of the decoder.
        decoder_heads: attention heads of the decoder.
    """

    model: str = setting("vit_base", "NAME", known=(*MODELS, FROM_SOURCE))
    patch_size: int = setting(8, "PIXELS")
    init: str | None = setting(None, "SOURCE", source)
    band_init: Literal["rgb-by-name", "mean", "nearest-wavelength", "random"] = "rgb-by-name"
    patch_resize: Literal["pseudo-inverse", "bilinear"] = "pseudo-inverse"
    allow_normalization_mismatch: bool = False
    allow_band_mismatch: bool = False
    decoder_width: int = setting(512, "N")
    decoder_depth: int = setting(8, "N")
    decoder_heads: int = setting(16, "N")


@dataclass(frozen=True, kw_only=True)
class EncoderOptions(Options):
    """Encoder.

    Attributes:
        init: encoder to start from: a run folder or a weights file, or all else that pretrain takes
            (none: random weights of --model).
        model: sizes of an encoder of random weights; otherwise they are the source's.
        bands: input bands, by name (none: those the encoder was trained with).
        groups: channel groups, as in pretrain (none: the encoder's).
        image_size: side of the square input, in pixels (none: as the encoder was trained).
        patch_size: side of a patch, in pixels (none: the encoder's).
        normalization: method, as in pretrain (none: the encoder's own, with its statistics).
        statistics: reference takes the encoder's own; for bands that it was not trained with, or another normalization,
            those published with the dataset. dataset takes those of its training tiles.
        antialias: whether resizing smooths first (none: as the encoder was trained; of published files: RGB ones yes,
            as PIL does, others no).
        band_init: how a band that the encoder does not know starts, as in pretrain.
        patch_resize: how its patch embedding changes the patch size, as in pretrain.
        allow_normalization_mismatch: take weights of this package that were trained with another normalization.
        allow_band_mismatch: take weights of this package that were trained on other bands of the same sensor.
    """

    init: str | None = setting(None, "SOURCE", source)
    model: str | None = setting(None, "NAME", known=MODELS)
    bands: tuple[str, ...] | None = setting(None, "B,B,...", names, expects="band names such as B2,B3,B4")
    groups: tuple[tuple[str, ...], ...] | None = setting(
        None, "B,B;B,B", name_groups, expects="groups of band names such as B2,B3,B4;B11,B12"
    )
    image_size: int | None = setting(None, "PIXELS")
    patch_size: int | None = setting(None, "PIXELS")
    normalization: Literal["clip-uint8", "clip-float", "standardize"] | None = None
    statistics: Literal["reference", "dataset"] = "reference"
    antialias: bool | None = None
    band_init: Literal["rgb-by-name", "mean", "nearest-wavelength", "random"] = "rgb-by-name"
    patch_resize: Literal["pseudo-inverse", "bilinear"] = "pseudo-inverse"
    allow_normalization_mismatch: bool = False
    allow_band_mismatch: bool = False


@dataclass(frozen=True, kw_only=True)
class ExploraOptions(Options):
    """What is trained.

    Attributes:
        mode: explora trains whole blocks, LoRA, norms and embeddings; full trains all weights; scratch trains all
            from random weights.
        whole_blocks: blocks trained whole, from 1 to L, the last; L-1 is the last but one; none.
        rank: rank of LoRA on Q and V of all other blocks (0: no LoRA).
        alpha: LoRA's scale is alpha / rank (none: alpha = rank).
        decoder_rank: rank of LoRA in the decoder of a masked autoencoder (0: no LoRA there).
        drop_path: rate of stochastic depth, the same in every block.
    """

    mode: Literal["explora", "full", "scratch"] = "explora"
    whole_blocks: tuple[int | str, ...] = setting((1, "L"), "1,L", blocks, expects="block numbers such as 1,L or none")
    rank: int = setting(32, "N")
    alpha: float | None = setting(None, "X")
    decoder_rank: int = setting(8, "N")
    drop_path: float = setting(0.0, "RATE")


@dataclass(frozen=True, kw_only=True)
class OptimizationOptions(Options):
    """Optimization.

    Attributes:
        epochs: passes over the training data.
        max_steps: optimizer steps, instead of epochs (none: as --epochs says).
        batch_size: images on one device in one forward pass.
        effective_batch_size: images in one optimizer step, by gradient accumulation
            (none: batch size x devices x nodes).
        lr: learning rate for 256 images in a step, scaled by effective batch size / 256; with dinov2 for 1024
            images, scaled by the square root of effective batch size / 1024.
        layer_decay: factor of the learning rate of what goes on from the source, for each layer that lies above it.
        min_lr: learning rate where the cosine ends, scaled as --lr.
        warmup_epochs: epochs of linear warm-up.
        warmup_steps: optimizer steps of linear warm-up (none: as --warmup-epochs says).
        weight_decay: AdamW's weight decay.
        clip_grad: largest norm of the gradient (none: no clipping).
        seed: seed of the weights, the order of the data, crops and masks.
    """

    epochs: int | None = setting(200, "N")
    max_steps: int | None = setting(None, "N")
    batch_size: int = setting(64, "IMAGES")
    effective_batch_size: int | None = setting(None, "IMAGES")
    lr: float = setting(4.5e-4, "X")
    layer_decay: float = setting(1.0, "X")
    min_lr: float = setting(0.0, "X")
    warmup_epochs: float = setting(1.0, "N")
    warmup_steps: int | None = setting(None, "N")
    weight_decay: float = setting(0.0, "X")
    clip_grad: float | None = setting(None, "NORM")
    seed: int = setting(0, "N")


@dataclass(frozen=True, kw_only=True)
class PretrainRateOptions(Options):
    """Rates of pre-training.

    Attributes:
        whole_blocks_lr_scale: learning rate of whole blocks and norms, relative to that of LoRA and embeddings.
        patch_embed_lr_scale: further factor for patch embeddings that go on from the source.
        weight_decay_end: what the weight decay reaches at the end, by a cosine (none: it stays).
        probe_every: optimizer steps between two kNN probes, the first before training (0: none).
    """

    whole_blocks_lr_scale: float = setting(1.0, "X")
    patch_embed_lr_scale: float = setting(1.0, "X")
    weight_decay_end: float | None = setting(None, "X")
    probe_every: int = setting(5000, "STEPS")


@dataclass(frozen=True, kw_only=True)
class DeviceOptions(Options):
    """Machine.

    Attributes:
        accelerator: where to compute; auto takes a GPU where there is one.
        precision: bf16 computes in bfloat16 where that is safe and keeps the weights in float32.
    """

    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    precision: Literal["32", "bf16"] = "32"


@dataclass(frozen=True, kw_only=True)
class ScalingOptions(DeviceOptions):
    """Parallelism and memory.

    Attributes:
        devices: GPUs, or CPU processes, in each node.
        num_nodes: machines.
        strategy: Lightning's strategy for several devices, such as ddp.
        grad_checkpointing: compute activations twice to save memory.
    """

    devices: int = setting(1, "N")
    num_nodes: int = setting(1, "N")
    strategy: str = setting("auto", "NAME")
    grad_checkpointing: bool = False


@dataclass(frozen=True, kw_only=True)
class RunOptions(Options):
    """Run folder.

    Attributes:
        output: folder to write the run into; must not hold another run.
        resume: go on with the run in --output, or in the folder named here; starts it if it does not exist yet and
            all options are given.
        log_every: optimizer steps between two rows of metrics.csv.
        checkpoint_every: optimizer steps between two checkpoints.
    """

    output: str | None = setting(None, "RUN", path, required=True)
    resume: bool = setting(False, "RUN")
    log_every: int = setting(50, "STEPS")
    checkpoint_every: int = setting(1000, "STEPS")
