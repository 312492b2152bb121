"""``geoexplora probe``: scores, splits, few labels, cached features, and encoders that do not fit the data."""

from __future__ import annotations

import json
import re
import shutil

import pytest

LINE = re.compile(r"^(\w+) +accuracy (\d\.\d{4})  balanced accuracy (\d\.\d{4})  \((\d+) test samples, (\d) classes\)$")


@pytest.fixture
def probe(geoexplora, fmow_tree):
    def run(init, *words, root=fmow_tree):
        data = ("--dataset", "fmow-sentinel", "--root", root, "--num-workers", "0", "--accelerator", "cpu")
        return geoexplora("probe", "--init", init, *data, *words)

    return run


def scores(outcome):
    assert outcome.status == 0, outcome.err
    return {match[1]: match.groups()[1:] for match in map(LINE.match, outcome.out.splitlines()) if match}


def test_a_run(probe, explora_run, tmp_path):
    run = shutil.copytree(explora_run, tmp_path / "run")
    got = probe(run)
    table = scores(got)
    assert list(table) == ["knn", "linear"]
    assert len(got.out.splitlines()) == 2, "the result and nothing else on standard output"
    assert table["linear"][2:] == ("15", "5")
    assert len(list((run / "features").glob("*.npz"))) == 2, "features are kept in the run"
    again = probe(run)
    assert "features of train from" in again.err
    assert again.out == got.out


def test_a_file(probe, explora_run, tmp_path):
    file = shutil.copy(explora_run / "encoder.safetensors", tmp_path)
    got = probe(file, "--output", tmp_path / "result")
    assert scores(got) == scores(probe(explora_run))
    record = json.loads((tmp_path / "result/probe.json").read_text())
    assert f"{record['scores']['knn']['accuracy']:.4f}" == scores(got)["knn"][0]
    assert len(record["settings"]["weights"]["sha256"]) == 64
    assert record["settings"]["holdout"] == "split"
    assert len(list((tmp_path / "result/features").glob("*.npz"))) == 2
    assert not list(tmp_path.glob("*.npz")), "without --output a file leaves nothing beside it"


def test_features_of_other_weights_are_not_taken(probe, pretrain, explora_run, photo_run, tmp_path):
    other = tmp_path / "other"
    assert pretrain(other, "--init", photo_run, "--seed", "1", "--max-steps", "1").status == 0
    first = probe(explora_run, "--output", tmp_path / "result")
    second = probe(other, "--output", tmp_path / "result")
    assert first.status == second.status == 0
    assert "features of train from" not in second.err
    assert "features of train from" in probe(explora_run, "--output", tmp_path / "result").err


@pytest.mark.parametrize("words", [("--pool", "cls"), ("--image-size", "24"), ("--precision", "bf16")])
def test_features_of_other_settings_are_not_taken(probe, explora_run, tmp_path, words):
    assert probe(explora_run, "--output", tmp_path).status == 0
    got = probe(explora_run, "--output", tmp_path, *words)
    assert got.status == 0, got.err
    assert "from" not in "".join(line for line in got.err.splitlines() if line.startswith("features of train"))


def test_features_of_changed_data_are_not_taken(probe, explora_run, own_tree, tmp_path):
    assert probe(explora_run, "--output", tmp_path / "r", root=own_tree).status == 0
    lines = (own_tree / "train.csv").read_text().splitlines(keepends=True)
    (own_tree / "train.csv").write_text("".join(lines[:-3]))
    got = probe(explora_run, "--output", tmp_path / "r", root=own_tree)
    assert got.status == 0, got.err
    assert f"features of {len(lines) - 4} images of train" in got.err
    assert "features of val from" in got.err


def test_holdout_by_location(probe, explora_run, fmow_tree):
    got = probe(explora_run, "--holdout", "location", "--output", "/dev/null/x")
    assert got.status == 2
    got = probe(explora_run, "--holdout", "location")
    rows = sum(len((fmow_tree / f"{split}.csv").read_text().splitlines()) - 1 for split in ("train", "val", "test_gt"))
    assert scores(got)["knn"][2] == str(rows), "every tile is tested once"


def test_few_labels_and_neighbours(probe, explora_run):
    words = [(), ("--few-shot", "1"), ("--few-shot", "1"), ("--k", "3")]
    everything, few, again, other = (scores(probe(explora_run, *more)) for more in words)
    assert few == again != everything
    assert other["linear"] == everything["linear"]


def test_unlabelled_and_unsplit_data(probe, explora_run, unlabelled_tree, geoexplora, photo_run):
    got = probe(explora_run, root=unlabelled_tree)
    assert got.status == 2
    assert "has no labelled split val there" in got.err
    got = probe(explora_run, "--holdout", "location", root=unlabelled_tree)
    assert got.status == 2
    assert "all tiles are of one class, unlabelled" in got.err
    got = geoexplora("probe", "--init", photo_run, "--dataset", "photographs", "--holdout", "location")
    assert got.status == 2
    assert "photographs has no labels" in got.err


def test_encoders_that_do_not_fit(probe, explora_run, photo_run):
    for init, words, text in [
        (photo_run, (), "the encoder was trained on rgb, fmow-sentinel is sentinel-2"),
        (explora_run, ("--bands", "B2,B3,B4"), "the encoder was trained on bands B2,B3,B4,B5,B6,B7,B8,B8A,B11,B12"),
        (explora_run, ("--image-size", "20"), "not a multiple of the encoder's patch size 8"),
        (explora_run, ("--bands", "B2,Q"), "unknown band"),
    ]:
        got = probe(init, *words)
        assert got.status == 2
        assert text in got.err
        assert got.out == ""


def test_unreadable_tiles_are_left_out(probe, explora_run, own_tree):
    tile = next((own_tree / "fmow-sentinel/val").rglob("*.tif"))
    tile.write_bytes(tile.read_bytes()[:200])
    got = probe(explora_run, root=own_tree)
    assert scores(got)["knn"][2] == "14"
    assert got.err.count(f"warning: {tile} cannot be used") == 1
