"""TorchGeo's datasets, by ``torchgeo:NAME`` or a name of their own: pre-training and probing, from the command line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from torchgeo.datasets import SSL4EOS12

from geoexplora.bands import LANDSAT_OLI
from geoexplora.cli.recipe_files import recipe_file
from geoexplora.registry import DATASETS, find_dataset
from geoexplora.runs.metrics import read_metrics
from geoexplora.torchgeo_facts import FACTS, Facts
from geoexplora.weights.files import read_weights
from geoexplora.weights.load import load_encoder

from ..datasets.torchgeo_trees import (
    files,
    spectrum,
    write_bigearthnet,
    write_eurosat,
    write_geotiff,
    write_loveda,
    write_resisc45,
    write_so2sat,
    write_ssl4eo_s12,
    write_tropical_cyclone,
    write_ucmerced,
)
from .conftest import TINY, Run

GROUPS = "B2,B3,B4,B8;B5,B6,B7,B8A;B11,B12"
BANDS = "B2,B3,B4,B5,B6,B7,B8,B8A,B11,B12"


@pytest.fixture(scope="module")
def resisc45(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only."""
    return write_resisc45(tmp_path_factory.mktemp("resisc45"))


@pytest.fixture(scope="module")
def eurosat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only."""
    return write_eurosat(tmp_path_factory.mktemp("eurosat"))


def words(name: str, root: Path, output: Path, *more: object) -> tuple[object, ...]:
    return ("pretrain", "--dataset", f"torchgeo:{name}", "--root", root, "--output", output, *TINY, *more)


def test_photographs_from_above(geoexplora: Run, resisc45: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    got = geoexplora(*words("RESISC45", resisc45, run, "--groups", "none", "--bands", "R,G,B", "--probe-every", "2"))
    assert got.status == 0, got.err
    assert "no reference statistics are known for TorchGeo's RESISC45" in got.err
    rows = read_metrics(run / "metrics.csv")
    assert [row["step"] for row in rows][-1] == 4
    assert any("knn" in name for row in rows for name in row), "class folders and a val split: it is probed"
    record = json.loads((run / "run.json").read_text())
    assert record["bands"] == ["R", "G", "B"]
    _, spec = load_encoder(read_weights(run))
    assert (spec.sensor, spec.groups) == ("rgb", None)
    state = load_file(run / "encoder.safetensors")
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=128, depth=8, num_heads=4, num_classes=0
    )
    model.load_state_dict(state, strict=True)

    got = geoexplora("probe", "--init", run, "--dataset", "torchgeo:RESISC45", "--root", resisc45, "--k", "3",
                     "--test-split", "val",
                     "--accelerator", "cpu", "--num-workers", "0")  # fmt: skip
    assert got.status == 0, got.err
    assert "4 test samples, 2 classes" in got.out


def test_it_is_taken_up_again(
    geoexplora: Run, tmp_path: Path, comparable: Callable[[Path], list[dict[str, Any]]]
) -> None:
    root, whole, halved = write_resisc45(tmp_path / "data"), tmp_path / "whole", tmp_path / "halved"
    got = geoexplora(*words("RESISC45", root, whole))
    assert got.status == 0, got.err
    shutil.copytree(whole, halved)
    (halved / "checkpoints" / "last.ckpt").unlink()  # the one before is of step 2
    got = geoexplora("pretrain", "--resume", halved)
    assert got.status == 0, got.err
    assert "from step 2" in got.err
    assert comparable(halved) == comparable(whole)
    one, other = (load_file(run / "encoder.safetensors") for run in (halved, whole))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    lines = (root / "resisc45-train.txt").read_text().splitlines()
    (root / "resisc45-train.txt").write_text("\n".join(lines[:-1]))
    got = geoexplora("pretrain", "--resume", whole)
    assert got.status == 2
    assert "the training data have changed since this run was started: 8 images then, 7 now" in got.err


def test_groups_of_bands_by_name(geoexplora: Run, eurosat: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    got = geoexplora(*words("EuroSAT", eurosat, run, "--bands", BANDS, "--groups", GROUPS))
    assert got.status == 0, got.err
    record = json.loads((run / "run.json").read_text())
    assert record["bands"] == BANDS.split(",")
    # Band n of EuroSAT's files lies between 1000 n and 1000 n + 500, and B8A is the last of them, the 13th.
    means = dict(zip(record["normalization"]["bands"], record["normalization"]["mean"], strict=True))
    assert [int(means[band] // 1000) for band in ("B2", "B8", "B8A", "B11", "B12")] == [2, 8, 13, 11, 12]
    encoder, spec = load_encoder(read_weights(run))
    assert (spec.sensor, spec.groups) == ("sentinel-2", tuple(tuple(group.split(",")) for group in GROUPS.split(";")))
    assert encoder(torch.zeros(1, 10, 16, 16)).isfinite().all()


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("RESISC", (), "--dataset: TorchGeo has no dataset 'RESISC'. Did you mean RESISC45"),
        ("RESISC45", ("--bands", "R,NIR"), "--bands: unknown band 'NIR' for rgb"),
        ("RESISC45", ("--groups", "R,G"), "--groups: band B stands in no channel group"),
        ("NAIP", (), "NAIP is a GeoDataset"),
        ("UCMerced", (), "TorchGeo finds no UCMerced in"),
        ("PatternNet", (), "TorchGeo finds no PatternNet in"),
        ("CopernicusBench", (), "needs more than a folder"),
        ("NonGeoClassificationDataset", ("--bands", "R,B", "--groups", "R;G"), "names band G, which is not among"),
    ],
)
def test_bad_settings(
    geoexplora: Run, resisc45: Path, tmp_path: Path, name: str, more: tuple[str, ...], message: str
) -> None:
    got = geoexplora(*words(name, resisc45, tmp_path / "run", *more))
    assert got.status == 2, got.err
    assert message in got.err
    assert "Traceback" not in got.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--bands", "B2,B99"), "unknown band 'B99' for sentinel-2"),
        (("--bands", "B2,B3,B4", "--groups", "B2,B3"), "band B4 stands in no channel group"),
        (("--bands", "B2,B3", "--groups", "B2,B3,B4"), "names band B4, which is not among the input bands"),
    ],
)
def test_bands_of_a_sensor_that_only_the_data_tell(
    geoexplora: Run, eurosat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...], message: str
) -> None:
    monkeypatch.delitem(FACTS, "EuroSAT")
    got = geoexplora(*words("EuroSAT", eurosat, tmp_path / "run", *more))
    assert got.status == 2, got.err
    assert message in got.err
    assert "Traceback" not in got.err
    assert not (tmp_path / "run").exists()


NAMED: list[tuple[str, Callable[[Path], Path], int]] = [
    ("eurosat", write_eurosat, 13),
    ("resisc45", write_resisc45, 3),
    ("ucmerced", write_ucmerced, 3),
    ("so2sat", write_so2sat, 10),
    ("bigearthnet", write_bigearthnet, 12),
    ("ssl4eo-s12", write_ssl4eo_s12, 13),
    ("loveda", write_loveda, 3),
    ("tropical-cyclone", write_tropical_cyclone, 3),
]


@pytest.mark.parametrize(("name", "write", "bands"), NAMED, ids=[name for name, _, _ in NAMED])
def test_a_step_by_name(
    geoexplora: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    write: Callable[[Path], Path],
    bands: int,
) -> None:
    monkeypatch.setattr(SSL4EOS12, "__len__", lambda dataset: 3)  # says 251,079 whatever is there
    root, run = write(tmp_path / "data"), tmp_path / "run"
    words = ("--root", root, "--output", run, *TINY, "--max-steps", "1", "--effective-batch-size", "4")
    words += ("--bands", "none", "--groups", "none")  # all that the dataset has, not the recipe's choice
    got = geoexplora("pretrain", "--dataset", name, *words)
    assert got.status == 0, got.err
    assert len(json.loads((run / "run.json").read_text())["bands"]) == bands
    assert "mask" not in got.err


def test_names_are_known() -> None:
    assert {name for name, _, _ in NAMED} < {name for name, entry in DATASETS.items() if entry.is_torchgeo}
    for name, entry in DATASETS.items():
        if entry.is_torchgeo:
            assert find_dataset(f"torchgeo:{entry.arguments['name']}") == find_dataset(name)


@pytest.mark.parametrize(
    ("objective", "recipe"), [((), "torchgeo"), (("--objective", "dinov2"), "torchgeo-dinov2")], ids=["mae", "dinov2"]
)
def test_names_share_the_recipe(geoexplora: Run, objective: tuple[str, ...], recipe: str) -> None:
    words = ("--root", "data", "--output", "runs/a", *objective, "--print-config")
    named, general = (
        yaml.safe_load(geoexplora("pretrain", "--dataset", name, *words).out) for name in ("loveda", "torchgeo:LoveDA")
    )
    assert named | {"dataset": "torchgeo:LoveDA"} == general
    header = yaml.safe_load(recipe_file(f"pretrain/{recipe}").read_text())
    assert named["image_size"] == header["image_size"]
    assert named["rank"] == header["rank"]


def test_masks_that_pretraining_does_not_need(geoexplora: Run, tmp_path: Path) -> None:
    root = write_loveda(tmp_path / "data")
    for path in root.rglob("masks_png/*.png"):
        Image.fromarray(np.full((24, 24), 255, np.uint8)).save(path)
    got = geoexplora(*words("LoveDA", root, tmp_path / "run", "--max-steps", "1", "--effective-batch-size", "4"))
    assert got.status == 0, got.err


def test_the_bundled_sample(geoexplora: Run, tmp_path: Path) -> None:
    run, sample = tmp_path / "run", ("--dataset", "sample", "--output")
    words = (*TINY, "--bands", "B2,B3,B4,B8", "--groups", "none", "--max-steps", "1", "--effective-batch-size", "4",
             "--tile-size", "32")  # fmt: skip
    got = geoexplora("pretrain", *sample, run, *words, "--probe-every", "1")
    assert got.status == 0, got.err
    assert any("knn" in row for row in read_metrics(run / "metrics.csv"))
    words = (
        "--tile-size",
        "32",
        "--fold",
        "3",
        "--test-split",
        "val",
        "--accelerator",
        "cpu",
        "--num-workers",
        "0",
        "--k",
        "3",
    )
    got = geoexplora("probe", "--init", run, *sample, tmp_path / "probe", *words)
    assert got.status == 0, got.err
    assert "50 test samples, 4 classes" in got.out, "tiles of water are small"
    got = geoexplora("pretrain", *sample, tmp_path / "other", *TINY, "--fold", "8")
    assert got.status == 2
    assert "the sample has no fold 8" in got.err


def test_a_missing_root(geoexplora: Run, tmp_path: Path) -> None:
    got = geoexplora("pretrain", "--dataset", "torchgeo:RESISC45", "--output", tmp_path / "run", *TINY)
    assert got.status == 2
    assert "--root is missing. Name the folder that holds torchgeo:RESISC45" in got.err
    got = geoexplora(*words("RESISC45", tmp_path / "nowhere", tmp_path / "run"))
    assert got.status == 2
    assert "nowhere does not exist" in got.err


def test_damaged_data(geoexplora: Run, tmp_path: Path) -> None:
    root = write_eurosat(tmp_path / "eurosat")
    first, second = files(root)[:2]
    first.write_bytes(b"broken")
    got = geoexplora(*words("EuroSAT", root, tmp_path / "one", "--bands", BANDS, "--groups", GROUPS))
    assert got.status == 0, got.err
    assert f"{first} cannot be used (not recognized" in got.err
    second.write_bytes(b"broken")
    got = geoexplora(*words("EuroSAT", root, tmp_path / "two", "--bands", BANDS, "--groups", GROUPS))
    assert got.status == 2
    assert "2 of 8 tiles" in got.err
    write_geotiff(first, spectrum(0))
    write_geotiff(second, spectrum(1)[:4])
    got = geoexplora(*words("EuroSAT", root, tmp_path / "three", "--bands", BANDS, "--groups", GROUPS))
    assert got.status == 2
    assert f"TorchGeo's EuroSAT cannot make an image of {second}" in got.err
    assert "Traceback" not in got.err


def test_an_encoder_of_another_sensor(
    geoexplora: Run, photo_run: Path, eurosat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = ("probe", "--dataset", "torchgeo:EuroSAT", "--root", eurosat, "--init")
    got = geoexplora(*probe, photo_run)
    assert got.status == 2
    assert "the encoder was trained on rgb, torchgeo:EuroSAT is sentinel-2" in got.err

    got = geoexplora(*words("EuroSAT", eurosat, tmp_path / "run", "--bands", "B2,B3,B4", "--max-steps", "1"))
    assert got.status == 0, got.err
    # Landsat's band names would fit, though they mean other wavelengths; only the opened data tell the sensor here.
    monkeypatch.setitem(FACTS, "EuroSAT", Facts(LANDSAT_OLI, (*LANDSAT_OLI.band_names, "B12", "B13")))
    got = geoexplora(*probe, tmp_path / "run")
    assert got.status == 2
    assert "the encoder was trained on sentinel-2, torchgeo:EuroSAT is landsat-oli" in got.err
