"""Bad input of ``geoexplora finetune``: one clear message with the remedy, exit status 2, no folder left behind."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from geoexplora.weights.load import load_encoder
from geoexplora.weights.write import save_encoder

from ...datasets.torchgeo_trees import write_tropical_cyclone
from ..conftest import run_command
from .helpers import BANDS, FINE, finetune, write_made_up

Refused = Callable[..., str]


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
        (("--class-weights", "0,0,0"), ["--class-weights", "at least two must be above 0"]),
        (("--class-weights", "0,1,0"), ["--class-weights", "at least two must be above 0"]),
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
