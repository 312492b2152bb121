"""What the pictures of a fine-tuned model are told to show."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from geoexplora.runs.folder import RunFolder
from geoexplora.tasks.finetune import pictures
from geoexplora.tasks.finetune.evaluation import Evaluation


@pytest.mark.parametrize(
    ("key", "confusion", "title", "counted"),
    [
        ("label", [[3, 1], [0, 4]], "test split: accuracy 0.8750", "samples"),
        ("mask", [[3, 1], [0, 4]], "test split: accuracy 0.8750", "pixels"),
        ("mask", [[0, 0], [0, 0]], "test split", "pixels"),
    ],
)
def test_the_confusion_matrix_tells_accuracy_and_what_it_counts(
    monkeypatch: pytest.MonkeyPatch, key: str, confusion: list[list[int]], title: str, counted: str
) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(pictures, "plot_confusion", lambda *words, **more: drawn.append((words[-1], more)))
    for name in ("_draw_classes", "_draw_masks"):
        monkeypatch.setattr(pictures, name, lambda *words: None)
    task: Any = SimpleNamespace(target_key=key, hparams={"task": "multiclass", "labels": ["farm", "forest"]})
    found = Evaluation({}, np.arange(8), np.empty(0), np.empty(0), np.array(confusion))
    datamodule: Any = None
    pictures.draw_predictions(RunFolder(Path("run")), task, datamodule, "test", found)
    assert drawn == [(title, {"counted": counted})]
