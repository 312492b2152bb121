"""evaluate(): metrics and confusion against scikit-learn, whatever the batches."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, mean_squared_error, recall_score
from torch import Tensor

from geoexplora.errors import DataError
from geoexplora.tasks import ExPLoRAClassification, ExPLoRARegression, ExPLoRASegmentation
from geoexplora.tasks.finetune.evaluation import evaluate
from geoexplora.weights.load import build_encoder
from geoexplora.weights.spec import EncoderSpec

N, K, S = 23, 3, 16
NORMALIZATION = {"method": "standardize", "bands": ["R", "G", "B"], "mean": [0.0] * 3, "std": [1.0] * 3}


def task_of(task_class: Any, **more: Any) -> Any:
    torch.manual_seed(0)
    spec = EncoderSpec.of(
        "vit_pico", image_size=S, patch_size=8, sensor="rgb", bands=("R", "G", "B"), normalization=NORMALIZATION
    )
    task = task_class(encoder=build_encoder(spec), spec=spec.to_metadata(), drop_path=0.5, **more)
    with torch.no_grad():
        for parameter in task.model.head.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    return task


IMAGES = torch.randn(N, 3, S, S, generator=torch.Generator().manual_seed(1)) * 2


def batches(key: str, target: Tensor, size: int, unreadable: Tensor | None = None) -> Iterator[dict[str, Tensor]]:
    bad = torch.full((N,), -1) if unreadable is None else unreadable
    for start in range(0, N, size):
        part = slice(start, start + size)
        yield {"image": IMAGES[part], key: target[part], "index": torch.arange(N)[part], "unreadable": bad[part]}


CLASSES = torch.randint(0, K, (N,), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("size", [1, 4, 23])
def test_classes(size: int) -> None:
    task = task_of(ExPLoRAClassification, num_classes=K).train()
    found = evaluate(task, batches("label", CLASSES, size))
    assert task.training, "its mode is put back"
    with torch.no_grad():
        output = task.eval().model(IMAGES)
    told, truth = output.argmax(1).numpy(), CLASSES.numpy()
    np.testing.assert_allclose(found.predicted, output.softmax(1), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(found.truth, truth)
    np.testing.assert_array_equal(found.index, np.arange(N))
    np.testing.assert_array_equal(found.confusion, confusion_matrix(truth, told, labels=range(K)))
    assert found.metrics["OverallAccuracy"] == pytest.approx(accuracy_score(truth, told))
    assert found.metrics["AverageF1Score"] == pytest.approx(f1_score(truth, told, average="macro"))
    assert found.metrics["AverageAccuracy"] == pytest.approx(recall_score(truth, told, average="macro"))
    assert found.metrics["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(output, CLASSES)), rel=1e-5)
    assert not [name for name in found.overall() if "Classwise" in name]
    assert {"OverallAccuracy", "loss"} <= found.overall().keys()


def test_what_could_not_be_read_does_not_count() -> None:
    bad = torch.full((N,), -1)
    bad[[0, 5, 22]] = torch.tensor([0, 5, 22])
    left = bad < 0
    task = task_of(ExPLoRAClassification, num_classes=K)
    found = evaluate(task, batches("label", CLASSES, 4, bad))
    assert found.index.tolist() == torch.arange(N)[left].tolist()
    assert found.confusion is not None
    assert found.confusion.sum() == N - 3
    with torch.no_grad():
        right = (task.eval().model(IMAGES[left]).argmax(1) == CLASSES[left]).float().mean()
    assert found.metrics["OverallAccuracy"] == pytest.approx(float(right))


def test_nothing_could_be_read() -> None:
    task = task_of(ExPLoRAClassification, num_classes=K)
    try:
        found = evaluate(task, batches("label", CLASSES, 4, torch.arange(N)))
    except DataError:
        return  # as the docstring says
    assert math.isnan(found.metrics["loss"])
    assert len(found.index) == 0
    assert found.confusion is None


def test_labels() -> None:
    target = torch.randint(0, 2, (N, K), generator=torch.Generator().manual_seed(4))
    task = task_of(ExPLoRAClassification, task="multilabel", num_labels=K)
    found = evaluate(task, batches("label", target, 5))
    with torch.no_grad():
        output = task.eval().model(IMAGES)
    told = (output > 0).long()
    assert found.confusion is None
    assert found.metrics["OverallF1Score"] == pytest.approx(f1_score(target, told, average="micro"))
    assert found.metrics["AverageF1Score"] == pytest.approx(f1_score(target, told, average="macro", zero_division=0))
    np.testing.assert_allclose(found.predicted, output.sigmoid(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [2, 23])
def test_masks(size: int) -> None:
    mask = torch.randint(0, K, (N, S, S), generator=torch.Generator().manual_seed(5))
    mask[:, :3] = 255
    mask[7] = 255
    task = task_of(ExPLoRASegmentation, num_classes=K, head="linear", ignore_index=255)
    found = evaluate(task, batches("mask", mask, size))
    with torch.no_grad():
        told = task.eval().model(IMAGES).argmax(1)
    counted = mask != 255
    wanted = confusion_matrix(mask[counted], told[counted], labels=range(K))
    assert found.confusion is not None
    assert abs(found.confusion - wanted).sum() <= 4, "but for near ties"
    assert found.confusion.sum() == counted.sum()
    share = [float((told[i] == mask[i])[counted[i]].float().mean()) for i in range(N)]
    assert math.isnan(found.predicted[7])
    np.testing.assert_allclose(found.predicted, share, atol=0.02)
    diagonal = np.diag(wanted)
    union = wanted.sum(0) + wanted.sum(1) - diagonal
    assert found.metrics["AverageJaccardIndex"] == pytest.approx((diagonal / union).mean(), abs=1e-3)
    assert len(found.truth) == 0


def test_the_loss_of_masks_does_not_depend_on_the_batches() -> None:
    """An image without any label must not lower the mean."""
    mask = torch.randint(0, K, (N, S, S), generator=torch.Generator().manual_seed(5))
    mask[::3] = 255
    task = task_of(ExPLoRASegmentation, num_classes=K, head="linear", ignore_index=255)
    found = [evaluate(task, batches("mask", mask, size)).metrics["loss"] for size in (1, 4, 23)]
    assert found == pytest.approx([found[2]] * 3, rel=1e-4)


def test_values() -> None:
    target = torch.randn(N, generator=torch.Generator().manual_seed(6)) * 3 + 40
    task = task_of(ExPLoRARegression, target_mean=40.0, target_std=3.0)
    found = evaluate(task, batches("label", target, 5))
    with torch.no_grad():
        told = task.eval().model(IMAGES)[:, 0] * 3 + 40
    assert found.metrics["MSE"] == pytest.approx(mean_squared_error(target, told), rel=1e-5)
    np.testing.assert_allclose(found.predicted, told, rtol=1e-5)
    assert found.confusion is None


def test_every_batch_is_checked_first() -> None:
    seen: list[int] = []
    task = task_of(ExPLoRAClassification, num_classes=K)
    evaluate(task, batches("label", CLASSES, 10), check=lambda batch: seen.append(len(batch["image"])))
    assert seen == [10, 10, 3]
