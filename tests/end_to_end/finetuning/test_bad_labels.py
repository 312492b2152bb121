"""Labels that ``geoexplora finetune`` cannot learn from or be judged by: one clear message, early."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from geoexplora.datamodules.sampling import StepBatchSampler
from geoexplora.runs.metrics import read_metrics
from geoexplora.tasks import labelled_data

from ...datasets.torchgeo_trees import write_loveda
from ..conftest import run_command
from .helpers import COUNTS, Kind, finetune, make_up, write_made_up


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the first and the last image of a split are looked at beforehand."""
    monkeypatch.setattr(labelled_data, "FEW", 2)


Refused = Callable[..., str]


def changed(kind: Kind, change: Callable[[NDArray[Any]], NDArray[Any] | None], split: str = "train") -> Any:
    """The made-up targets of a split, changed in place or anew."""
    target = make_up(kind, COUNTS[split])[1]
    new = change(target)
    return {split: target if new is None else new}


def put(at: Any, value: int) -> Callable[[NDArray[Any]], None]:
    def change(target: NDArray[Any]) -> None:
        target[at] = value

    return change


@pytest.mark.parametrize(("split", "value"), [("train", 3), ("train", -2), ("val", 7), ("test", 5)])
def test_a_label_outside_the_classes(refused: Refused, tmp_path: Path, split: str, value: int) -> None:
    root = write_made_up(tmp_path / "data", "class", targets=changed("class", put(5, value), split))
    refused(root=root, contains=[f"{split}_5.tif has the label {value}", "none of the 3 classes 0 to 2"])


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_mask_value_outside_the_classes(refused: Refused, tmp_path: Path, split: str) -> None:
    root = write_made_up(tmp_path / "data", "mask", targets=changed("mask", put((4, 8, 8), 9), split))
    words = ("--task", "segmentation", "--head", "linear", "--crop-scale", "1,1")
    refused(*words, root=root, contains=[f"{split}_4.tif has the value 9 in its mask", "--ignore-index"])
    got = finetune("made-up", root, tmp_path / "ignored", "--init", tmp_path.parent, *words)
    assert got.status == 2, "no encoder there"


def test_a_vector_of_labels_that_are_no_labels(refused: Refused, tmp_path: Path) -> None:
    root = write_made_up(tmp_path / "data", "multilabel", targets=changed("multilabel", put((2, 1), 4)))
    contains = ["train_2.tif has the value 4 in its vector of labels, which are 0 or 1"]
    refused("--task", "multilabel", root=root, contains=contains)


def test_a_value_that_is_none(refused: Refused, tmp_path: Path) -> None:
    root = write_made_up(tmp_path / "data", "value", targets=changed("value", lambda values: put(3, 0)(values)))
    targets = make_up("value", COUNTS["train"])[1]
    targets[3] = np.nan
    root = write_made_up(tmp_path / "data", "value", targets={"train": targets})
    refused("--task", "regression", root=root, contains=["train_3.tif has the value nan"])
    same = write_made_up(tmp_path / "same", "value", targets={"train": np.full(12, 7, np.float32)})
    refused("--task", "regression", root=same, contains=["all training images have the same value"])


def test_masks_of_another_size(refused: Refused, tmp_path: Path) -> None:
    root = write_loveda(tmp_path / "loveda")
    mask = next(iter(sorted(root.rglob("Train/*/masks_png/0.png"))))
    Image.fromarray(np.ones((12, 20), np.uint8)).save(mask)
    words = ("--task", "segmentation", "--method", "full", "--model", "vit_pico", "--image-size", "16",
             "--patch-size", "8", "--head", "linear")  # fmt: skip
    contains = ["a mask of 12 x 20 pixels, but an image of 24 x 24", "0.png"]
    refused(*words, root=root, dataset="loveda", contains=contains, begun=True)


