"""What is extracted, what the key depends on, and what happens where the cache cannot be written."""

from __future__ import annotations

import json
import logging
import os
import threading
from dataclasses import replace

import h5py
import numpy as np
import pytest
import timm
import torch
import torchgeo.datasets
from PIL import Image
from torch import nn
from torchgeo.datasets import RESISC45, MillionAID, NonGeoDataset, So2Sat

from geoexplora.datamodules import FMoWRGBDataModule, FMoWSentinelDataModule
from geoexplora.datamodules.torchgeo_source import TorchGeoDataModule
from geoexplora.datasets import file_tree, write_fmow_rgb_tree
from geoexplora.datasets.torchgeo_source import TorchGeoTiles
from geoexplora.models.group_channel_vit import GroupChannelVisionTransformer
from geoexplora.models.pooling import pooled_features
from geoexplora.runs.lock import FolderLock
from geoexplora.tasks.features import ProbeFeatures
from geoexplora.tasks.opening import OpenedEncoder
from geoexplora.tasks.probe import extraction as module
from geoexplora.tasks.probe import store as store_module
from geoexplora.tasks.probe.evaluation import Result
from geoexplora.tasks.probe.extraction import Extraction
from geoexplora.tasks.probe.report import write_report
from geoexplora.weights.load import build_encoder
from geoexplora.weights.spec import EncoderSpec

from ...datasets.torchgeo_trees import photograph, write_resisc45, write_so2sat

BANDS = ("B2", "B3", "B4")


@pytest.fixture(autouse=True)
def every_batch_is_recorded(monkeypatch):
    monkeypatch.setattr(store_module, "RECORD_SECONDS", -1.0)


def extraction(root, cache, spare=None, *, bf16=False, sha256="0", size=16, **data):
    module_of_data = FMoWSentinelDataModule(
        root, bands=BANDS, image_size=size, batch_size=8, num_workers=0, normalization="clip-float"
    )
    return of_data(module_of_data, cache, spare, [("B2", "B3"), ("B4",)], bf16=bf16, sha256=sha256, **data)


def of_data(module_of_data, cache, spare=None, groups=None, *, bf16=False, sha256="0", **data):
    spec = EncoderSpec.of(
        "vit_pico", image_size=module_of_data.image_size, patch_size=8, sensor=module_of_data.sensor.name,
        bands=module_of_data.bands, normalization=module_of_data.normalization.to_dict(), groups=groups,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = build_encoder(spec).eval()
        for parameter in encoder.parameters():
            nn.init.normal_(parameter, std=0.1)
    opened = OpenedEncoder(encoder, spec, module_of_data, None, sha256)
    return Extraction(opened, data, torch.device("cpu"), bf16, cache, spare or cache)


def folders(cache):
    return sorted(path.name for path in cache.iterdir())


@pytest.mark.parametrize("kind", ["plain", "registers", "shallow", "pooled norm", "groups", "pooled norm of groups"])
def test_every_set_of_features(kind):
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "num_heads": 4, "num_classes": 0}
    depth = 2 if kind == "shallow" else 6
    pooled = {"fc_norm": True, "final_norm": False, "global_pool": "avg"} if "pooled" in kind else {}
    if "groups" in kind:
        encoder = GroupChannelVisionTransformer([[0, 1], [2]], 8, depth=depth, **sizes, **pooled)
    else:
        more = {"reg_tokens": 3} if kind == "registers" else {}
        encoder = timm.models.VisionTransformer(depth=depth, **sizes, **pooled, **more)
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.2)
    images = torch.rand(3, 3, 16, 16)
    layout = ProbeFeatures.of(encoder.eval())
    with torch.no_grad():
        got = layout(encoder, images)
        norm = encoder.fc_norm if "pooled" in kind else encoder.norm
        hidden = encoder.forward_intermediates(images, return_prefix_tokens=True, output_fmt="NLC")[1]
        classes = [norm(prefix[:, 0]) for _, prefix in hidden]
        assert got.shape == (3, layout.size)
        assert layout.blocks == min(4, depth)
        for pool in ("mean", "cls"):
            expected = norm(classes_only(encoder, images)) if "pooled" in kind and pool == "cls" else None
            expected = pooled_features(encoder, images, pool) if expected is None else expected
            torch.testing.assert_close(got[:, layout.columns(pool)], expected)
    sets = layout.sets()
    assert next(iter(sets)) == "cls-1"
    last, mean = classes[-1], got[:, layout.columns("mean")]
    torch.testing.assert_close(got[:, sets["cls-1"]], last)
    torch.testing.assert_close(got[:, sets["cls-1+mean"]], torch.cat([last, mean], 1))
    several = torch.cat(classes[-4:], 1)
    torch.testing.assert_close(got[:, sets[f"cls-{layout.blocks}"]], several)
    torch.testing.assert_close(got[:, sets[f"cls-{layout.blocks}+mean"]], torch.cat([several, mean], 1))
    torch.testing.assert_close(got[:, sets["mean"]], mean)


