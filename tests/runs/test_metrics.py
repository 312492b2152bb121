from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from geoexplora.errors import RunError
from geoexplora.runs.metrics import TIMING_COLUMNS, Metrics, read_metrics


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.csv"


def test_rows_come_back_exactly(path: Path) -> None:
    metrics = Metrics(path)
    rows = [{"step": 1, "loss": 1 / 3, "lr": 1e-17}, {"step": 2, "loss": math.inf, "lr": 0.1 + 0.2}]
    for row in rows:
        metrics.append(row)
    assert read_metrics(path) == rows
    assert path.read_text().startswith("step,loss,lr\n1,0.3333333333333333,1e-17\n")


def test_header_grows_with_timing_last(path: Path) -> None:
    metrics = Metrics(path)
    metrics.append({"step": 0, "images_per_second": 1.5, "loss": 1.0})
    metrics.append({"step": 1, "loss": 0.5})
    metrics.append({"step": 2, "knn": 0.9, "images_per_second": 3.0})
    assert path.read_text().splitlines() == [
        "step,loss,knn,images_per_second",
        "0,1.0,,1.5",
        "1,0.5,,",
        "2,,0.9,3.0",
    ]


def test_same_step_joins_the_row(path: Path) -> None:
    metrics = Metrics(path)
    metrics.append({"step": 0, "knn": 0.5})
    metrics.append({"step": 0, "loss": 1.0})
    metrics.append({"step": 1, "loss": 0.9})
    metrics.append({"step": 1, "knn": 0.6})
    assert read_metrics(path) == [{"step": 0, "knn": 0.5, "loss": 1.0}, {"step": 1, "knn": 0.6, "loss": 0.9}]


def test_numbers_of_other_libraries(path: Path) -> None:
    Metrics(path).append({"step": np.int64(3), "loss": torch.tensor(0.5), "std": np.float64(0.25), "split": "val"})
    assert read_metrics(path) == [{"step": 3, "loss": 0.5, "std": 0.25, "split": "val"}]


def test_order_of_steps(path: Path) -> None:
    metrics = Metrics(path)
    metrics.append({"step": 5})
    with pytest.raises(ValueError, match="truncate_after"):
        metrics.append({"step": 4})
    with pytest.raises(ValueError, match="needs a step"):
        metrics.append({"loss": 4})


def test_nothing_is_written_before_the_first_row(path: Path) -> None:
    metrics = Metrics(path)
    metrics.sync()
    metrics.truncate_after(3)
    assert metrics.last_step is None
    assert not path.exists()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(
    st.lists(
        st.dictionaries(st.sampled_from(["loss", "knn", "rank", "seconds"]), st.floats(allow_nan=False)),
        min_size=1,
        max_size=8,
    ),
    st.data(),
)
def test_interrupted_equals_uninterrupted(tmp_path: Path, rows: list[dict[str, float]], data: st.DataObject) -> None:
    whole, cut = tmp_path / "whole.csv", tmp_path / "cut.csv"
    for path in (whole, cut):
        path.unlink(missing_ok=True)
    metrics = Metrics(whole)
    for step, row in enumerate(rows):
        metrics.append({"step": step, **row})
    stop = data.draw(st.integers(0, len(rows)))
    resume = data.draw(st.integers(-1, stop - 1))
    metrics = Metrics(cut)
    for step, row in enumerate(rows[:stop]):
        metrics.append({"step": step, **row})
    metrics = Metrics(cut)
    metrics.truncate_after(resume)
    assert metrics.last_step == (resume if resume >= 0 else None)
    for step, row in enumerate(rows):
        if step > resume:
            metrics.append({"step": step, **row})
    assert cut.read_text() == whole.read_text()


def test_torn_last_line_is_dropped(path: Path) -> None:
    metrics = Metrics(path)
    for step in range(3):
        metrics.append({"step": step, "loss": 0.5})
    path.write_text(path.read_text()[:-4])
    assert len(read_metrics(path)) == 2
    assert Metrics(path).last_step == 1
    assert path.read_text() == "step,loss\n0,0.5\n1,0.5\n"


@pytest.mark.parametrize("text", ["loss\n1\n", "step,loss\nx,1\n", "step,loss\n,1\n", "\xff\n"])
def test_not_metrics(path: Path, text: str) -> None:
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(RunError, match=r"metrics\.csv"):
        read_metrics(path)


def test_missing(path: Path) -> None:
    with pytest.raises(RunError, match="cannot read"):
        read_metrics(path)


def test_timing_columns_are_documented() -> None:
    assert TIMING_COLUMNS == ("images_per_second",)  # nothing that no one writes