def test_masks_of_nothing_but_the_ignored_value(refused: Refused, tmp_path: Path, explora_run: Path) -> None:
    words = ("--task", "segmentation", "--head", "linear", "--ignore-index", "255")
    nothing = {split: np.full((count, 16, 16), 255) for split, count in COUNTS.items()}
    root = write_made_up(tmp_path / "data", "mask", targets=nothing)
    refused(*words, root=root, contains=["all training pixels are of no class, only of the ignored value"])
    refused(*words, "--class-weights", "balanced", root=root, contains=["are of no class, only of the ignored value"])

    some = write_made_up(tmp_path / "some", "mask", targets={"train": np.concatenate([nothing["train"][:11],
                         make_up("mask", 1)[1]])})  # fmt: skip
    got = finetune("made-up", some, tmp_path / "run", "--init", explora_run, *words)
    assert got.status == 0, f"one labelled mask is enough: {got.err}"


def test_a_validation_split_of_nothing_but_the_ignored_value(refused: Refused, tmp_path: Path) -> None:
    """Nothing could be chosen by it."""
    words = ("--task", "segmentation", "--head", "linear", "--ignore-index", "255")
    root = write_made_up(tmp_path / "data", "mask", targets={"val": np.full((6, 16, 16), 255)})
    refused(*words, root=root, contains=["all validation pixels are of no class", "--ignore-index"])


def test_a_score_that_is_none(refused: Refused, tmp_path: Path, few: None) -> None:
    """Not the first masks tell, but the first validation."""
    words = ("--task", "segmentation", "--head", "linear", "--ignore-index", "255", "--max-steps", "9")
    root = write_made_up(tmp_path / "data", "mask", targets={"val": np.full((6, 16, 16), 255)})
    contains = ["val_AverageJaccardIndex is nan at the validation of step 2", "another --monitor"]
    refused(*words, root=root, contains=contains, begun=True)
    contains = ["val_loss is nan at the validation of step 2", "another --monitor"]
    refused(*words, "--monitor", "val_loss", root=root, contains=contains, begun=True)


def test_training_masks_whose_labels_a_sample_does_not_tell(explora_run: Path, tmp_path: Path, few: None) -> None:
    """Only after an epoch, of three steps, it is known that there are none; not after all of the training."""
    words = ("--task", "segmentation", "--head", "linear", "--ignore-index", "255", "--max-steps", "9", "--eval-every",
             "1", "--checkpoint-every", "9")  # fmt: skip
    root = write_made_up(tmp_path / "data", "mask", targets={"train": np.full((12, 16, 16), 255)})
    got = finetune("made-up", root, tmp_path / "run", "--init", explora_run, *words)
    assert got.status == 2, got.err
    assert "Traceback" not in got.err
    assert "warning: all training pixels of the 2 images looked at are of no class, only of the ignored" in got.err
    assert "validation at step 2" in got.err
    assert "validation at step 3" not in got.err
    assert "the training masks hold nothing but the ignored value 255" in got.err
    assert "--ignore-index" in got.err


def test_less_than_a_pass_over_the_training_masks(explora_run: Path, tmp_path: Path, few: None) -> None:
    """What two of three steps have not met may be in the third; and a longer run goes on from what was met."""
    words = ("--task", "segmentation", "--head", "linear", "--ignore-index", "255", "--max-steps", "2")
    run = tmp_path / "run"
    root = write_made_up(tmp_path / "data", "mask", targets={"train": np.full((12, 16, 16), 255)})
    got = finetune("made-up", root, run, "--init", explora_run, *words)
    assert got.status == 0, got.err
    assert torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 2
    got = run_command("finetune", "--resume", run, "--max-steps", "6")
    assert got.status == 2, got.err
    assert "the training masks hold nothing but the ignored value 255" in got.err
    assert [row["step"] for row in read_metrics(run / "metrics.csv")] == [1, 2], "at the third step, the end of a pass"


def test_a_longer_run_whose_added_steps_meet_no_label(explora_run: Path, tmp_path: Path, few: None) -> None:
    """Those before did."""
    words = ("--task", "segmentation", "--head", "linear", "--ignore-index", "255", "--max-steps", "2")
    run, masks = tmp_path / "run", np.full((12, 16, 16), 255)
    order = [index for keys in StepBatchSampler(12, 4, 3, seed=0) for _, index in keys]
    masks[order[:8]] = make_up("mask", 8)[1]
    root = write_made_up(tmp_path / "data", "mask", targets={"train": masks})
    assert finetune("made-up", root, run, "--init", explora_run, *words).status == 0
    got = run_command("finetune", "--resume", run, "--max-steps", "3")
    assert got.status == 0, got.err
    losses = [row["loss"] for row in read_metrics(run / "metrics.csv")]
    assert [loss > 0 for loss in losses] == [True, True, False]