def classes_only(encoder, images):
    return encoder.forward_features(images)[:, 0]


def test_an_encoder_of_one_block_has_three_sets():
    assert list(ProbeFeatures(32, 1, 32).sets()) == ["cls-1", "cls-1+mean", "mean"]


@pytest.mark.parametrize(("bf16", "tolerance"), [(False, 1e-4), (True, 0.1)])
def test_features_in_order(fmow_tree, tmp_path, bf16, tolerance):
    made = extraction(fmow_tree, tmp_path / "cache", bf16=bf16)
    found = made.features("train")
    view = made.opened.datamodule.eval_dataset("train")
    assert found.labels.tolist() == view.labels.tolist()
    assert found.indices.tolist() == list(range(len(view)))
    assert found.features.dtype == (np.float16 if bf16 else np.float32)
    images = torch.stack([view[at]["image"] for at in range(len(view))])
    with torch.no_grad():
        expected = ProbeFeatures.of(made.opened.encoder)(made.opened.encoder, images)
    torch.testing.assert_close(torch.from_numpy(found.features).float(), expected, rtol=tolerance, atol=tolerance)


def test_the_second_time_nothing_is_computed(fmow_tree, tmp_path, monkeypatch, caplog):
    first = extraction(fmow_tree, tmp_path).features("train")
    monkeypatch.setattr(module, "read_features", None)
    with caplog.at_level(logging.INFO):
        second = extraction(fmow_tree, tmp_path).features("train")
    assert "features of train from" in caplog.text
    np.testing.assert_array_equal(first.features, second.features)


