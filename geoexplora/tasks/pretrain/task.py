"""What the self-supervised pre-training tasks share: ExPLoRA, full, or from scratch, on one code path."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn

from geoexplora.explora import ExploraConfig, PartCount, apply_explora, parameter_table, resolve_blocks
from geoexplora.models.attention import use_fast_attention
from geoexplora.models.encoding import set_drop_path
from geoexplora.models.initialization import initialize_plain_encoder
from geoexplora.models.linear import use_fast_linears
from geoexplora.models.pooling import Pool
from geoexplora.tasks.data_task import DataTask
from geoexplora.tasks.optimization import parameter_groups
from geoexplora.tasks.run_records import DATA_KEY, SOURCE_KEY
from geoexplora.tasks.scheduled_task import ScheduledTask
from geoexplora.tasks.sources import architecture, load_source, of_architecture
from geoexplora.weights.contract import Allowed
from geoexplora.weights.files import read_weights
from geoexplora.weights.load import build_encoder
from geoexplora.weights.source_weights import SourceWeights
from geoexplora.weights.spec import EncoderSpec

Mode = Literal["explora", "full", "scratch"]


class PretrainTask(DataTask, ScheduledTask):
    """Base of the pre-training tasks (ExPLoRA, ICML 2025, arXiv 2406.10973).

    A subclass builds the objective around the encoder and computes its loss.

    ``training_step`` returns ``loss``, and detached for the callbacks ``value`` (the loss), ``parts`` (scalars by the
    name of their column in metrics.csv) and ``features`` (any number, D), whose spread tells of collapse.

    Args:
        model: architecture, a name in ``geoexplora.registry.MODELS``, or ``source`` for that of ``init``. LayerScale,
            registers and the kind of MLP are always the source's.
        image_size: S in pixels.
        patch_size: patch side in pixels.
        sensor: name of the sensor that the bands belong to.
        bands: input bands by name, in the order of the channels; none: see ``DataTask``.
        normalization: ``Normalization.to_dict()`` of the images; stored with the weights; ``None``: see ``DataTask``.
        groups: channel groups by band names; ``None`` for a plain ViT.
        antialias: whether images were resized with antialiasing; stored with the weights.
        init: source weights: what ``geoexplora.weights.read_weights`` takes; ``None`` starts from random weights.
        band_init: how patch embeddings of bands that the source does not know start.
        patch_resize: how patch embeddings change their patch size.
        allow_normalization_mismatch: go on where weights of this package were trained with another normalization.
        allow_band_mismatch: go on where weights of this package were trained on other bands of the same sensor.
        mode: ``explora`` trains whole blocks, LoRA, norms, class token and, for new bands, embeddings; ``full`` and
            ``scratch`` train all weights.
        whole_blocks: 1-based numbers of the blocks that ExPLoRA trains whole, ``L`` for the last.
        rank: LoRA rank r.
        alpha: LoRA alpha; ``None`` means r.
        drop_path: rate of stochastic depth, the same in every block.
        lr: peak learning rate of LoRA, new embeddings and heads.
        whole_blocks_lr_scale: relative learning rate of whole blocks and norms in mode ``explora``.
        layer_decay: see ``parameter_groups``.
        patch_embed_lr_scale: see ``parameter_groups``.
        min_lr: learning rate at the end.
        warmup_steps: optimizer steps with a rising learning rate.
        total_steps: optimizer steps of the cosine; ``None`` asks the trainer.
        weight_decay: AdamW's.
        weight_decay_end: what it reaches at the end, by a cosine; ``None`` keeps it.
        seed: of weights, masks and crops.
        grad_checkpointing: recompute the encoder's activations in the backward pass.
        source_state: what an earlier start found in ``init``, from its checkpoint, where the weights then come from
            as well; ``init`` is not read.

    Raises:
        ConfigError: for settings that do not fit each other.
        WeightsError: if ``init`` cannot be used.
    """

    ignore = ("source_state",)
    monitor = "train_loss"
    resizes = False
    betas = (0.9, 0.95)
    pool: Pool = "mean"
    """Features that the kNN probe looks at."""

    def __init__(
        self,
        model: str = "vit_base",
        image_size: int = 96,
        patch_size: int = 8,
        sensor: str = "sentinel-2",
        bands: Sequence[str] = (),
        normalization: dict[str, Any] | None = None,
        groups: Sequence[Sequence[str]] | None = None,
        antialias: bool = False,
        init: str | None = None,
        band_init: str = "rgb-by-name",
        patch_resize: str = "pseudo-inverse",
        allow_normalization_mismatch: bool = False,
        allow_band_mismatch: bool = False,
        mode: Mode = "explora",
        whole_blocks: Sequence[int | str] = (1, "L"),
        rank: int = 32,
        alpha: float | None = None,
        drop_path: float = 0.0,
        lr: float = 4.5e-4,
        whole_blocks_lr_scale: float = 1.0,
        layer_decay: float = 1.0,
        patch_embed_lr_scale: float = 1.0,
        min_lr: float = 0.0,
        warmup_steps: int = 0,
        total_steps: int | None = None,
        weight_decay: float = 0.0,
        weight_decay_end: float | None = None,
        seed: int = 0,
        grad_checkpointing: bool = False,
        source_state: dict[str, Any] | None = None,
    ) -> None:
        self.source_state = source_state
        self.data_state: dict[str, Any] | None = None
        super().__init__()

    @property
    @abstractmethod
    def encoder(self) -> Any:
        """The encoder whose features count: what is exported, probed and pictured."""

    @property
    @abstractmethod
    def trained_encoder(self) -> Any:
        """The encoder that the optimizer trains."""

    @property
    @abstractmethod
    def heads(self) -> dict[str, nn.Module]:
        """What is trained beside the encoder, by the name of its row in the table of parameters."""

    @abstractmethod
    def build_objective(self, encoder: Any, decoder: nn.Module | None, source: SourceWeights | None) -> nn.Module:
        """The module that computes the objective, around an encoder with what is frozen settled.

        Args:
            encoder: the ViT, source weights loaded.
            decoder: from ``build_decoder``.
            source: where the weights come from; ``None`` for random ones, and where a checkpoint brings them.
        """

    def build_decoder(self, encoder: Any) -> nn.Module | None:
        """A decoder that may take over the source's weights; ``None`` where the objective has none."""
        return None

    def build_models(self) -> None:
        """Build the encoder, load the source, freeze what is not trained, build the objective."""
        h = self.hparams
        source = None if h["init"] is None or self.source_state else read_weights(h["init"])
        built = (self.source_state or {}).get("architecture") or architecture(h["model"], source, bool(h["groups"]))
        self.spec = EncoderSpec.of(
            **of_architecture(built),
            image_size=h["image_size"],
            patch_size=h["patch_size"],
            sensor=h["sensor"],
            bands=h["bands"],
            groups=h["groups"],
            normalization=h["normalization"] or {},
            antialias=h["antialias"],
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(h["seed"])
            encoder: Any = build_encoder(self.spec, dynamic_img_size=True)
            if self.spec.groups is None:
                initialize_plain_encoder(encoder)
            decoder = self.build_decoder(encoder)
            state = self.source_state or load_source(
                encoder,
                decoder,
                self.spec,
                source,
                band_init=h["band_init"],
                patch_resize=h["patch_resize"],
                allowed=Allowed(h["allow_normalization_mismatch"], h["allow_band_mismatch"]),
                seed=h["seed"],
            )
            self.source_state = state | {"architecture": built}
            self.spec = replace(
                self.spec, source=state["source"], band_init=state["band_init"], patch_resize=state.get("patch_resize")
            )
            self.config = ExploraConfig(
                resolve_blocks(h["whole_blocks"], self.spec.depth),
                h["rank"],
                h["alpha"],
                embeddings=self.spec.groups is not None or self.has_new_embeddings,
                decoder_rank=h.get("decoder_rank", 0),
            )
            if self.is_explora:
                apply_explora(encoder, self.config)
            if h["drop_path"]:
                set_drop_path(encoder, h["drop_path"])
            encoder.set_grad_checkpointing(h["grad_checkpointing"])
            torch.manual_seed(h["seed"])  # the same heads whatever is trained
            objective = self.build_objective(encoder, decoder, source)
        self.model = use_fast_linears(use_fast_attention(objective))

    @property
    def num_groups(self) -> int:
        """G; 1 for a plain ViT."""
        return 1 if self.spec.groups is None else len(self.spec.groups)

    @property
    def has_new_embeddings(self) -> bool:
        """Whether patch embeddings start from other weights than the source's, or from random ones."""
        state = self.source_state or {}
        return bool(state["new_bands"] or state["source"] is None)

    @property
    def trained_whole(self) -> tuple[int, ...]:
        """1-based numbers of the blocks that are trained whole."""
        whole: tuple[int, ...] = self.config.whole_blocks if self.is_explora else tuple(range(1, self.spec.depth + 1))
        return whole

    @property
    def is_explora(self) -> bool:
        """Whether only a part is trained."""
        return bool(self.hparams["mode"] == "explora")

    def parameter_table(self) -> list[PartCount]:
        """What is trained, by part."""
        return parameter_table(self.trained_encoder, self.trained_whole, **self.heads)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the loss as ``train_loss``, and its parts."""
        logged = {"train_loss": outputs["value"]} | {f"train_{name}": part for name, part in outputs["parts"].items()}
        self.log_dict(logged, on_step=True, on_epoch=True, batch_size=len(batch["image"]))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed stochastic depth, so that a resumed run drops what an uninterrupted one would have."""
        if self.hparams["drop_path"]:
            self.seed_batch()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what was found in ``init``, and which data the training goes through."""
        checkpoint[SOURCE_KEY] = self.source_state
        checkpoint[DATA_KEY] = self.data_state

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with a learning rate for each kind of part, cosine with warm-up by step (He et al. 2022)."""
        h = self.hparams
        groups = parameter_groups(
            self.trained_encoder,
            nn.ModuleDict(self.heads),
            self.trained_whole,
            h["lr"],
            h["whole_blocks_lr_scale"] if self.is_explora else 1.0,
            h["weight_decay"],
            bool(self.source_state and self.source_state["decoder_loaded"]),
            layer_decay=h["layer_decay"],
            patch_embed_scale=h["patch_embed_lr_scale"],
            new_embeddings=self.has_new_embeddings and h["mode"] != "scratch",
        )
        return self.adamw(groups)


def freeze_encodings(encoder: Any) -> None:
    """Sin-cos encodings stay fixed where all else is trained, as in MAE and SatMAE."""
    for name, parameter in encoder.named_parameters():
        if name in {"pos_embed", "channel_embed"}:
            parameter.requires_grad_(False)
