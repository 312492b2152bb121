"""From resolved options to a pre-training task."""

from __future__ import annotations

import math
from inspect import signature
from typing import Any

from geoexplora.datamodules.tiles import TilesDataModule
from geoexplora.tasks.pretrain.dinov2 import ExPLoRADINOv2, load_size
from geoexplora.tasks.pretrain.mae import ExPLoRAPretrain
from geoexplora.tasks.pretrain.task import PretrainTask
from geoexplora.tasks.schedule import Schedule


def build_task(
    options: Any, datamodule: TilesDataModule, schedule: Schedule, state: dict[str, Any] | None
) -> PretrainTask:
    """The task that the options describe.

    Args:
        options: settings of ``geoexplora pretrain``.
        datamodule: gives bands, sensor and normalization.
        schedule: gives the length.
        state: what an earlier start of this run found in ``--init``.
    """
    dinov2 = options.objective == "dinov2"
    task: type[PretrainTask] = ExPLoRADINOv2 if dinov2 else ExPLoRAPretrain
    wanted = (*signature(PretrainTask).parameters, *signature(task).parameters)
    settings = {name: getattr(options, name) for name in wanted if hasattr(options, name)}
    scale = rate_scale(options.objective, schedule.images_per_step)
    settings |= {
        "sensor": datamodule.sensor.name,
        "bands": datamodule.bands,
        "normalization": datamodule.normalization.to_dict(),
        "lr": options.lr * scale,
        "min_lr": options.min_lr * scale,
        "warmup_steps": schedule.warmup_steps,
        "total_steps": schedule.steps,
        "source_state": state,
    }
    if dinov2:
        settings |= {
            "teacher_warmup_steps": schedule.in_steps(options.teacher_warmup_epochs, options.teacher_warmup_steps),
            "freeze_last_steps": schedule.in_steps(options.freeze_last_epochs, options.freeze_last_steps),
        }
    return task(**settings)


def rate_scale(objective: str, images_per_step: int) -> float:
    """Factor from ``--lr`` to the learning rate, by the rules of MAE (He et al. 2022) and of DINOv2."""
    return images_per_step / 256 if objective == "mae" else math.sqrt(images_per_step / 1024)


def whole_tile_size(options: Any) -> int | None:
    """The square that whole tiles are read at for DINOv2's crops; ``None`` where the loaders cut them."""
    if options.objective != "dinov2":
        return None
    return int(options.load_size or load_size(options.image_size, options.global_scale))
