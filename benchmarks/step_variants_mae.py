"""Masked-autoencoder steps in fMoW-Sentinel geometry, for ``training_step.py``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import timm
import torch
from step_measure import DEVICE, Variant
from timm.layers import Attention
from torch import Tensor, nn

from geoexplora.explora import ExploraConfig, apply_explora, apply_explora_to_decoder
from geoexplora.models import MAEDecoder, MaskedAutoencoder
from geoexplora.models.attention import use_fast_attention
from geoexplora.models.linear import use_fast_linears
from geoexplora.objectives.mae import mae_loss
from geoexplora.objectives.masking import mask_from_noise

BANDS, GROUPS, SIZE = 10, 3, 96


@dataclass(frozen=True)
class MAEVariant(Variant):
    """A masked autoencoder; see ``training_step.py`` for the modes."""

    title: ClassVar[str] = "MAE; speed and memory against reference fp32"
    modes: ClassVar[tuple[str, ...]] = ("reference", "full", "explora")

    @property
    def baseline(self) -> Variant:
        """SatMAE's way for all."""
        return MAEVariant("reference", "fp32")

    @property
    def counted(self) -> Variant:
        """Attention written out is counted as attention."""
        return replace(super().counted, mode="full" if self.mode == "reference" else self.mode)

    def build(self, model: str, device: torch.device = DEVICE) -> nn.Module:
        """The model as this variant trains it."""
        torch.manual_seed(0)
        encoder = timm.create_model(f"group_channel_{model}")
        decoder = MAEDecoder(encoder.embed_dim, (12, 12), 8, encoder.patch_embed.groups, BANDS)
        if self.mode == "explora":
            apply_explora(encoder, ExploraConfig((1, len(encoder.blocks)), rank=32, embeddings=True))
            apply_explora_to_decoder(decoder, ExploraConfig(decoder_rank=8), pretrained=True, new_bands=True)
        else:
            encoder.pos_embed.requires_grad_(False)
            encoder.channel_embed.requires_grad_(False)
        autoencoder = MaskedAutoencoder(encoder, decoder).train().to(device)
        if self.mode == "reference":
            for module in autoencoder.modules():
                if isinstance(module, Attention):
                    module.fused_attn = False
            return autoencoder
        return use_fast_linears(use_fast_attention(autoencoder))

    def inputs(self, batch: int, device: torch.device = DEVICE) -> Tensor:
        """Images."""
        return torch.rand(batch, BANDS, SIZE, SIZE, device=device)

    def loss(self, model: MaskedAutoencoder, inputs: Tensor) -> Tensor:
        """The loss under a mask drawn anew."""
        decoder = model.decoder
        noise = torch.rand(len(inputs), GROUPS * decoder.positions, device=inputs.device)
        mask = mask_from_noise(noise, 0.75, GROUPS)
        with self.autocast():
            pred = model(inputs, mask.keep).pred
        return mae_loss(pred.float(), inputs, mask.removed, decoder.channel_order, decoder.group_sizes)

    def after_step(self, model: MaskedAutoencoder) -> None:
        """Nothing."""

    def product_sizes(self, model: str, batch: int) -> list[tuple[int, int, int]]:
        """The MLPs of encoder and decoder."""
        width = timm.create_model(f"group_channel_{model}", depth=1).embed_dim
        tokens, decoded = batch * (1 + 108), batch * (1 + 432)
        return [(tokens, width, 4 * width), (tokens, 4 * width, width), (decoded, 512, 2048), (decoded, 2048, 512)]
