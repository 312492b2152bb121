"""``benchmarks/downstream_sample.py`` at a tiny size, and its report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from geoexplora.datasets import sample
from geoexplora.datasets.sample_dataset import SampleTiles

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import downstream_sample

    words = ["--small", "--work", str(tmp_path / "work"), "--output", str(tmp_path / "found")]
    downstream_sample.main(words)
    first = (tmp_path / "found.json").read_text(encoding="utf-8")
    record = json.loads(first)
    assert record["commit"] and record["command"] and record["machine"]
    assert set(record["results"]) == {
        "floor probe/0", "floor classes/0", "floor pixels/3/0", "probe/explora/0",
        "classification/explora/linear/0/0/0.04", "segmentation/explora/lora/3/0/0.004",
    }  # fmt: skip
    known = int((sample.class_mask()[downstream_sample.block(3)] != sample.IGNORE).sum())
    assert np.sum(record["results"]["segmentation/explora/lora/3/0/0.004"]["confusion"]) == known
    for ending in (".md", ".png", "_land_use.png"):
        assert (tmp_path / f"found{ending}").stat().st_size > 100

    def forbidden(*_: Any) -> Any:
        raise AssertionError("done twice")

    for name in ("finetune", "probe"):
        monkeypatch.setattr(downstream_sample, name, forbidden)
    downstream_sample.main(words)
    assert json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))["results"] == record["results"]
    with pytest.raises(SystemExit, match="another plan"):
        downstream_sample.main(words[1:])


def test_blocks_are_those_of_the_tiles() -> None:
    import downstream_sample_report

    for number in range(8):
        rows, columns = downstream_sample_report.block(number)
        tiles = SampleTiles("none", (number,), tile_size=rows.stop - rows.start)
        assert len(tiles) == 1
        expected = sample.read_scene().image[:, rows, columns]
        np.testing.assert_array_equal(tiles.read(0).image, expected)


def test_scores() -> None:
    import downstream_sample

    found = downstream_sample.scores(np.array([[6, 2, 0], [0, 2, 0], [0, 0, 0]]))
    assert found["accuracy"] == 0.8
    assert found["balanced"] == pytest.approx((6 / 8 + 1) / 2)  # a class without samples does not count
    assert found["miou"] == pytest.approx((6 / 8 + 2 / 4) / 2)


def test_the_rate_is_that_of_the_best_validation_of_the_source() -> None:
    from downstream_sample_report import Findings

    def result(validated: float) -> dict[str, float]:
        return {"validated": validated, "balanced": 1 - validated}

    results = {
        "classification/source/lora/0/5/0.1": result(0.6),
        "classification/source/lora/0/5/0.01": result(0.7),
        "classification/explora/lora/0/5/0.1": result(0.9),
        "classification/explora/lora/0/5/0.01": result(0.8),
        "classification/explora/lora/0/6/0.01": result(0.4),
    }
    plan = {"seeds": [5, 6, 7], "rates": {"classification lora": [0.1, 0.01]}}
    findings = Findings({"results": results, "plan": plan})
    assert findings.rate("classification", "lora", 0) == 0.01
    assert [one["validated"] for one in findings.finetuned("classification", "explora", "lora")] == [0.8, 0.4]


def test_tables_keep_a_reading(tmp_path: Path) -> None:
    from downstream_sample_report import write_tables

    classes = {key: {"balanced": value, "accuracy": 0.5} for key, value in zip("ab", (0.5, 0.7), strict=True)}
    floor = {"forest": classes["a"], "forest, balanced": classes["a"], "logistic": classes["a"]}
    other = floor | {"forest": classes["b"]}
    record = {
        "plan": {
            "seeds": [0, 1, 2], "starts": ["random"], "methods": ["full"], "steps": 3, "batch": 4, "tile": 32,
            "tile_batch": 2, "tile_steps": 5, "rates": {"classification full": [0.1]}, "segmentation": [],
        },
        "results": {"floor classes/0": floor, "floor classes/2": other},
    }  # fmt: skip
    file = tmp_path / "found.md"
    write_tables(record, file)
    assert "| random forest of band statistics |  | 60.0 ± 10.0 | 50.0 ± 0.0 |  | 2 |" in file.read_text(
        encoding="utf-8"
    )
    file.write_text(file.read_text(encoding="utf-8") + "## Reading\n\nIt is so.\n", encoding="utf-8")
    write_tables(record, file)
    assert file.read_text(encoding="utf-8").endswith("## Reading\n\nIt is so.\n")