def test_the_key_is_the_content(own_tree, tmp_path):
    cache = tmp_path / "cache"
    extraction(own_tree, cache).features("val")
    (first,) = folders(cache)
    moved = own_tree.rename(tmp_path / "elsewhere")
    extraction(moved, cache).features("val")
    assert folders(cache) == [first], "the same files elsewhere"
    for changed in (
        {"sha256": "1"}, {"bf16": True}, {"size": 24}, {"crop": "tight"},
    ):  # fmt: skip
        before = len(folders(cache))
        extraction(moved, cache, **changed).features("val")
        assert len(folders(cache)) == before + 1, changed
    tile = next((moved / "fmow-sentinel/val").rglob("*.tif"))
    state = tile.stat()
    os.utime(tile, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    before = len(folders(cache))
    extraction(moved, cache).features("val")
    assert len(folders(cache)) == before + 1, "a file that was written anew"
    lines = (moved / "val.csv").read_text().splitlines(keepends=True)
    (moved / "val.csv").write_text("".join(lines[:-1]))
    extraction(moved, cache).features("val")
    assert len(folders(cache)) == before + 2, "a row less"


def of_rgb(root, cache):
    return of_data(FMoWRGBDataModule(root, image_size=16, batch_size=8, crop="tight"), cache)


def test_boxes_belong_to_the_key(tmp_path):
    """Another box of the same image is another crop, though no image, label or number has changed."""
    root, cache = write_fmow_rgb_tree(tmp_path / "data", (20, 32), margin=12, limit=1), tmp_path / "cache"
    before = np.array(of_rgb(root, cache).features("val").features)
    of_rgb(root, cache).features("val")
    assert len(folders(cache)) == 1, "the same boxes"
    annotation = of_rgb(root, cache).opened.datamodule.source("val").path(0).with_suffix(".json")
    content = json.loads(annotation.read_text())
    content["bounding_boxes"][0]["box"] = [0, 0, 10, 10]
    annotation.write_text(json.dumps(content))
    for index in root.rglob(".*.index.npz"):
        index.unlink()
    after = of_rgb(root, cache).features("val").features
    assert len(folders(cache)) == 2
    changed = np.abs(after - before).max(1) > 1e-3
    assert changed.tolist() == [True] + [False] * (len(after) - 1)


def of_torchgeo(name, root, cache):
    """With a normalization that does not follow from the images."""
    own = TorchGeoDataModule(root, name=name).normalization
    fixed = replace(own, mean=(1300.0,) * len(own.bands), std=(400.0,) * len(own.bands))
    return of_data(TorchGeoDataModule(root, name=name, image_size=16, batch_size=8, normalization=fixed), cache)


def test_one_file_of_all_images_belongs_to_the_key(tmp_path):
    """So2Sat's images lie in one file for each split: other pixels with the same labels are other data."""
    root, cache = write_so2sat(tmp_path / "data"), tmp_path / "cache"
    before = np.array(of_torchgeo("So2Sat", root, cache).features("train").features)
    for split in ("val", "train", "val"):
        of_torchgeo("So2Sat", root, cache).features(split)
    assert len(folders(cache)) == 2, "the same files"
    with h5py.File(root / So2Sat.filenames_by_version["2"]["train"], "r+") as file:
        file["sen2"][:] = file["sen2"][:][::-1]
    after = of_torchgeo("So2Sat", root, cache).features("train").features
    assert len(folders(cache)) == 3
    assert np.abs(after - before).max() > 1e-3
    of_torchgeo("So2Sat", root, cache).features("val")
    assert len(folders(cache)) == 3, "the validation images lie in another file"


def test_listed_files_belong_to_the_key(tmp_path, monkeypatch):
    """Wherever the command is started, as long as the same files are found."""
    write_resisc45(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    first = TorchGeoTiles(RESISC45("data")).fingerprint()
    assert TorchGeoTiles(RESISC45(tmp_path / "data")).fingerprint() == first
    tile = TorchGeoTiles(RESISC45("data")).path(1)
    os.utime(tile, ns=(0, tile.stat().st_mtime_ns + 1))
    assert TorchGeoTiles(RESISC45("data")).fingerprint() != first


def of_millionaid(root, split="train"):
    return TorchGeoTiles(MillionAID(root, split=split))


def test_files_in_a_list_of_dicts_belong_to_the_key(tmp_path, monkeypatch):
    """Whatever else lies under the root; the folders of the files are their classes."""
    for index, name in enumerate(("dam", "river")):
        folder = tmp_path / "data/train/water_area" / name
        folder.mkdir(parents=True)
        Image.fromarray(photograph(index)).save(folder / f"{index}.jpg")
    monkeypatch.chdir(tmp_path)
    first = of_millionaid("data").fingerprint()
    (tmp_path / "data/test").mkdir()
    (tmp_path / "data/test/another.jpg").touch()
    assert of_millionaid(tmp_path / "data").fingerprint() == first
    tile = tmp_path / "data/train/water_area/dam/0.jpg"
    state = tile.stat()
    os.utime(tile, ns=(0, state.st_mtime_ns + 1))
    assert of_millionaid("data").fingerprint() != first
    os.utime(tile, ns=(0, state.st_mtime_ns))
    assert of_millionaid("data").fingerprint() == first
    tile.parent.rename(tile.parent.with_name("lake"))
    assert of_millionaid("data").fingerprint() != first


class Listing(NonGeoDataset):
    """Images in files whose names are told from the root on."""

    def __init__(self, root):
        self.root, self.files = root, ["0.npy", "1.npy"]

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        return {"image": torch.from_numpy(np.load(self.root / self.files[index]))}


def test_files_that_are_listed_from_the_root_on_belong_to_the_key(tmp_path):
    for index in range(2):
        np.save(tmp_path / f"{index}.npy", np.full((3, 4, 4), float(index)))
    first = TorchGeoTiles(Listing(tmp_path)).fingerprint()
    (tmp_path / "other.npy").touch()
    assert TorchGeoTiles(Listing(tmp_path)).fingerprint() == first
    os.utime(tmp_path / "1.npy", ns=(0, 0))
    assert TorchGeoTiles(Listing(tmp_path)).fingerprint() != first


class Folder(NonGeoDataset):
    """A dataset that does not tell which file holds an image."""

    def __init__(self, root):
        self.root = root

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return {"image": torch.full((3, 4, 4), index), "label": torch.tensor(index)}


def test_where_no_files_are_told_all_count(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    for root in (one, other):
        (root / "images").mkdir(parents=True)
        (root / "images/all.npy").write_bytes(b"1234")
        os.utime(root / "images/all.npy", ns=(0, 0))
    first = TorchGeoTiles(Folder(str(one))).fingerprint()
    assert TorchGeoTiles(Folder(str(one))).fingerprint() == first
    assert TorchGeoTiles(Folder(str(other))).fingerprint() != first
    os.utime(one / "images/all.npy", ns=(0, 1))
    assert TorchGeoTiles(Folder(str(one))).fingerprint() != first


class Labelled(Folder):
    classes = ("dark", "bright")


def test_features_below_the_root_do_not_change_their_key(tmp_path, monkeypatch):
    """As those of ``--root data --output data/probe``: the files under the root are looked at once a run."""
    monkeypatch.setattr(torchgeo.datasets, "Labelled", Labelled, raising=False)
    root, looked_at = tmp_path / "data", []
    root.mkdir()
    (root / "all.npy").write_bytes(b"1234")
    listed = file_tree._files
    monkeypatch.setattr(file_tree, "_files", lambda root: looked_at.append(root) or listed(root))
    for _ in range(2):
        made = of_torchgeo("Labelled", root, root / "probe/features")
        for _ in range(2):
            assert made.features("train").labels.tolist() == [0, 1]
        write_report(root / "probe", [Result("knn", None, [np.eye(2, dtype=np.int64)])], ("dark", "bright"), {})
    assert len(folders(root / "probe/features")) == 1
    assert len(looked_at) == 2


def test_where_the_weights_came_from_does_not_matter(fmow_tree, tmp_path):
    made = extraction(fmow_tree, tmp_path)
    named = replace(made.opened.spec, source={"path": "a.pth", "sha256": "1"})
    other = replace(made, opened=replace(made.opened, spec=named))
    made.features("val")
    other.features("val")
    assert len(folders(tmp_path)) == 1


def test_a_killed_extraction_goes_on(own_tree, tmp_path, monkeypatch, caplog):
    (expected,) = (extraction(own_tree, tmp_path / "whole").features("train"),)
    tile = sorted((own_tree / "fmow-sentinel/train").rglob("*.tif"))[0]
    tile.write_bytes(tile.read_bytes()[:100])
    read = module.read_features

    def killed(encode, batches, *rest):
        for number, batch in enumerate(read(encode, batches, *rest)):
            if number == 2:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(module, "read_features", killed)
    with pytest.raises(KeyboardInterrupt):
        extraction(own_tree, tmp_path / "cache").features("train")
    monkeypatch.undo()
    monkeypatch.setattr(store_module, "RECORD_SECONDS", -1.0)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        found = extraction(own_tree, tmp_path / "cache").features("train")
    assert "features of train: 16 of 53 images are in" in caplog.text
    assert "features of 37 images of train" in caplog.text
    assert f"{tile} cannot be used" in caplog.text, "counted again, so that the bearable share holds"
    kept = np.isin(expected.indices, found.indices)
    assert kept.sum() == len(kept) - 1
    np.testing.assert_allclose(found.features, expected.features[kept], rtol=1e-4, atol=1e-5)


def test_damaged_features_are_computed_again(fmow_tree, tmp_path, caplog):
    first = extraction(fmow_tree, tmp_path).features("train")
    expected = np.array(first.features)
    (folder,) = tmp_path.iterdir()
    content = bytearray((folder / "features.npy").read_bytes())
    content[128 + 4 * expected.shape[1] * 20] ^= 0xFF
    (folder / "features.npy").write_bytes(content)
    with caplog.at_level(logging.INFO):
        again = extraction(fmow_tree, tmp_path).features("train")
    assert "is damaged: going on behind 16 intact images" in caplog.text
    np.testing.assert_allclose(again.features, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("place", ["/dev/null/cache", "file"])
def test_a_cache_that_cannot_be_written_is_done_without(fmow_tree, tmp_path, caplog, place):
    (tmp_path / "file").write_text("")
    cache = tmp_path / "file/cache" if place == "file" else tmp_path.__class__(place)
    found = extraction(fmow_tree, cache, tmp_path / "spare").features("train")
    assert len(found.labels) == 53
    assert "the features of train are not kept for another time: cannot write" in caplog.text


def test_a_disk_that_fills_up_is_left(fmow_tree, tmp_path, monkeypatch, caplog):
    """What the full disk holds already is not computed again."""
    write, cache = store_module._Appending.write, tmp_path / "cache"

    def full(self, values, checksum):
        if self.array.path.is_relative_to(cache) and self._stream.tell() > 128 + 4 * 2 * 600 * 16:
            raise store_module.write_failure(self.array.path, OSError(28, "No space left on device"), resumable=False)
        return write(self, values, checksum)

    monkeypatch.setattr(store_module._Appending, "write", full)
    with caplog.at_level(logging.INFO):
        found = extraction(fmow_tree, cache, tmp_path / "spare").features("train")
    assert "No space left on device" in caplog.text
    assert "of 53 images are in" in caplog.text
    expected = extraction(fmow_tree, tmp_path / "other").features("train")
    np.testing.assert_allclose(found.features, expected.features, rtol=1e-4, atol=1e-5)


def test_another_process_on_the_same_features_is_waited_for(fmow_tree, tmp_path, caplog):
    made = extraction(fmow_tree, tmp_path)
    folder = tmp_path / f"train-{made._digest('train')}"
    folder.mkdir()
    lock = FolderLock(folder)
    lock.acquire()
    found = []
    with caplog.at_level(logging.INFO):
        worker = threading.Thread(target=lambda: found.append(made.features("train")))
        worker.start()
        worker.join(0.5)
        assert worker.is_alive()
        assert "waiting for features:" in caplog.text
        lock.release()
        worker.join(30)
    assert len(found[0].labels) == 53
