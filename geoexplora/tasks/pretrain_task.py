"""Self-supervised pre-training as a TorchGeo task: ExPLoRA, full, or from scratch, on one code path.

Shapes: B batch, C bands, S image side, G channel groups, L positions, K visible tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torchgeo.tasks import BaseTask

from geoexplora.datamodules.sampling import generator
from geoexplora.explora import (
    ExploraConfig,
    PartCount,
    apply_explora,
    apply_explora_to_decoder,
    parameter_table,
    resolve_blocks,
)
from geoexplora.models.attention import use_fast_attention
from geoexplora.models.decoder import MAEDecoder
from geoexplora.models.initialization import initialize_plain_encoder
from geoexplora.models.linear import use_fast_linears
from geoexplora.models.masked_autoencoder import MaskedAutoencoder
from geoexplora.objectives.mae import Pairing, mae_loss
from geoexplora.objectives.masking import TokenMask, mask_from_noise, noise_shape
from geoexplora.tasks.optimization import parameter_groups, warmup_cosine
from geoexplora.tasks.sources import architecture, load_source, of_architecture
from geoexplora.weights.contract import Allowed
from geoexplora.weights.files import read_weights
from geoexplora.weights.load import build_encoder
from geoexplora.weights.spec import EncoderSpec

Mode = Literal["explora", "full", "scratch"]

SOURCE_KEY, DATA_KEY = "geoexplora_source", "geoexplora_data"
"""Where a checkpoint keeps what was found in ``init``: a resumed run does not read that file again."""


class ExPLoRAPretrain(BaseTask):
    """Masked-autoencoder pre-training of a plain or group-channel ViT (ExPLoRA, ICML 2025, arXiv 2406.10973).

    Batches hold ``image`` (B, C, S, S), normalized. Masks depend on the seed, the batch's number and the rank only,
    so a resumed run repeats an uninterrupted one.

    Args:
        model: architecture, a name in ``geoexplora.registry.MODELS``, or ``source`` for that of ``init``. LayerScale,
            registers and the kind of MLP are always the source's.
        image_size: S in pixels.
        patch_size: patch side in pixels.
        sensor: name of the sensor that the bands belong to.
        bands: input bands by name, in the order of the channels.
        normalization: ``Normalization.to_dict()`` of the images; stored with the weights.
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
        decoder_rank: LoRA rank in a decoder that comes with the source.
        decoder_width: decoder's token width.
        decoder_depth: decoder's blocks.
        decoder_heads: decoder's attention heads.
        mask_ratio: share of hidden tokens.
        mask: ``independent`` for each token, or ``spatial``: whole positions.
        norm_pix_loss: compare with normalized patches.
        pairing: see ``mae_loss``.
        lr: peak learning rate of LoRA, embeddings and new parts.
        whole_blocks_lr_scale: relative learning rate of whole blocks and norms in mode ``explora``.
        min_lr: learning rate at the end.
        warmup_steps: optimizer steps with a rising learning rate.
        total_steps: optimizer steps of the cosine; ``None`` asks the trainer.
        weight_decay: AdamW's.
        seed: of weights and masks.
        grad_checkpointing: recompute the encoder's activations in the backward pass.
        source_state: what an earlier start found in ``init``, from its checkpoint, where the weights then come from
            as well; ``init`` is not read.

    Raises:
        ConfigError: for settings that do not fit each other.
        WeightsError: if ``init`` cannot be used.
    """

    ignore = ("source_state",)
    monitor = "loss"

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
        decoder_rank: int = 8,
        decoder_width: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        mask_ratio: float = 0.75,
        mask: Literal["independent", "spatial"] = "independent",
        norm_pix_loss: bool = True,
        pairing: Pairing = "own",
        lr: float = 4.5e-4,
        whole_blocks_lr_scale: float = 1.0,
        min_lr: float = 0.0,
        warmup_steps: int = 0,
        total_steps: int | None = None,
        weight_decay: float = 0.0,
        seed: int = 0,
        grad_checkpointing: bool = False,
        source_state: dict[str, Any] | None = None,
    ) -> None:
        self.source_state = source_state
        self.data_state: dict[str, Any] | None = None
        super().__init__()

    def configure_models(self) -> None:
        """Build encoder and decoder, load the source, freeze what is not trained."""
        h = self.hparams
        source = None if h["init"] is None or self.source_state else read_weights(h["init"])
        built = (self.source_state or {}).get("architecture") or architecture(h["model"], source, bool(h["groups"]))
        spec = EncoderSpec.of(
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
            encoder: Any = build_encoder(spec)
            if spec.groups is None:
                initialize_plain_encoder(encoder)
            groups = None if spec.groups is None else encoder.patch_embed.groups
            decoder = MAEDecoder(
                encoder.embed_dim,
                encoder.patch_embed.grid_size,
                spec.patch_size,
                groups,
                len(spec.bands),
                h["decoder_width"],
                h["decoder_depth"],
                h["decoder_heads"],
                channel_width=h["decoder_width"] // 4,
            )
            state = self.source_state or load_source(
                encoder,
                decoder,
                spec,
                source,
                band_init=h["band_init"],
                patch_resize=h["patch_resize"],
                allowed=Allowed(h["allow_normalization_mismatch"], h["allow_band_mismatch"]),
                seed=h["seed"],
            )
            self.source_state = state | {"architecture": built}
            self.spec = replace(
                spec, source=state["source"], band_init=state["band_init"], patch_resize=state.get("patch_resize")
            )
            self.config = ExploraConfig(
                resolve_blocks(h["whole_blocks"], spec.depth),
                h["rank"],
                h["alpha"],
                embeddings=spec.groups is not None or state["new_bands"] or state["source"] is None,
                decoder_rank=h["decoder_rank"],
            )
            if h["mode"] == "explora":
                apply_explora(encoder, self.config)
                apply_explora_to_decoder(
                    decoder, self.config, pretrained=state["decoder_loaded"], new_bands=state["new_outputs"]
                )
            else:
                _freeze_encodings(encoder)
        encoder.set_grad_checkpointing(h["grad_checkpointing"])
        self.model = use_fast_linears(use_fast_attention(MaskedAutoencoder(encoder, decoder)))

    @property
    def num_groups(self) -> int:
        """G; 1 for a plain ViT."""
        return 1 if self.spec.groups is None else len(self.spec.groups)

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
        return parameter_table(self.model.encoder, self.trained_whole, decoder=self.model.decoder)

    def draw_mask(self, batch_size: int, *seeds: int) -> TokenMask:
        """Draw a mask that depends on the seeds only, on the module's device.

        Args:
            batch_size: B.
            seeds: what the draw is to depend on besides the task's seed.
        """
        spatial = self.hparams["mask"] == "spatial"
        shape = noise_shape(batch_size, self.num_groups, self.model.decoder.positions, spatial)
        noise = torch.rand(shape, generator=generator(self.hparams["seed"], *seeds))
        return mask_from_noise(noise.to(self.device), self.hparams["mask_ratio"], self.num_groups, spatial)

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """One forward pass.

        Returns:
            ``loss``, and detached for the callbacks ``value`` (the loss) and ``latent`` (B, 1 + K, D).
        """
        images = batch["image"]
        number = self.trainer.fit_loop.epoch_loop.total_batch_idx
        mask = self.draw_mask(len(images), number, self.global_rank)
        output = self.model(images, mask.keep)
        loss = mae_loss(
            output.pred.float(),
            images,
            mask.removed,
            self.model.decoder.channel_order,
            self.model.decoder.group_sizes,
            self.hparams["norm_pix_loss"],
            self.hparams["pairing"],
        )
        return {"loss": loss, "value": loss.detach(), "latent": output.latent.detach()}

    def on_train_start(self) -> None:
        """Set the rates by the schedule: a checkpoint brings back those of the shorter run that wrote it."""
        schedule: Any = self.lr_schedulers()
        for group, peak, factor in zip(
            schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True
        ):
            group["lr"] = peak * factor(schedule.last_epoch)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what was found in ``init``, and which data the training goes through."""
        checkpoint[SOURCE_KEY] = self.source_state
        checkpoint[DATA_KEY] = self.data_state

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with a learning rate for each kind of part, cosine with warm-up by step (He et al. 2022)."""
        h = self.hparams
        scale = h["whole_blocks_lr_scale"] if self.is_explora else 1.0
        groups = parameter_groups(
            self.model.encoder,
            self.model.decoder,
            self.trained_whole,
            h["lr"],
            scale,
            h["weight_decay"],
            bool(self.source_state and self.source_state["decoder_loaded"]),
        )
        optimizer = AdamW(groups, lr=h["lr"], betas=(0.9, 0.95))
        total = h["total_steps"] or int(self.trainer.estimated_stepping_batches)
        schedule = LambdaLR(optimizer, warmup_cosine(total, h["warmup_steps"], h["min_lr"] / h["lr"]))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _freeze_encodings(encoder: Any) -> None:
    """Sin-cos encodings stay fixed where all else is trained, as in MAE and SatMAE."""
    for name, parameter in encoder.named_parameters():
        if name in {"pos_embed", "channel_embed"}:
            parameter.requires_grad_(False)
