"""Bad input of ``geoexplora finetune``: one clear message with the remedy, exit status 2, no folder left behind."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file

from geoexplora.weights.load import load_encoder
from geoexplora.weights.write import save_encoder

from ..datasets.torchgeo_trees import write_loveda, write_tropical_cyclone
from .conftest import run_command
from .finetuning_helpers import (
    BANDS,
    COUNTS,
    FINE,
    Kind,
    finetune,
    made_up_datasets,
    make_up,
    write_made_up,
)


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    made_up_datasets(monkeypatch)


Refused = Callable[..., str]


@pytest.fixture
def refused(explora_run: Path, tmp_path: Path) -> Refused:
    """Run finetune, expecting a message of the wanted words; no folder unless training had begun."""

    def run(*words: object, root: Path, contains: list[str], dataset: str = "made-up", begun: bool = False) -> str:
        output = tmp_path / "refused"
        init = () if {"--init", "--model"} & set(words) else ("--init", explora_run)
        got = finetune(dataset, root, output, *init, *words)
        assert got.status == 2, got.err
        assert "Traceback" not in got.err
        message = got.err[got.err.index("geoexplora finetune: ") :]
        for text in contains:
            assert text in message
        assert len(message.splitlines()) > 1 or ". " in message or "must be" in message, "a remedy follows"
        assert begun or not output.exists()
        shutil.rmtree(output, ignore_errors=True)
        return message

    return run


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only."""
    return write_made_up(tmp_path_factory.mktemp("made_up"), "class")


def changed(kind: Kind, change: Callable[[NDArray[Any]], NDArray[Any] | None], split: str = "train") -> Any:
    """The made-up targets of a split, changed in place or anew."""
    target = make_up(kind, COUNTS[split])[1]
    new = change(target)
    return {split: target if new is None else new}


def put(at: Any, value: int) -> Callable[[NDArray[Any]], None]:
    def change(target: NDArray[Any]) -> None:
        target[at] = value

    return change


@pytest.mark.parametrize(("split", "value"), [("train", 3), ("train", -2), ("val", 7)])
def test_a_label_outside_the_classes(refused: Refused, tmp_path: Path, split: str, value: int) -> None:
    root = write_made_up(tmp_path / "data", "class", targets=changed("class", put(5, value), split))
    refused(root=root, contains=[f"{split}_5.tif has the label {value}", "none of the 3 classes 0 to 2"], begun=True)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_mask_value_outside_the_classes(refused: Refused, tmp_path: Path, split: str) -> None:
    root = write_made_up(tmp_path / "data", "mask", targets=changed("mask", put((4, 8, 8), 9), split))
    words = ("--task", "segmentation", "--head", "linear", "--crop-scale", "1,1")
    refused(*words, root=root, contains=[f"{split}_4.tif has the value 9 in its mask", "--ignore-index"], begun=True)
    got = finetune("made-up", root, tmp_path / "ignored", "--init", tmp_path.parent, *words)
    assert got.status == 2, "no encoder there"


def test_a_vector_of_labels_that_are_no_labels(refused: Refused, tmp_path: Path) -> None:
    root = write_made_up(tmp_path / "data", "multilabel", targets=changed("multilabel", put((2, 1), 4)))
    contains = ["train_2.tif has the value 4 in its vector of labels, which are 0 or 1"]
    refused("--task", "multilabel", root=root, contains=contains, begun=True)


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


def test_a_validation_split_of_nothing_but_the_ignored_value(tmp_path: Path, explora_run: Path) -> None:
    """Nothing could be chosen by it: it must not end well in silence."""
    words = ("--task", "segmentation", "--head", "linear", "--ignore-index", "255")
    root = write_made_up(tmp_path / "data", "mask", targets={"val": np.full((6, 16, 16), 255)})
    got = finetune("made-up", root, tmp_path / "run", "--init", explora_run, *words)
    assert "Traceback" not in got.err
    assert got.status == 2 or "warning" in got.err, got.err
    assert "val" in got.err


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
    assert "Traceback" not in got.err
    assert got.status == 2 or "warning" in got.err, got.err
    assert "lake" in got.err


