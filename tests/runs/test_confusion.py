"""The picture of a confusion matrix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from geoexplora.runs.confusion import plot_confusion


@pytest.mark.parametrize("classes", [2, 20])
def test_dark_cells_where_many_are(tmp_path: Path, classes: int) -> None:
    names = [f"class {number}" for number in range(classes)]
    right = np.eye(classes, dtype=np.int64)
    wrong = np.roll(right, 1, axis=1)
    dark = []
    for number, counts in enumerate((10 * right, 5 * right + 5 * wrong)):
        plot_confusion(tmp_path / f"{number}.png", counts, names, "some title")
        dark.append(float((imread(tmp_path / f"{number}.png")[..., 0] < 0.05).mean()))
    assert dark[0] > 1.3 * dark[1], "all right is darker than half right"


def test_the_same_counts_give_the_same_bytes(tmp_path: Path) -> None:
    counts = [[3, 1, 0], [0, 0, 0], [2, 2, 0]]
    for name in ("a.png", "b.png"):
        plot_confusion(tmp_path / name, counts, ["farm", "forest", "water"], "")
    plot_confusion(tmp_path / "c.png", [[3, 1, 0], [0, 4, 0], [2, 2, 0]], ["farm", "forest", "water"], "")
    first, second, third = ((tmp_path / name).read_bytes() for name in ("a.png", "b.png", "c.png"))
    assert first == second != third


@pytest.mark.parametrize(("words", "shown"), [({}, "samples"), ({"counted": "pixels"}, "pixels")])
def test_the_axis_says_what_is_counted(monkeypatch: pytest.MonkeyPatch, words: dict[str, str], shown: str) -> None:
    figures: list[Any] = []
    monkeypatch.setattr("geoexplora.runs.confusion.save_figure", lambda figure, target: figures.append(figure))
    plot_confusion(Path("a.png"), [[3, 1], [0, 2]], ["farm", "forest"], "", **words)
    assert figures[0].axes[0].get_ylabel() == f"true class ({shown})"


@pytest.mark.parametrize("counts", [[[1, 2]], [[1, -1], [0, 1]], [[1, np.nan], [0, 1]]])
def test_what_is_no_confusion_matrix(tmp_path: Path, counts: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="a confusion matrix"):
        plot_confusion(tmp_path / "a.png", counts, ["farm", "forest"], "")