def test_masks_of_a_dataset_that_does_not_tell_its_classes(refused: Refused, tmp_path: Path, few: None) -> None:
    words = ("--task", "segmentation", "--head", "linear", "--num-classes", "3", "--crop-scale", "1,1")
    for at, begun in ((0, False), (4, True)):  # the second is met in training
        root = write_made_up(tmp_path / f"data{at}", "mask", targets=changed("mask", put((at, 8, 8), 7)))
        facts = json.loads((root / "facts.json").read_text())
        (root / "facts.json").write_text(json.dumps(facts | {"classes": []}))
        contains = [f"train_{at}.tif has the value 7 in its mask, which is none of the 3 classes", "--ignore-index"]
        refused(*words, root=root, contains=contains, begun=begun)


def test_a_test_split_that_is_not_as_it_should_be(
    refused: Refused, tmp_path: Path, classes: Path, explora_run: Path, own_tree: Path
) -> None:
    """It is opened last, but looked at first."""
    root = shutil.copytree(classes, tmp_path / "data")
    (root / "test.npz").unlink()
    refused(root=root, contains=["test.npz"])
    next(own_tree.glob("fmow-sentinel/test_gt/*/*/*.tif")).unlink()
    contains = ["tiles that", "test_gt.csv names are missing", "Unpack the missing part"]
    refused(root=own_tree, dataset="fmow-sentinel", contains=contains)
    shutil.rmtree(own_tree / "fmow-sentinel/test_gt")
    got = finetune("fmow-sentinel", own_tree, tmp_path / "run", "--init", explora_run, "--max-steps", "1")
    assert got.status == 0, got.err
    assert "test_gt.csv names is there" in got.err
    assert "warning" in got.err
    assert json.loads((tmp_path / "run/run.json").read_text())["best"]["split"] == "val"


def test_a_class_that_no_training_image_has(tmp_path: Path, explora_run: Path, classes: Path) -> None:
    """It is named; and training goes on."""
    from torchgeo.datasets import MadeUp  # type: ignore[attr-defined]

    root = write_made_up(tmp_path / "data", "class", targets=changed("class", lambda labels: labels % 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MadeUp, "targets", property(lambda self: self.target.tolist()), raising=False)
        got = finetune("made-up", root, tmp_path / "run", "--init", explora_run, "--max-steps", "1")
        assert got.status == 0, got.err
        assert "warning: no training images of town" in got.err
        got = finetune("made-up", classes, tmp_path / "other", "--init", explora_run, "--max-steps", "1")
        assert "no training images" not in got.err


@pytest.mark.parametrize("weights", [(), ("--class-weights", "balanced")])
def test_a_class_that_no_training_image_has_where_labels_are_not_listed(
    tmp_path: Path, explora_run: Path, weights: tuple[str, ...]
) -> None:
    root = write_made_up(tmp_path / "data", "class", targets=changed("class", lambda labels: labels % 2))
    got = finetune("made-up", root, tmp_path / "run", "--init", explora_run, "--max-steps", "1", *weights)
    assert got.status == 0, got.err
    assert "town" in got.err


@pytest.mark.parametrize("kind", ["class", "mask"])
def test_training_data_of_one_class(refused: Refused, tmp_path: Path, kind: Kind) -> None:
    root = write_made_up(tmp_path / "data", kind, targets=changed(kind, np.zeros_like))
    words = ("--task", "segmentation", "--head", "linear") if kind == "mask" else ()
    refused(*words, "--class-weights", "balanced", root=root, contains=["are of one class, field"])
    refused(*words, root=root, contains=["are of one class, field"])


def test_validation_data_of_one_class(tmp_path: Path, explora_run: Path) -> None:
    """Accuracy there says nothing: the user is told."""
    root = write_made_up(tmp_path / "data", "class", targets=changed("class", np.ones_like, "val"))
    got = finetune("made-up", root, tmp_path / "run", "--init", explora_run, "--max-steps", "1")
    assert got.status == 0, got.err
    assert "warning: all validation images are of one class, lake: their scores say little" in got.err
