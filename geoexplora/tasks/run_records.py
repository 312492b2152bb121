"""What a training writes into its run folder at the start, and what must be the same when it is resumed."""

from __future__ import annotations

import hashlib
import logging
from typing import Any

import numpy as np

from geoexplora.datamodules.tiles import TilesDataModule
from geoexplora.errors import DataError
from geoexplora.explora import PartCount, format_table, table_to_json
from geoexplora.runs.folder import RunFolder
from geoexplora.tasks.schedule import Schedule
from geoexplora.weights.spec import EncoderSpec

log = logging.getLogger(__name__)

SOURCE_KEY, DATA_KEY = "geoexplora_source", "geoexplora_data"
"""Where a checkpoint keeps what was found in ``--init``, which a resumed run does not read again, and in the data."""


def record_start(
    folder: RunFolder,
    options: Any,
    command: str,
    spec: EncoderSpec,
    table: list[PartCount],
    schedule: Schedule,
    lr: float,
    images: int,
    **more: Any,
) -> None:
    """Say what is trained, and write config.yaml and run.json.

    Args:
        folder: the run folder.
        options: settings of the command.
        command: its name.
        spec: the encoder's description.
        table: what is trained, by part.
        schedule: the length.
        lr: peak learning rate.
        images: number of training images.
        more: further sections of run.json.

    Raises:
        RunError: if they cannot be written.
    """
    log.info("what is trained:\n%s", format_table(table))
    log.info("%d images, %d steps of %d images, learning rate %.3g", images, schedule.steps,
             schedule.images_per_step, lr)  # fmt: skip
    folder.write_config(options.to_config())
    folder.update_run_json(
        command=command,
        bands=list(spec.bands),
        groups=None if spec.groups is None else [list(group) for group in spec.groups],
        normalization=dict(spec.normalization),
        parameters=table_to_json(table),
        schedule=vars(schedule),
        **more,
    )


def data_record(datamodule: TilesDataModule) -> dict[str, Any]:
    """What must be the same when a run is resumed: the training rows in their order, and the normalization.

    Returns:
        Plain types: ``images``, ``rows`` (a digest) and ``normalization``.
    """
    source = datamodule.training_source
    rows = hashlib.sha256()
    for name in ("labels", "location_ids", "image_ids"):
        rows.update(np.ascontiguousarray(getattr(source, name, [])).tobytes())
    return {
        "images": len(source),
        "rows": rows.hexdigest(),
        "normalization": datamodule.normalization.to_dict(),
    }


def refuse_other_data(before: dict[str, Any] | None, now: dict[str, Any]) -> None:
    """Refuse to go on with a run on other data than it was started with: order and learning rate would shift.

    Raises:
        DataError: if the rows or the normalization differ.
    """
    if before is None or before == now:
        return
    if (before["images"], before["rows"]) != (now["images"], now["rows"]):
        count = f"{before['images']} images then, {now['images']} now"
        what = f"the training data have changed since this run was started: {count}"
    else:
        what = "the statistics of the training tiles have changed since this run was started"
    raise DataError(what, "Restore the data, or start a new run from this one's weights: --init RUN --output NEW.")
