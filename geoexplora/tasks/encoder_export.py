"""Writes the encoder of a training that another command line runs, such as ``torchgeo fit``."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from geoexplora.errors import ConfigError
from geoexplora.explora import merged_state_dict, table_to_json
from geoexplora.weights.source_weights import ENCODER_FILE
from geoexplora.weights.write import save_encoder

log = logging.getLogger(__name__)


class EncoderExport(Callback):
    """Writes ``encoder.safetensors``, merged and plain, after a training and, on request, while it lasts.

    ``geoexplora probe``, ``finetune``, ``embed``, ... read it by ``--init``, and stock timm loads it strictly.

    Args:
        path: the file, ending in .safetensors, or a folder; default: the logger's folder.
        every_n_epochs: write it after every N epochs as well.

    Raises:
        ConfigError: if N is not positive, or the task is none of this package's.
    """

    def __init__(self, path: str | None = None, every_n_epochs: int | None = None) -> None:
        if every_n_epochs is not None and every_n_epochs < 1:
            raise ConfigError(f"every_n_epochs {every_n_epochs} cannot be", "Give at least 1, or leave it out.")
        self.path = path
        self.every_n_epochs = every_n_epochs

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse, before anything is trained, a task whose encoder is not known."""
        if not hasattr(type(pl_module), "encoder"):
            raise ConfigError(
                f"{type(pl_module).__name__} has no encoder that could be written",
                "Use EncoderExport with a task of geoexplora.tasks.",
            )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write it after every N-th epoch."""
        if self.every_n_epochs is not None and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._write(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write it at the end."""
        self._write(trainer, pl_module)

    def _write(self, trainer: Trainer, task: Any) -> None:
        # Every process asks, as the folder's name is settled among them.
        folder = trainer.log_dir or trainer.default_root_dir
        if not trainer.is_global_zero:
            return
        file = Path(self.path or folder)
        if file.suffix != ".safetensors":
            file = file / ENCODER_FILE
        file.parent.mkdir(parents=True, exist_ok=True)
        trained = table_to_json(task.parameter_table())
        save_encoder(file, merged_state_dict(task.encoder), task.spec, step=trainer.global_step, trained=trained)
        log.info("encoder: %s", file)
