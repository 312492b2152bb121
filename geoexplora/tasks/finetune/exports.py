"""The run folder of a fine-tuning: merged encoder, head, adapter; and reading the whole model back."""

from __future__ import annotations

import json
from inspect import signature
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from geoexplora.errors import WeightsError
from geoexplora.explora import merged_state_dict, save_adapter, table_to_json
from geoexplora.runs.folder import RunFolder
from geoexplora.tasks.finetune.building import TASKS
from geoexplora.tasks.finetune.task import FineTuneTask
from geoexplora.weights.load import load_encoder
from geoexplora.weights.write import save_encoder, save_task_head


def export_model(folder: RunFolder, task: FineTuneTask, name: str, step: int) -> None:
    """Write the model as it is now.

    Args:
        folder: the run folder.
        task: the task.
        name: of the task on the command line.
        step: optimizer steps done.

    Raises:
        RunError: if a file cannot be written.
        WeightsError: if a weight is not finite.
    """
    trained = table_to_json(task.parameter_table())
    save_encoder(folder.encoder_file, merged_state_dict(task.encoder), task.spec, step=step, trained=trained)
    own = signature(type(task)).parameters  # the rest is the encoder's or the training's
    settings = {key: task.hparams[key] for key in own if key in task.hparams}
    save_task_head(
        folder.task_head_file, task.model.head.state_dict(), task.spec, {"name": name, **settings}, step=step
    )
    if task.fine_tuning.config.has_adapters:
        save_adapter(folder.adapter, task.encoder, task.fine_tuning.config, task.spec)


def load_finetuned(run: str | Path) -> FineTuneTask:
    """Read a fine-tuned model, ready to predict.

    Args:
        run: the run folder of ``geoexplora finetune``.

    Returns:
        The task in evaluation mode, of method ``linear`` with all weights merged: ``task.predict(images)`` gives
        probabilities or values, ``task.spec.bands`` names the bands of the images, ``task.hparams["labels"]`` the
        classes.

    Raises:
        WeightsError: if a file is missing or damaged.
    """
    folder = RunFolder(run)
    encoder, spec = load_encoder(folder.path)
    try:
        with safe_open(folder.task_head_file, "pt") as file:
            settings: dict[str, Any] = json.loads((file.metadata() or {})["settings"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        task = TASKS[settings.pop("name")](encoder=encoder, spec=spec.to_metadata(), method="linear", **settings)
        task.model.head.load_state_dict(tensors)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as problem:
        raise WeightsError(
            f"{folder.path} is no whole run of geoexplora finetune: {problem}", "Name a run folder with its head."
        ) from problem
    return task.eval()
