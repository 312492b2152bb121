"""ExPLoRA inside TorchGeo's own ``MAE`` task, for those who know that one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import timm
import torch
from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM
from timm.models import VisionTransformer
from torch import Tensor, nn
from torchgeo.tasks import MAE
from torchvision.models import WeightsEnum

from geoexplora.errors import ConfigError
from geoexplora.explora import ExploraConfig, PartCount, apply_explora, parameter_table, resolve_blocks
from geoexplora.models.initialization import initialize_plain_encoder
from geoexplora.registry import model_name
from geoexplora.tasks.data_task import DataTask
from geoexplora.tasks.sources import architecture, load_source, of_architecture
from geoexplora.weights.contract import Allowed
from geoexplora.weights.files import read_weights
from geoexplora.weights.load import build_encoder
from geoexplora.weights.source_weights import SourceWeights
from geoexplora.weights.spec import EncoderSpec


class ExPLoRAMAE(DataTask, MAE):
    """TorchGeo's ``MAE`` that trains only what ExPLoRA trains (ICML 2025, arXiv 2406.10973).

    The arguments up to ``warmup_epochs``, the loss, the augmentation and the schedule are TorchGeo's; the decoder is
    its lightly one, and starts from random weights. For group-channel models, the source's decoder and resumable
    order take ``ExPLoRAPretrain``. Random weights (``weights`` None) are trained whole.

    Args:
        model: a plain ViT's name in timm.
        weights: a ``WeightsEnum``, what ``geoexplora.weights.read_weights`` takes, or True for the model's own.
        in_channels: number of bands, checked against those settled by name.
        transform: augmentation of normalized batches; None: TorchGeo's.
        decoder_dim: decoder's token width.
        lr: peak learning rate.
        decoder_num_heads: decoder's attention heads.
        decoder_depth: decoder's blocks.
        weight_decay: AdamW's.
        mask_ratio: share of hidden tokens.
        size: image side in pixels.
        norm_pix_loss: compare with normalized patches.
        warmup_epochs: epochs with a rising learning rate.
        whole_blocks: 1-based numbers of the blocks trained whole, ``L`` for the last.
        rank: LoRA rank r.
        alpha: LoRA alpha; None means r.
        sensor: name of the sensor that the bands belong to.
        bands: input bands by name; none: see ``DataTask``.
        normalization: ``Normalization.to_dict()`` of the images; None: see ``DataTask``.
        band_init: how patch embeddings of bands that the source does not know start.
        allow_normalization_mismatch: go on where the weights were trained with another normalization.
        allow_band_mismatch: go on where the weights were trained on other bands of the same sensor.
        seed: of new weights.

    Raises:
        ConfigError: for settings that do not fit each other.
        WeightsError: if the weights cannot be used.
    """

    resizes = False

    def __init__(
        self,
        model: str = "vit_base_patch16_224",
        weights: WeightsEnum | str | bool | None = None,
        in_channels: int = 3,
        transform: nn.Module | None = None,
        decoder_dim: int = 512,
        lr: float = 1.5e-4,
        decoder_num_heads: int = 8,
        decoder_depth: int = 1,
        weight_decay: float = 0.05,
        mask_ratio: float = 0.75,
        size: int = 224,
        norm_pix_loss: bool = True,
        warmup_epochs: int = 40,
        whole_blocks: Sequence[int | str] = ("L",),
        rank: int = 64,
        alpha: float | None = None,
        sensor: str = "sentinel-2",
        bands: Sequence[str] = (),
        normalization: dict[str, Any] | None = None,
        band_init: str = "rgb-by-name",
        allow_normalization_mismatch: bool = False,
        allow_band_mismatch: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(
            model, weights, in_channels, transform, decoder_dim, lr, decoder_num_heads, decoder_depth, weight_decay,
            mask_ratio, size, norm_pix_loss, warmup_epochs,
        )  # fmt: skip

    @property
    def encoder(self) -> Any:
        """The ViT, with LoRA."""
        return self.backbone.vit

    @property
    def init(self) -> str | None:
        """What ``read_weights`` takes for ``weights``."""
        if isinstance(self.weights, WeightsEnum):
            return f"{type(self.weights).__name__}.{self.weights.name}"
        return str(self.hparams["model"]) if self.weights is True else self.weights or None

    def configure_models(self) -> None:
        """Build the models, unless what they take is not known yet."""
        self.hparams.update(init=self.init, groups=None)
        super().configure_models()

    def build_models(self) -> None:
        """Encoder with source weights, frozen but for what ExPLoRA trains, and lightly's decoder."""
        h = self.hparams
        if len(h["bands"]) != h["in_channels"]:
            raise ConfigError(
                f"in_channels is {h['in_channels']}, but the images have the bands {','.join(h['bands'])}",
                f"Set in_channels to {len(h['bands'])}, or name the bands to take.",
            )
        source = None if h["init"] is None else read_weights(h["init"])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(h["seed"])
            self.spec = self._describe(source)
            vit: Any = build_encoder(self.spec)
            initialize_plain_encoder(vit)
            state = load_source(
                vit,
                None,
                self.spec,
                source,
                band_init=h["band_init"],
                patch_resize="pseudo-inverse",
                allowed=Allowed(h["allow_normalization_mismatch"], h["allow_band_mismatch"]),
                seed=h["seed"],
            )
            self.spec = replace(
                self.spec, source=state["source"], band_init=state["band_init"], patch_resize=state["patch_resize"]
            )
            self.trained_whole = tuple(range(1, self.spec.depth + 1))
            if source is not None:
                self.trained_whole = resolve_blocks(h["whole_blocks"], self.spec.depth)
                config = ExploraConfig(self.trained_whole, h["rank"], h["alpha"], embeddings=state["new_bands"])
                apply_explora(vit, config)
            self.patch_size, self.num_prefix_tokens = self.spec.patch_size, vit.num_prefix_tokens
            # lightly would initialize anew what has been loaded.
            self.backbone = MaskedVisionTransformerTIMM(
                vit, weight_initialization="skip", pos_embed_initialization="skip"
            )
            self.backbone.mask_token.requires_grad_(False)  # TorchGeo hides tokens by leaving them out
            self.decoder = MAEDecoderTIMM(
                num_patches=vit.patch_embed.num_patches,
                patch_size=self.patch_size,
                embed_dim=vit.embed_dim,
                decoder_embed_dim=h["decoder_dim"],
                decoder_depth=h["decoder_depth"],
                decoder_num_heads=h["decoder_num_heads"],
                mlp_ratio=4.0,
                proj_drop_rate=0.0,
                attn_drop_rate=0.0,
                in_chans=len(self.spec.bands),
            )
        self.sequence_length = self.backbone.sequence_length

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the name of the weights, on which what is trained depends; TorchGeo keeps none."""
        checkpoint["hyper_parameters"]["weights"] = self.hparams["init"]

    def parameter_table(self) -> list[PartCount]:
        """What is trained, by part."""
        return parameter_table(self.encoder, self.trained_whole, decoder=self.decoder)

    def training_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """TorchGeo's step, on images normalized by the weights' contract."""
        return super().training_step(self.adapted(batch), batch_idx, dataloader_idx)

    def _describe(self, source: SourceWeights | None) -> EncoderSpec:
        """The description of timm's model, in the style of the source."""
        h = self.hparams
        try:
            with torch.device("meta"):  # only to look at it
                stock = timm.create_model(h["model"], num_classes=0)
        except RuntimeError as problem:
            raise ConfigError(f"model {h['model']}: {problem}", "Name a plain ViT of timm.") from problem
        if type(stock) is not VisionTransformer:
            raise ConfigError(
                f"model {h['model']} is no plain vision transformer of timm",
                "TorchGeo's MAE takes these only. For group-channel models use geoexplora.tasks.ExPLoRAPretrain.",
            )
        sizes = (stock.embed_dim, len(stock.blocks), stock.blocks[0].attn.num_heads)
        built = architecture(model_name(*sizes), source, grouped=False) | {"sizes": list(sizes)}
        return EncoderSpec.of(
            **of_architecture(built),
            image_size=h["size"],
            patch_size=stock.patch_embed.patch_size[0],
            sensor=h["sensor"],
            bands=h["bands"],
            normalization=h["normalization"],
        )
