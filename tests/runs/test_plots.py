"""Curves over the steps of a run."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread

from geoexplora.errors import RunError
from geoexplora.runs import plots
from geoexplora.runs.metrics import Metrics
from geoexplora.runs.plots import plot_health, plot_loss

COLUMNS = (
    "dino_loss", "ibot_loss", "koleo_loss", "teacher_entropy", "teacher_mean_entropy", "teacher_student_kl",
    "feature_std", "feature_rank", "grad_norm", "lr", "weight_decay", "teacher_momentum", "teacher_temperature",
)  # fmt: skip


def write(path: Path, rows: list[dict[str, float]]) -> Path:
    """A metrics.csv, at once: ``Metrics`` syncs every row."""
    columns = list(dict.fromkeys(["step", *(name for row in rows for name in row)]))
    lines = [",".join(str(row.get(name, "")) for name in columns) for row in rows]
    path.write_text("\n".join([",".join(columns), *lines]) + "\n")
    return path


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were drawn; they are saved as well."""
    figures: list[Figure] = []
    save = plots.save_figure

    def keep(figure: Figure, target: Path) -> None:
        figures.append(figure)
        save(figure, target)

    monkeypatch.setattr(plots, "save_figure", keep)
    return figures


def panels(figure: Figure) -> dict[str, Axes]:
    """Axes by title."""
    return {axis.get_title(loc="left"): axis for axis in figure.axes}


def curves(axis: Axes) -> dict[str, tuple[list[float], list[float]]]:
    """Points by label."""
    return {str(x.get_label()): (list(x.get_xdata()), list(x.get_ydata())) for x in axis.get_lines()}


@pytest.mark.parametrize(("rows", "knn"), [(1, False), (10, False), (200, True)])
def test_loss(tmp_path: Path, rows: int, knn: bool) -> None:
    metrics = Metrics(tmp_path / "metrics.csv")
    for step in range(rows):
        metrics.append({"step": step, "loss": math.exp(-step / 9)} | ({"knn_accuracy": 0.5} if knn else {}))
    target = tmp_path / "plots" / "loss.png"
    assert plot_loss(metrics.path, target)
    picture = imread(target)
    assert picture.shape[1] > 600
    assert (picture.shape[0] > 600) == knn
    assert picture[..., :3].std() > 0.01
    assert list(target.parent.iterdir()) == [target]


def test_no_loss_yet(tmp_path: Path) -> None:
    Metrics(tmp_path / "metrics.csv").append({"step": 0, "knn_accuracy": 0.5})
    assert not plot_loss(tmp_path / "metrics.csv", tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()


def test_loss_that_is_not_finite_is_marked_and_left_out_of_the_mean(tmp_path: Path, drawn: list[Figure]) -> None:
    losses = [math.nan if step in {40, 41} else 2.0 for step in range(100)]
    write(tmp_path / "m.csv", [{"step": step, "loss": loss, "knn": math.nan} for step, loss in enumerate(losses)])
    assert plot_loss(tmp_path / "m.csv", tmp_path / "loss.png")
    loss = curves(drawn[0].axes[0])
    assert loss["not finite"][0] == [40, 41]
    assert loss["mean of 5 points"][1] == pytest.approx([2.0] * 94)


@pytest.mark.parametrize("count", [1, 3, 10_000])
def test_health(tmp_path: Path, drawn: list[Figure], count: int) -> None:
    rng = np.random.default_rng(0)
    rows = [{"step": step} | dict.fromkeys(COLUMNS, rng.random()) for step in range(count)]
    target = tmp_path / "plots" / "health.png"
    assert plot_health(write(tmp_path / "m.csv", rows), target)
    assert list(target.parent.iterdir()) == [target]
    assert imread(target).shape[1] > 1000
    shown = {name: points for axis in drawn[0].axes for name, points in curves(axis).items()}
    assert shown.keys() >= set(COLUMNS) | {"first value"}
    assert len(shown["lr"][0]) == count, "schedules are drawn as they are"
    assert (len(shown["grad_norm"][0]) < count) == (count == 10_000), "a running mean is shorter"


@pytest.mark.parametrize("column", COLUMNS)
def test_health_of_a_single_column(tmp_path: Path, drawn: list[Figure], column: str) -> None:
    """Alone in the file, and without a value in some rows."""
    rows = [{"step": 0, column: 0.5}, {"step": 1, "loss": 1.0}, {"step": 2, column: 0.25}]
    assert plot_health(write(tmp_path / "m.csv", rows), tmp_path / "h.png")
    (axis,) = drawn[0].axes
    assert curves(axis)[column] == ([0, 2], [0.5, 0.25])


def test_no_health_yet(tmp_path: Path) -> None:
    for rows in ([], [{"step": 0, "loss": 1.0}]):
        assert not plot_health(write(tmp_path / "m.csv", rows), tmp_path / "h.png")
    assert not (tmp_path / "h.png").exists()


def test_running_mean(tmp_path: Path, drawn: list[Figure]) -> None:
    """Against a loop: each mean stands at the middle of its window."""
    values = np.random.default_rng(1).random(300).tolist()
    rows = [{"step": 7 * index, "dino_loss": value} for index, value in enumerate(values)]
    plot_health(write(tmp_path / "m.csv", rows), tmp_path / "h.png")
    steps, means = curves(drawn[0].axes[0])["dino_loss"]
    window = 10
    assert means == pytest.approx([sum(values[i : i + window]) / window for i in range(len(values) - window + 1)])
    assert steps == [7 * (i + (window - 1) // 2) for i in range(len(values) - window + 1)]


@pytest.mark.parametrize(("norms", "scale"), [([1, 99], "linear"), ([0, 1, 50], "linear"), ([1, 101, 5], "log")])
def test_gradient_norms_over_more_than_two_decades_are_logarithmic(
    tmp_path: Path, drawn: list[Figure], norms: list[float], scale: str
) -> None:
    rows = [{"step": step, "grad_norm": norm} for step, norm in enumerate([*norms, math.inf])]
    plot_health(write(tmp_path / "m.csv", rows), tmp_path / "h.png")
    assert drawn[0].axes[0].get_yscale() == scale


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_marked(tmp_path: Path, drawn: list[Figure], bad: float) -> None:
    """The first value to compare with is the first finite one; nothing but such values still gives a picture."""
    rows = [dict.fromkeys(COLUMNS, bad) | {"step": 0}, {"step": 1, "feature_std": 0.5, "feature_rank": bad}]
    assert plot_health(write(tmp_path / "m.csv", rows), tmp_path / "h.png")
    shown = {title: curves(axis) for title, axis in panels(drawn[0]).items()}
    spread = shown["spread of features (0: collapsed, 1: even)"]
    assert spread["not finite"][0] == [0]
    assert spread["first value"][1] == [0.5, 0.5]
    rank = shown["effective rank of features"]
    assert rank["not finite"][0] == [0, 1]
    assert "first value" not in rank
    assert shown["loss by part"]["not finite"][0] == [0, 0, 0]


def test_a_file_that_is_no_metrics_file(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("a,b\n1,2\n")
    with pytest.raises(RunError, match="has no column step"):
        plot_health(tmp_path / "m.csv", tmp_path / "h.png")
