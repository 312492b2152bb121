"""``benchmarks/feature_extraction.py`` and ``training_step.py --task finetune`` at a tiny size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_feature_extraction(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import feature_extraction

    feature_extraction.main(["--small", "--batches", "2", "--output", str(tmp_path / "found.json")])
    record = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert record["commit"] and record["command"] and record["machine"]
    assert len(record["results"]) == 2
    for (result,) in record["results"].values():
        rows = result["rows"]
        assert set(rows) == {"encoder fp32", "copy fp32", "encoder autocast bf16", "copy bf16"}
        assert rows["copy fp32"]["relative_error"] < 1e-6
        assert rows["copy bf16"]["relative_error"] < 2 * rows["encoder autocast bf16"]["relative_error"]
    assert "| copy bf16 |" in capsys.readouterr().out


def test_flops_of_features_are_those_of_the_products(monkeypatch: pytest.MonkeyPatch) -> None:
    import feature_extraction

    geometry = feature_extraction.geometries("vit_base", small=True)["RGB 224 px, patch 16"]
    tokens, width = 197, 64
    products = tokens * width * 12 * width * 2  # qkv, proj, fc1, fc2
    attention = 2 * tokens**2 * width * 2
    embedding = 196 * width * 3 * 16**2 * 2
    assert geometry.flops(3) == 3 * (2 * (products + attention) + embedding)


def test_step_of_fine_tuning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import training_step

    monkeypatch.setattr(training_step, "peak_memory", lambda _, variant, *__: 100.0 if variant.mode == "full" else 50.0)
    words = ["--task", "finetune", "--models", "small", "--batch", "2", "--rounds", "1"]
    training_step.main([*words, "--json", str(tmp_path / "found.json")])
    rows = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))["models"]["small"]["rows"]
    for precision in ("fp32", "bf16"):
        full, lora = rows[f"full {precision}"], rows[f"lora {precision}"]
        assert lora["trained_parameters"] == 2 * 2 * 8 * (64 + 64) + 62 * (64 + 1)
        assert lora["tflop"] < full["tflop"]
        assert lora["held_mib"] < full["held_mib"]
        assert (full["memory_ratio"], lora["memory_ratio"]) == (1.0, 0.5)
        assert full["speed_ratio"] == 1.0
