"""Masked-autoencoder pre-training as a TorchGeo task.

Shapes: B batch, C bands, S image side, G channel groups, L positions, K visible tokens, D width.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from geoexplora.datamodules.sampling import generator
from geoexplora.explora import apply_explora_to_decoder
from geoexplora.models.decoder import MAEDecoder
from geoexplora.models.masked_autoencoder import MaskedAutoencoder
from geoexplora.objectives.mae import Pairing, mae_loss
from geoexplora.objectives.masking import TokenMask, mask_from_noise, noise_shape
from geoexplora.tasks.pretrain.task import PretrainTask, freeze_encodings
from geoexplora.transforms.multi_crop import MultiCrop
from geoexplora.weights.source_weights import SourceWeights


class ExPLoRAPretrain(PretrainTask):
    """Masked-autoencoder pre-training of a plain or group-channel ViT (ExPLoRA, ICML 2025, arXiv 2406.10973).

    Batches hold ``image`` (B, C, S, S), normalized; or whole tiles (B, C, H, H) with ``size`` (B, 2), the height and
    width that they had before they were made square, as TorchGeo's datamodules give them: then random crops are cut
    on the device.

    Args:
        crop_scale: smallest and largest share of a whole tile's area in a crop.
        decoder_rank: LoRA rank in a decoder that comes with the source.
        decoder_width: decoder's token width.
        decoder_depth: decoder's blocks.
        decoder_heads: decoder's attention heads.
        mask_ratio: share of hidden tokens.
        mask: ``independent`` for each token, or ``spatial``: whole positions.
        norm_pix_loss: compare with normalized patches.
        pairing: see ``mae_loss``.
        kwargs: as for ``PretrainTask``.

    Raises:
        ConfigError: for settings that do not fit each other.
        WeightsError: if ``init`` cannot be used.
    """

    def __init__(
        self,
        *,
        crop_scale: tuple[float, float] = (0.2, 1.0),
        decoder_rank: int = 8,
        decoder_width: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        mask_ratio: float = 0.75,
        mask: Literal["independent", "spatial"] = "independent",
        norm_pix_loss: bool = True,
        pairing: Pairing = "own",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)

    @property
    def encoder(self) -> Any:
        """The encoder."""
        return self.model.encoder

    @property
    def trained_encoder(self) -> Any:
        """The encoder."""
        return self.model.encoder

    @property
    def heads(self) -> dict[str, nn.Module]:
        """The decoder."""
        return {"decoder": self.model.decoder}

    def build_decoder(self, encoder: Any) -> MAEDecoder:
        """The decoder, with new weights."""
        h = self.hparams
        return MAEDecoder(
            encoder.embed_dim,
            encoder.patch_embed.grid_size,
            self.spec.patch_size,
            None if self.spec.groups is None else encoder.patch_embed.groups,
            len(self.spec.bands),
            h["decoder_width"],
            h["decoder_depth"],
            h["decoder_heads"],
            channel_width=h["decoder_width"] // 4,
        )

    def build_objective(self, encoder: Any, decoder: Any, source: SourceWeights | None) -> MaskedAutoencoder:
        """The autoencoder, with what of the decoder is frozen settled."""
        state = self.source_state or {}
        if self.is_explora:
            apply_explora_to_decoder(
                decoder, self.config, pretrained=state["decoder_loaded"], new_bands=state["new_outputs"]
            )
        else:
            freeze_encodings(encoder)
        size = self.spec.image_size
        self.crop = MultiCrop(
            size, size, tuple(self.hparams["crop_scale"]), global_crops=1, local_crops=0, antialias=self.spec.antialias
        )
        return MaskedAutoencoder(encoder, decoder)

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

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """One forward pass; see ``PretrainTask``."""
        batch = self.adapted(batch)
        images = batch["image"]
        if "size" in batch:
            draws = generator(self.hparams["seed"], *self.batch_seeds(), 2)  # another stream than that of the masks
            images = self.crop(images, batch["size"].cpu(), draws).global_
        mask = self.draw_mask(len(images), *self.batch_seeds())
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
        features = output.latent[:, 1:].detach().mean(1)
        return {"loss": loss, "value": loss.detach(), "parts": {}, "features": features}
