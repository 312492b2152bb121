"""``geoexplora probe``: scores, splits, few labels, cached features, and encoders that do not fit the data."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import time

import pytest

from geoexplora.tasks.probe import store

from ..datasets.torchgeo_trees import write_so2sat

ESTIMATE = r"(\d\.\d{4})(?: ± (\d\.\d{4}))?"
LINE = re.compile(rf"^(all|\d+ a class) +(knn k=\d+|linear|logistic) +{ESTIMATE} +{ESTIMATE}(?: +(.+))?$")
QUICK = (
    "--num-workers", "0", "--accelerator", "cpu", "--precision", "32", "--k", "20", "--linear-steps", "5",
    "--classifiers", "knn,linear,logistic", "--select", "held-out",
)  # fmt: skip


@pytest.fixture
def probe(geoexplora, fmow_tree):
    def run(init, *words, root=fmow_tree):
        return geoexplora("probe", "--init", init, "--dataset", "fmow-sentinel", "--root", root, *QUICK, *words)

    return run


def scores(outcome):
    """By labels and classifier: accuracy, its interval, balanced accuracy, its interval, setting."""
    assert outcome.status == 0, outcome.err
    lines = outcome.out.splitlines()
    assert lines[0].split() == ["labels", "classifier", "accuracy", "balanced", "accuracy", "setting"]
    matches = [LINE.match(line) for line in lines[1:-1]]
    assert all(matches), outcome.out
    return {match.group(1, 2): match.groups()[2:] for match in matches}


def samples(outcome):
    """The number of test samples, from the last line."""
    return int(outcome.out.splitlines()[-1].split(" test samples")[0])


def test_a_run(probe, explora_run, tmp_path):
    run = shutil.copytree(explora_run, tmp_path / "run")
    got = probe(run)
    table = scores(got)
    assert list(table) == [("all", "knn k=20"), ("all", "linear"), ("all", "logistic")]
    assert samples(got) == 15
    assert got.out.endswith("15 test samples, 5 classes; setting chosen on held-out training samples\n")
    assert re.fullmatch(r"(cls-[14]|cls-[14]\+mean|mean), rate .*", table["all", "linear"][-1])
    assert len(list((run / "features").glob("*/features.npy"))) == 2, "features are kept in the run"
    again = probe(run)
    assert "features of train from" in again.err
    assert again.out == got.out


def test_a_file(probe, explora_run, tmp_path):
    file = shutil.copy(explora_run / "encoder.safetensors", tmp_path)
    output = tmp_path / "result"
    got = probe(file, "--output", output)
    assert scores(got) == scores(probe(explora_run))
    record = json.loads((output / "probe.json").read_text())
    assert f"{record['results'][0]['accuracy']['mean']:.4f}" == scores(got)["all", "knn k=20"][0]
    assert len(record["linear_settings"]) == 65
    assert record["results"][1]["chosen"][0].keys() == {"features", "rate"}
    assert len(record["settings"]["weights"]["sha256"]) == 64
    assert (record["settings"]["holdout"], record["settings"]["splits"]) == ("split", ["train", "val"])
    assert len(list(output.glob("features/*/features.npy"))) == 2
    assert not list(tmp_path.glob("features*")), "without --output a file leaves nothing beside it"
    with (output / "per_class.csv").open() as stream:
        rows = list(csv.reader(stream))
    assert rows[0] == ["class", "test samples", "knn k=20", "linear", "logistic"]
    assert sum(int(row[1]) for row in rows[1:]) == 15
    assert (output / "confusion.png").exists()


def test_random_weights(geoexplora):
    words = ("--model", "vit_pico", "--image-size", "16", "--dataset", "sample", *QUICK, "--classifiers", "knn")
    assert scores(geoexplora("probe", *words, "--seed", "1")).keys() == {("all", "knn k=20")}


def test_features_of_other_weights_are_not_taken(probe, pretrain, explora_run, photo_run, tmp_path):
    other = tmp_path / "other"
    assert pretrain(other, "--init", photo_run, "--seed", "1", "--max-steps", "1").status == 0
    first = probe(explora_run, "--output", tmp_path / "result")
    second = probe(other, "--output", tmp_path / "result")
    assert first.status == second.status == 0
    assert "features of train from" not in second.err
    assert "features of train from" in probe(explora_run, "--output", tmp_path / "result").err


@pytest.mark.parametrize(("words", "taken"), [(("--pool", "cls"), True), (("--precision", "bf16"), False)])
def test_features_of_other_settings_are_not_taken(probe, explora_run, tmp_path, words, taken):
    """Class tokens and means are computed at once."""
    assert probe(explora_run, "--output", tmp_path).status == 0
    got = probe(explora_run, "--output", tmp_path, *words)
    assert got.status == 0, got.err
    assert ("features of train from" in got.err) == taken


def test_features_of_changed_data_are_not_taken(probe, explora_run, own_tree, tmp_path):
    assert probe(explora_run, "--output", tmp_path / "r", root=own_tree).status == 0
    lines = (own_tree / "train.csv").read_text().splitlines(keepends=True)
    (own_tree / "train.csv").write_text("".join(lines[:-3]))
    got = probe(explora_run, "--output", tmp_path / "r", root=own_tree)
    assert got.status == 0, got.err
    assert f"features of {len(lines) - 4} images of train" in got.err
    assert "features of val from" in got.err


def test_a_killed_extraction_goes_on(probe, explora_run, fmow_tree, start, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "RECORD_SECONDS", -1.0)
    expected = probe(explora_run, "--output", tmp_path / "whole", "--batch-size", "4")
    words = ("--init", explora_run, "--dataset", "fmow-sentinel", "--root", fmow_tree, *QUICK, "--batch-size", "4")
    process = start([str(word) for word in ("probe", *words, "--output", tmp_path / "killed")])
    end = time.monotonic() + 60
    while not list((tmp_path / "killed/features").glob("train-*/progress.json")) and time.monotonic() < end:
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    got = probe(explora_run, "--output", tmp_path / "killed", "--batch-size", "4")
    assert got.out == expected.out
    assert re.search(r"features of train: \d+ of 53 images are in", got.err)


def test_holdout_by_location(probe, explora_run, fmow_tree):
    got = probe(explora_run, "--holdout", "location", "--output", "/dev/null/x", "--classifiers", "knn")
    assert got.status == 2
    got = probe(explora_run, "--holdout", "location")
    rows = sum(len((fmow_tree / f"{split}.csv").read_text().splitlines()) - 1 for split in ("train", "val", "test_gt"))
    assert samples(got) == rows, "every tile is tested once"


def test_the_test_split(probe, explora_run, fmow_tree):
    got = probe(explora_run, "--test-split", "test", "--select", "test")
    assert samples(got) == len((fmow_tree / "test_gt.csv").read_text().splitlines()) - 1
    assert got.out.endswith("setting chosen on the test samples\n")
    assert "features of val" not in got.err


def test_few_labels_seeds_and_neighbours(probe, explora_run):
    words = ("--few-shot", "1,3", "--repeats", "3")
    few, again = (scores(probe(explora_run, *words)) for _ in range(2))
    assert few == again
    assert list(few)[:2] == [("1 a class", "knn k=5"), ("1 a class", "linear")]
    assert ("3 a class", "logistic") in few
    assert all(row[1] is not None and row[3] is not None for row in few.values()), "an interval each"
    everything = scores(probe(explora_run, "--k", "3,20", "--repeats", "2", "--classifiers", "knn,linear"))
    assert [row[1] is None for row in everything.values()] == [True, True, False], "neighbours depend on no seed"


def test_unlabelled_and_unsplit_data(probe, explora_run, unlabelled_tree, geoexplora, photo_run):
    got = probe(explora_run, root=unlabelled_tree)
    assert got.status == 2
    assert "has no labelled split val there" in got.err
    got = probe(explora_run, "--holdout", "location", root=unlabelled_tree)
    assert got.status == 2
    assert "all images are of one class, unlabelled" in got.err
    got = geoexplora("probe", "--init", photo_run, "--dataset", "photographs", "--holdout", "location")
    assert got.status == 2
    assert "photographs has no labels" in got.err


def test_data_without_locations(geoexplora, tmp_path):
    """TorchGeo tells no locations: that is said before features are computed, with a remedy that helps."""
    words = (
        "probe", "--model", "vit_pico", "--image-size", "16", "--dataset", "torchgeo:So2Sat",
        "--root", write_so2sat(tmp_path), *QUICK, "--k", "1",
    )  # fmt: skip
    got = geoexplora(*words, "--holdout", "location")
    assert got.status == 2
    assert "all labelled images of torchgeo:So2Sat lie at one location, or it does not tell" in got.err
    assert "Use --holdout split --test-split val." in got.err
    assert "features of" not in got.err
    assert geoexplora(*words, "--holdout", "split", "--test-split", "val").status == 0


def test_training_samples_of_one_class(probe, explora_run, own_tree):
    lines = (own_tree / "train.csv").read_text().splitlines(keepends=True)
    (own_tree / "train.csv").write_text("".join(lines[:1] + [line for line in lines if ",water," in line]))
    got = probe(explora_run, root=own_tree)
    assert got.status == 2
    assert "all training samples are of one class, water" in got.err
    assert "features of" not in got.err


def test_a_class_without_training_samples_is_named(probe, explora_run, own_tree):
    lines = (own_tree / "train.csv").read_text().splitlines(keepends=True)
    (own_tree / "train.csv").write_text("".join(line for line in lines if ",water," not in line))
    got = probe(explora_run, root=own_tree)
    assert scores(got)
    assert "warning: no training sample is of class water: 3 test samples of it count as wrong" in got.err


def test_masks_and_several_labels_are_for_finetune(geoexplora, explora_run, monkeypatch):
    from geoexplora.datamodules.fmow_sentinel import FMoWSentinelDataModule

    for kind, task in [("mask", "segmentation"), ("multilabel", "multilabel"), ("value", "regression")]:
        monkeypatch.setattr(FMoWSentinelDataModule, "target", kind)
        got = geoexplora("probe", "--init", explora_run, "--dataset", "fmow-sentinel", "--root", ".", *QUICK)
        assert got.status == 2
        assert "a probe needs one class for each image, fmow-sentinel has" in got.err
        assert f"Use geoexplora finetune --task {task} --method linear." in got.err


def test_encoders_that_do_not_fit(probe, explora_run, photo_run):
    for init, words, text in [
        (photo_run, (), "the encoder was trained on rgb, fmow-sentinel is sentinel-2"),
        (explora_run, ("--image-size", "20"), "not a multiple of the encoder's patch size 8"),
        (explora_run, ("--bands", "B2,Q"), "unknown band"),
    ]:
        got = probe(init, *words)
        assert got.status == 2
        assert text in got.err
        assert got.out == ""


def test_seeds_that_change_nothing(probe, explora_run):
    text = "warning: --repeats 3 changes nothing here: only the linear probe and --few-shot depend on seeds."
    got = probe(explora_run, "--repeats", "3", "--classifiers", "knn,logistic")
    assert got.status == 0
    assert text in got.err
    assert text not in probe(explora_run, "--repeats", "3", "--classifiers", "knn", "--few-shot", "2").err
    assert text not in probe(explora_run, "--repeats", "3", "--classifiers", "linear").err


def test_settings_out_of_range(geoexplora, fmow_tree):
    words = ("--dataset", "fmow-sentinel", "--root", fmow_tree)
    for more, text in [
        (("--few-shot", "5,0"), "--few-shot must be at least 1, not 0"),
        (("--k", "1,-2"), "--k must be at least 1, not -2"),
        (("--repeats", "0"), "--repeats must be at least 1, not 0"),
        (("--temperature", "0"), "--temperature must be above 0, not 0"),
        (("--classifiers", "knn,tree"), "expected some of knn,linear,logistic"),
    ]:
        got = geoexplora("probe", "--model", "vit_pico", *words, *more)
        assert got.status == 2
        assert text in got.err
    got = geoexplora("probe", *words)
    assert "--init is missing. Name the encoder to probe" in got.err
    got = geoexplora("probe", *words, "--init", "dinov2-vits14", "--model", "vit_pico")
    assert "names the sizes of random weights, but --init gives weights" in got.err


def test_unreadable_tiles_are_left_out(probe, explora_run, own_tree):
    tile = next((own_tree / "fmow-sentinel/val").rglob("*.tif"))
    tile.write_bytes(tile.read_bytes()[:200])
    got = probe(explora_run, root=own_tree)
    assert samples(got) == 14
    assert got.err.count(f"warning: {tile} cannot be used") == 1
