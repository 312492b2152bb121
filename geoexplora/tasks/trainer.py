"""Lightning's trainer as the commands use it: steps instead of epochs, this package's checkpoints and metrics."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer

from geoexplora.errors import ConfigError
from geoexplora.runs.folder import RunFolder
from geoexplora.tasks.parallel import KeepSigterm
from geoexplora.tasks.schedule import Schedule


def make_trainer(options: Any, schedule: Schedule, folder: RunFolder, callbacks: Sequence[Callback]) -> Trainer:
    """The trainer of a command.

    Args:
        options: settings with ``ScalingOptions`` and ``OptimizationOptions``.
        schedule: gives the length.
        folder: the run folder.
        callbacks: the trainer's.

    Raises:
        ConfigError: if there are no such devices.
    """
    try:
        return Trainer(
            accelerator=options.accelerator,
            devices=options.devices,
            num_nodes=options.num_nodes,
            strategy=options.strategy,
            precision="bf16-mixed" if options.precision == "bf16" else "32-true",
            max_epochs=-1,
            max_steps=schedule.steps,
            accumulate_grad_batches=schedule.accumulate,
            gradient_clip_val=options.clip_grad,
            callbacks=[KeepSigterm(), *callbacks],
            logger=False,
            limit_val_batches=0,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            enable_model_summary=False,
            default_root_dir=folder.path,
        )
    except (ValueError, RuntimeError, MisconfigurationException) as problem:
        raise ConfigError(
            f"these devices cannot be used: {problem}", "Check --accelerator, --devices and --strategy."
        ) from problem


def quiet_lightning() -> None:
    """Hide Lightning's advice that does not apply: data order, logging and checkpoints are this package's."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # says which processes it ends
    for text in (
        ".*does not have many workers.*",
        ".*You passed in a `val_dataloader`.*",
        ".*resuming from a checkpoint that ended before.*",
        ".*treespec, LeafSpec.*",
        ".*module\\(s\\) in eval mode.*",  # a teacher's, or a frozen encoder's
    ):
        warnings.filterwarnings("ignore", text)