def test_a_band_that_the_dataset_lacks(refused: Refused, tmp_path: Path, explora_run: Path) -> None:
    few = write_made_up(tmp_path / "few", "class", bands=BANDS["sentinel-2"][:8])
    refused(root=few, contains=["no band B11, B12", "B2,B3,B4,B5,B6,B7,B8,B8A"])


def test_an_encoder_of_another_sensor(refused: Refused, classes: Path, photo_run: Path) -> None:
    refused("--init", photo_run, root=classes, contains=["the encoder was trained on rgb, made-up is sentinel-2"])


@pytest.mark.parametrize(
    ("words", "contains"),
    [
        (("--task", "segmentation"), ["made-up has one class for each image", "--task classification"]),
        (("--task", "regression"), ["made-up has one class for each image", "--task classification"]),
        (("--task", "multilabel"), ["made-up has one class for each image", "--task classification"]),
        (("--num-classes", "5"), ["--num-classes 5 does not fit made-up, which has 3: field, lake, town"]),
        (("--num-classes", "2"), ["--num-classes 2 does not fit made-up"]),
        (("--class-weights", "1,2"), ["--class-weights has 2 numbers for 3 classes", "field, lake, town"]),
        (("--monitor", "val_Beauty"), ["--monitor val_Beauty", "val_OverallAccuracy", "val_loss"]),
        (("--monitor", "OverallAccuracy"), ["--monitor OverallAccuracy", "val_OverallAccuracy"]),
        (("--monitor", "val_Accuracy"), ["--monitor val_Accuracy", "val_OverallAccuracy"]),
        (("--monitor", "loss"), ["--monitor loss", "val_loss"]),
        (("--rank", "500"), ["500", "128"]),
        (("--image-size", "20"), ["--image-size 20 is not a multiple"]),
        (("--model", "vit_pico"), ["--method lora adapts trained weights", "--method full"]),
        (("--drop-path", "1"), ["--drop-path"]),
        (("--drop-path", "-0.1"), ["--drop-path"]),
        (("--accelerator", "gpu", "--devices", "63"), ["devices"]),
        (("--init", "nowhere"), ["--init nowhere"]),
    ],
    ids=lambda value: "-".join(value).strip("-") if isinstance(value, tuple) else None,
)
def test_settings(refused: Refused, classes: Path, words: tuple[str, ...], contains: list[str]) -> None:
    more = ("--image-size", "16", "--patch-size", "8") if "--model" in words else ()
    refused(*words, *more, root=classes, contains=contains)


def test_settings_of_segmentation(refused: Refused, tmp_path: Path) -> None:
    root = write_made_up(tmp_path / "data", "mask")
    words = ("--task", "segmentation")
    refused(*words, "--levels", "2,9", root=root, contains=["block 9 is out of range", "8 blocks"])
    refused(*words, "--levels", "2,5", "--method", "adalora", root=root, contains=["AdaLoRA", "last block"])
    refused(*words, "--num-classes", "2", root=root, contains=["--num-classes 2 does not fit"])


def test_init_and_model(refused: Refused, classes: Path, explora_run: Path) -> None:
    contains = ["--model vit_pico names the sizes of random weights, but --init gives weights"]
    refused("--init", explora_run, "--model", "vit_pico", root=classes, contains=contains)
    got = run_command("finetune", "--dataset", "made-up", "--root", classes, "--output", classes / "run", *FINE)
    assert got.status == 2
    assert "--init is missing" in got.err


def test_no_validation_split(refused: Refused, classes: Path, tmp_path: Path) -> None:
    contains = ["no labelled split val"]
    refused(root=classes, dataset="without-val", contains=contains)
    root = write_tropical_cyclone(tmp_path / "cyclones")
    words = ("--task", "regression", "--method", "full", "--model", "vit_pico", "--image-size", "16",
             "--patch-size", "8")  # fmt: skip
    refused(*words, root=root, dataset="tropical-cyclone", contains=contains)


def test_a_validation_split_whose_files_are_gone(refused: Refused, classes: Path, tmp_path: Path) -> None:
    root = shutil.copytree(classes, tmp_path / "data")
    (root / "val.npz").unlink()
    refused(root=root, contains=["val"])


def test_no_labels(refused: Refused, tmp_path: Path, photo_run: Path) -> None:
    got = finetune("photographs", tmp_path, tmp_path / "refused", "--init", photo_run)
    assert got.status == 2
    assert "photographs has no labels" in got.err
    assert not (tmp_path / "refused").exists()


