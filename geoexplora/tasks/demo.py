"""What ``geoexplora demo`` measures: features before and after, beside the floor of plain band statistics.

Shapes: N tiles, F features.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from geoexplora.bands import SENTINEL2
from geoexplora.datamodules.fmow_sentinel import FMoWSentinelDataModule
from geoexplora.datasets.sample import read_scene
from geoexplora.datasets.sample_tree import write_fmow_tree
from geoexplora.runs.pictures import plot_reconstruction
from geoexplora.tasks.classifiers import (
    Floats,
    Folds,
    Labels,
    few_shot,
    knn_classifier,
    leave_locations_out,
    linear_classifier,
    score,
)
from geoexplora.tasks.features import extract_features
from geoexplora.tasks.opening import open_data
from geoexplora.tasks.pretrain.building import build_task
from geoexplora.tasks.pretrain.exports import reconstruct
from geoexplora.tasks.schedule import Schedule
from geoexplora.transforms.normalization import Normalization
from geoexplora.weights.load import load_encoder
from geoexplora.weights.spec import EncoderSpec

log = logging.getLogger(__name__)

SPLITS = ("train", "val", "test_gt")
NEIGHBOURS, SHOTS, DRAWS = 15, 10, 5
TILE = 16
CORNER, SIDE = (400, 200), 12
"""Where the drawn part of the scene begins (row, column), and its side in tiles."""


@dataclass(frozen=True)
class Row:
    """Balanced accuracies of one set of features.

    Attributes:
        name: what the features are.
        knn: of 15 nearest neighbours.
        few: of logistic regression on 10 labels of each class, the mean over 5 draws.
        linear: of logistic regression on all labels.
    """

    name: str
    knn: float
    few: float
    linear: float


def write_trees(folder: Path) -> tuple[Path, Path]:
    """Write the sample as two fMoW-Sentinel trees: every tile of the scene unlabelled, and the labelled tiles.

    Args:
        folder: receives ``unlabelled`` and ``labelled``.

    Returns:
        The two roots.
    """
    roots = folder / "unlabelled", folder / "labelled"
    for root, labelled in zip(roots, (False, True), strict=True):
        write_fmow_tree(root, TILE, labelled)
    return roots


def draw_scene(options: Any, run: Path, target: Path) -> None:
    """Draw a part of the scene, put together from tiles that a run's model reconstructs one by one.

    Args:
        options: settings of the ``geoexplora pretrain`` that made the run.
        run: its folder.
        target: the PNG to write.
    """
    options = replace(options, init=str(run), mode="full")
    data = open_data(options)
    task: Any = build_task(options, data, Schedule(1, 1, options.batch_size, 0), None)
    top, left = CORNER
    bands = list(SENTINEL2.indices(data.bands))
    scene = read_scene().image[bands, top : top + SIDE * TILE, left : left + SIDE * TILE].astype(np.float32)
    picture = torch.from_numpy(scene).unsqueeze(0)
    tiles = picture[0].unflatten(2, (SIDE, TILE)).unflatten(1, (SIDE, TILE)).permute(1, 3, 0, 2, 4).flatten(0, 1)
    masked, rebuilt = reconstruct(task, data.normalization(tiles))

    def whole(parts: Tensor) -> Tensor:
        grid = data.normalization.inverse(parts).unflatten(0, (SIDE, SIDE))
        return grid.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2).unsqueeze(0)

    plot_reconstruction(target, picture, whole(masked), whole(rebuilt), data.bands, data.sensor)


class Comparison:
    """Probes features of the labelled tiles, leaving one area block out in turn.

    Args:
        root: the labelled tree; its ``location_id`` is the area block.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.rows: list[Row] = []

    def data(self, normalization: Normalization | str, **settings: Any) -> FMoWSentinelDataModule:
        """The labelled tiles."""
        return FMoWSentinelDataModule(self.root, batch_size=128, normalization=normalization, **settings)

    def add_statistics(self) -> Row:
        """Probe the mean and standard deviation of each band: the floor that learned features must beat."""
        data = self.data("standardize", image_size=TILE)
        features, labels, blocks = [], [], []
        for split in SPLITS:
            view = data.eval_dataset(split)
            images = torch.stack([view[index]["image"] for index in range(len(view))])
            features.append(torch.cat([images.mean((2, 3)), images.std((2, 3))], dim=1).numpy())
            labels.append(view.labels)
            blocks.append(view.location_ids)
        return self._add("band means and deviations", features, labels, blocks)

    def add_encoder(self, name: str, encoder: Any, spec: EncoderSpec) -> Row:
        """Probe an encoder: per-group means of its tokens."""
        data = self.data(
            Normalization.from_dict(spec.normalization),
            image_size=spec.image_size,
            antialias=spec.antialias,
            bands=spec.bands,
        )
        features, labels, blocks = [], [], []
        for split in SPLITS:
            found = extract_features(encoder, data.eval_dataloader(split))
            features.append(found.features)
            labels.append(found.labels)
            blocks.append(data.eval_dataset(split).location_ids[found.kept])
        return self._add(name, features, labels, blocks)

    def add_start(self, name: str, options: Any) -> Row:
        """Probe the encoder that a pre-training would start from.

        Args:
            name: what it is.
            options: settings of ``geoexplora pretrain``.
        """
        task = build_task(options, open_data(options), Schedule(1, 1, options.batch_size, 0), None)
        return self.add_encoder(name, task.encoder, task.spec)

    def add_run(self, name: str, run: Path) -> Row:
        """Probe the encoder of a run folder."""
        return self.add_encoder(name, *load_encoder(run))

    def _add(self, name: str, parts: list[Floats], labelled: list[Labels], areas: list[Labels]) -> Row:
        features, labels = np.concatenate(parts), np.concatenate(labelled)
        folds: Folds = leave_locations_out(np.concatenate(areas))
        few = [
            score(linear_classifier(seed), features, labels, list(few_shot(folds, labels, SHOTS, seed)))
            for seed in range(DRAWS)
        ]
        row = Row(
            name,
            score(knn_classifier(NEIGHBOURS, len(labels)), features, labels, folds).balanced_accuracy,
            float(np.mean([scores.balanced_accuracy for scores in few])),
            score(linear_classifier(0), features, labels, folds).balanced_accuracy,
        )
        self.rows.append(row)
        log.info("%s: kNN %.3f, %d labels a class %.3f, all labels %.3f", name, row.knn, SHOTS, row.few, row.linear)
        return row

    def table(self) -> str:
        """The rows as aligned text."""
        width = max(len(row.name) for row in self.rows)
        lines = [f"{'':<{width}}  kNN ({NEIGHBOURS})  {SHOTS} labels a class  all labels"]
        lines += [f"{r.name:<{width}}  {r.knn:8.3f}  {r.few:17.3f}  {r.linear:10.3f}" for r in self.rows]
        return "\n".join(lines)
