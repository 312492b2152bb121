"""The files of a fine-tuned model: written and read back, for each task."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from geoexplora.errors import ConfigError, WeightsError
from geoexplora.runs.folder import RunFolder
from geoexplora.tasks import ExPLoRAClassification, ExPLoRARegression, ExPLoRASegmentation
from geoexplora.tasks.finetune.exports import export_model, load_finetuned
from geoexplora.weights.load import build_encoder
from geoexplora.weights.spec import EncoderSpec

NORMALIZATION = {"method": "standardize", "bands": ["R", "G", "B"], "mean": [1.0] * 3, "std": [2.0] * 3}
LABELS = ["a", "b", "c"]

CASES: list[tuple[str, Any, dict[str, Any]]] = [
    ("classification", ExPLoRAClassification, {"num_classes": 3, "labels": LABELS, "pool": "cls+mean", "mixup": 0.5,
                                               "class_weights": [1.0, 2.0, 3.0], "label_smoothing": 0.1}),
    ("multilabel", ExPLoRAClassification, {"task": "multilabel", "num_labels": 3, "labels": LABELS}),
    ("segmentation", ExPLoRASegmentation, {"num_classes": 3, "labels": LABELS, "head": "upernet", "width": 8,
                                           "levels": [3, 8], "group_features": "concat", "ignore_index": 255}),
    ("regression", ExPLoRARegression, {"target_mean": 7.0, "target_std": 3.0}),
]  # fmt: skip

ROUND_TRIPS = [
    pytest.param(method, *case, id=f"{case[0]}-{method}")
    for case in CASES
    for method in ("linear", "lora", "full", "adalora", "dora")
    if method in {"linear", "lora", "full"} or case[0] in {"classification", "regression"}
]
"""Merging does not depend on the task: two are enough for the rarer methods."""


def trained(task_class: Any, method: Any, groups: Any, **more: Any) -> Any:
    torch.manual_seed(0)
    spec = EncoderSpec.of(
        "vit_pico", image_size=16, patch_size=8, sensor="rgb", bands=("R", "G", "B"), normalization=NORMALIZATION,
        groups=groups,
    )  # fmt: skip
    task = task_class(
        encoder=build_encoder(spec), spec=spec.to_metadata(), method=method, rank=2, total_steps=9, **more
    )
    with torch.no_grad():
        for parameter in task.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return task.eval()


@pytest.mark.parametrize("groups", [None, (("R", "B"), ("G",))], ids=["plain", "groups"])
@pytest.mark.parametrize(("method", "name", "task_class", "more"), ROUND_TRIPS)
def test_round_trip(tmp_path: Path, name: str, task_class: Any, more: Any, method: Any, groups: Any) -> None:
    task, folder = trained(task_class, method, groups, **more), RunFolder(tmp_path / "run")
    folder.path.mkdir()
    before = {key: value.clone() for key, value in task.state_dict().items()}
    export_model(folder, task, name, 5)
    assert all(value.equal(before[key]) for key, value in task.state_dict().items()), "training may go on"
    read = load_finetuned(folder.path)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        output = task.model(images)
        torch.testing.assert_close(read.model(images), output, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(read.predicted(read.model(images)), task.predicted(output), rtol=1e-4, atol=1e-4)
    assert not read.training
    assert read.spec.normalization == NORMALIZATION
    assert type(read) is task_class
    assert read.hparams.get("labels") == more.get("labels")
    with safe_open(folder.task_head_file, "pt") as file:
        assert json.loads(file.metadata()["settings"])["name"] == name
    if method in {"linear", "full"}:
        state = load_file(folder.encoder_file)
        assert all(value.equal(state[key]) for key, value in task.encoder.state_dict().items() if key in state)


@pytest.mark.parametrize("groups", [None, (("R", "B"), ("G",))], ids=["plain", "groups"])
@pytest.mark.parametrize(("name", "task_class", "more"), CASES, ids=[case[0] for case in CASES])
def test_predict_normalizes_and_evaluates(name: str, task_class: Any, more: Any, groups: Any) -> None:
    task = trained(task_class, "full", groups, drop_path=0.5, **more)
    images = torch.randint(0, 9, (4, 3, 16, 16), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    expected, raw = (task.predicted(task.model(x)).detach() for x in ((images.float() - 1) / 2, images.float()))
    task.train()
    told = task.predict(images)
    torch.testing.assert_close(told, expected)
    assert not torch.allclose(told, raw, atol=1e-3)
    assert not told.requires_grad
    assert task.training
    assert task.model.encoder.blocks[-1].training


def test_predict_refuses_other_images() -> None:
    task = trained(ExPLoRAClassification, "linear", None, num_classes=3)
    with pytest.raises(ConfigError, match=r"3 bands\nIts channels must be R, G, B, in this order"):
        task.predict(torch.rand(2, 13, 16, 16))
    with pytest.raises(ConfigError, match="32 x 16 px do not fit a model for 16 x 16 px"):
        task.predict(torch.rand(2, 3, 32, 16))
    with pytest.raises(ConfigError, match="no batch"):
        task.predict(torch.rand(3, 16, 16))
    task.spec = replace(task.spec, normalization={})
    with pytest.raises(ConfigError, match="do not tell how images are normalized"):
        task.predict(torch.rand(2, 3, 16, 16))


def test_predict_segments_what_the_model_can_fill_up() -> None:
    task = trained(ExPLoRASegmentation, "linear", None, num_classes=3, head="linear")
    assert task.predict(torch.rand(2, 3, 15, 13)).shape == (2, 3, 15, 13)
    with pytest.raises(ConfigError, match="32 x 32 px do not fit an encoder for 16 x 16 px"):
        task.predict(torch.rand(2, 3, 32, 32))


def test_a_weight_that_is_not_finite(tmp_path: Path) -> None:
    task, folder = trained(ExPLoRAClassification, "full", None, num_classes=3), RunFolder(tmp_path)
    with torch.no_grad():
        task.encoder.cls_token.fill_(float("nan"))
    with pytest.raises(WeightsError):
        export_model(folder, task, "classification", 1)
    assert not folder.encoder_file.exists()


def test_a_head_of_another_encoder(tmp_path: Path) -> None:
    one, other = RunFolder(tmp_path / "one"), RunFolder(tmp_path / "other")
    for folder, pool in ((one, "mean"), (other, "cls+mean")):
        folder.path.mkdir()
        export_model(
            folder, trained(ExPLoRAClassification, "linear", None, num_classes=3, pool=pool), "classification", 1
        )
    state = load_file(other.task_head_file)
    assert state["weight"].shape == (3, 256)
    one.task_head_file.unlink()
    with pytest.raises(WeightsError, match="no whole run of geoexplora finetune"):
        load_finetuned(one.path)