def test_a_damaged_source(refused: Refused, classes: Path, explora_run: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes((explora_run / "encoder.safetensors").read_bytes()[:1000])
    refused("--init", broken, root=classes, contains=["broken.safetensors"])


def test_an_output_in_use(classes: Path, explora_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert finetune("made-up", classes, run, "--init", explora_run, "--max-steps", "1").status == 0
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    got = finetune("made-up", classes, run, "--init", explora_run)
    assert got.status == 2
    assert "already holds a run" in got.err
    assert "--resume" in got.err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_an_output_that_cannot_be_written(classes: Path, explora_run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for output in ("/proc/geoexplora", tmp_path / "file", tmp_path / "file/run"):
        got = finetune("made-up", classes, output, "--init", explora_run)  # type: ignore[arg-type]
        assert got.status == 2, got.err
        assert "Traceback" not in got.err


def test_resuming_what_is_no_fine_tuning(explora_run: Path, tmp_path: Path) -> None:
    got = run_command("finetune", "--resume", tmp_path / "nowhere")
    assert got.status == 2
    run = shutil.copytree(explora_run, tmp_path / "pretraining")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    got = run_command("finetune", "--resume", run)
    assert got.status == 2, got.err
    assert "Traceback" not in got.err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_unreadable_images_are_named_and_left_out(explora_run: Path, own_tree: Path, tmp_path: Path) -> None:
    tiles = sorted((own_tree / "fmow-sentinel/val").rglob("*.tif"))
    broken = tiles[1]
    broken.write_bytes(b"broken")
    words = ("--init", explora_run, "--max-unreadable", "0.5", "--max-steps", "1")
    got = finetune("fmow-sentinel", own_tree, tmp_path / "run", *words)
    assert got.status == 0, got.err
    assert got.err.count(f"warning: {broken} cannot be used") == 1
    for path in tiles:
        path.write_bytes(b"broken")
    got = finetune("fmow-sentinel", own_tree, tmp_path / "all", *words)
    assert got.status == 2, got.err
    assert "Traceback" not in got.err


def test_a_diverging_run(classes: Path, explora_run: Path, tmp_path: Path) -> None:
    words = ("--init", explora_run, "--method", "full", "--lr", "1e30", "--max-steps", "8", "--eval-every", "1")
    got = finetune("made-up", classes, tmp_path / "run", *words)
    assert got.status == 2, got.err
    assert "diverged" in got.err
    assert "Traceback" not in got.err


def test_a_run_that_is_not_whole(classes: Path, explora_run: Path, tmp_path: Path) -> None:
    """What reads a fine-tuned model says which file is wrong."""
    from geoexplora.errors import WeightsError
    from geoexplora.tasks.finetune.exports import load_finetuned

    with pytest.raises(WeightsError, match=re.escape("task_head")):
        load_finetuned(explora_run)
    run = tmp_path / "run"
    assert finetune("made-up", classes, run, "--init", explora_run, "--max-steps", "1").status == 0
    head = run / "task_head.safetensors"
    head.write_bytes(head.read_bytes()[:-40])
    with pytest.raises(WeightsError, match="no whole run"):
        load_finetuned(run)
    record = json.loads((run / "run.json").read_text())
    assert record["classes"] == ["field", "lake", "town"]


def test_a_band_of_the_encoder_that_no_image_has(
    refused: Refused, classes: Path, explora_run: Path, tmp_path: Path
) -> None:
    """The same sensor, but an encoder that reads B10 in place of B12."""
    _, spec = load_encoder(explora_run)

    def renamed(names: Any) -> tuple[str, ...]:
        return tuple("B10" if name == "B12" else name for name in names)

    normalization = dict(spec.normalization) | {"bands": list(renamed(spec.normalization["bands"]))}
    other = dataclasses.replace(
        spec, bands=renamed(spec.bands), groups=tuple(map(renamed, spec.groups)), normalization=normalization
    )
    file = tmp_path / "other.safetensors"
    save_encoder(file, load_file(explora_run / "encoder.safetensors"), other)
    refused("--init", file, root=classes, contains=["no band B10"])
