"""Brings a run folder up to date after a checkpoint: merged encoder, decoder, adapter, pictures, record."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from geoexplora.datamodules.tiles import TilesDataModule
from geoexplora.explora import merged_state_dict, save_adapter, table_to_json, trained_names
from geoexplora.objectives.mae import normalize_patches, patchify, unpatchify
from geoexplora.runs.folder import RunFolder
from geoexplora.runs.metrics import read_metrics
from geoexplora.runs.pictures import plot_features, plot_reconstruction
from geoexplora.runs.plots import plot_health, plot_loss
from geoexplora.tasks.features import evaluating
from geoexplora.tasks.pretrain.dinov2 import ExPLoRADINOv2
from geoexplora.tasks.pretrain.mae import ExPLoRAPretrain
from geoexplora.tasks.pretrain.patch_features import (
    align,
    patch_features,
    principal_scores,
    read_before,
    score_colours,
    store_before,
)
from geoexplora.weights.write import save_decoder, save_encoder, save_heads

SHOWN = 4
"""Images in the pictures."""


class RunExport:
    """Writes everything of a run folder that follows from the weights; call it after a checkpoint.

    Args:
        folder: the run folder.
        datamodule: gives the images of the pictures.
    """

    def __init__(self, folder: RunFolder, datamodule: TilesDataModule) -> None:
        self.folder = folder
        self.datamodule = datamodule

    def __call__(self, trainer: Any, task: Any) -> None:
        """Write the files.

        Raises:
            RunError: if one cannot be written.
        """
        step = trainer.global_step
        trained = table_to_json(task.parameter_table())
        save_encoder(self.folder.encoder_file, merged_state_dict(task.encoder), task.spec, step=step, trained=trained)
        if task.is_explora:
            save_adapter(self.folder.adapter, task.encoder, task.config, task.spec, trained_names(task.trained_encoder))
        rows = read_metrics(self.folder.metrics_file)
        # Not every row has every column: the last value of each.
        self.folder.update_run_json(step=step, metrics={name: value for row in rows for name, value in row.items()})
        plot_loss(self.folder.metrics_file, self.folder.loss_plot)
        plot_health(self.folder.metrics_file, self.folder.health_plot)
        images = self._images(task)
        self._plot_features(task, images)
        if isinstance(task, ExPLoRAPretrain):
            self._export_decoder(task, step)
            self._plot_reconstruction(task, images)
        if isinstance(task, ExPLoRADINOv2):
            save_heads(self.folder.heads_file, task.model.teacher.heads.tensors(), task.spec, step=step)

    def before(self, task: Any) -> None:
        """Keep how the source sees the images of the pictures, before anything is trained.

        Raises:
            RunError: if it cannot be written.
        """
        store_before(self.folder.features_before, principal_scores(patch_features(task.encoder, self._images(task))))

    def _images(self, task: Any) -> Tensor:
        dataset = self.datamodule.eval_dataset("train")
        chosen = torch.linspace(0, len(dataset) - 1, min(SHOWN, len(dataset))).long().tolist()
        return torch.stack([dataset[index]["image"] for index in chosen]).to(task.device)

    def _export_decoder(self, task: ExPLoRAPretrain, step: int) -> None:
        decoder = task.model.decoder
        settings = {
            "width": decoder.embed.out_features,
            "depth": len(decoder.blocks),
            "heads": decoder.blocks[0].attn.num_heads,
            "norm_pix_loss": task.hparams["norm_pix_loss"],
        }
        save_decoder(self.folder.decoder_file, merged_state_dict(decoder), task.spec, settings, step=step)

    def _plot_features(self, task: Any, images: Tensor) -> None:
        before = read_before(self.folder.features_before)
        after = principal_scores(patch_features(task.encoder, images))
        if before is not None:
            after = align(after, before)
        plot_features(
            self.folder.features_plot,
            self.datamodule.normalization.inverse(images.cpu()),
            None if before is None else score_colours(before),
            score_colours(after),
            task.spec.bands,
            self.datamodule.sensor,
        )

    def _plot_reconstruction(self, task: ExPLoRAPretrain, images: Tensor) -> None:
        masked, rebuilt = reconstruct(task, images)
        inverse = self.datamodule.normalization.inverse
        hidden = masked.isnan()
        plot_reconstruction(
            self.folder.reconstruction_plot,
            inverse(images.cpu()),
            inverse(images.cpu()).masked_fill(hidden.cpu(), torch.nan),
            inverse(rebuilt.cpu()),
            task.spec.bands,
            self.datamodule.sensor,
        )


def reconstruct(task: ExPLoRAPretrain, images: Tensor) -> tuple[Tensor, Tensor]:
    """What the autoencoder sees of images and makes of them.

    Args:
        task: the task; its mask depends on its seed only.
        images: (B, C, S, S), normalized.

    Returns:
        The images with NaN where hidden, and the reconstruction: visible patches as they are, hidden ones predicted
        (with the true mean and deviation of a patch where these were normalized away). Both (B, C, S, S).
    """
    decoder, encoder = task.model.decoder, task.model.encoder
    mask = task.draw_mask(len(images))
    with evaluating(task.model):
        pred = task.model(images, mask.keep).pred.float()
    patches = patchify(images, decoder.patch_size)
    order = torch.tensor(decoder.channel_order, device=images.device).argsort()
    pred = pred[:, order]
    if task.hparams["norm_pix_loss"]:
        _, mean, std = normalize_patches(patches)
        pred = pred * std + mean
    sizes = torch.tensor(decoder.group_sizes, device=images.device)
    hidden = mask.removed.repeat_interleave(sizes, dim=1)[:, order].bool().unsqueeze(-1)
    grid = encoder.patch_embed.grid_size
    return (
        unpatchify(patches.masked_fill(hidden, torch.nan), grid),
        unpatchify(torch.where(hidden, pred, patches), grid),
    )
