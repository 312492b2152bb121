"""Features on disk: whole, resumed, damaged, unwritable."""

from __future__ import annotations

import errno
import json

import numpy as np
import pytest
import torch

from geoexplora.errors import RunError, WeightsError
from geoexplora.tasks.features import FeatureBatch
from geoexplora.tasks.probe import store as module
from geoexplora.tasks.probe.store import FeatureStore

IMAGES, WIDTH, BATCH = 23, 3, 5
FEATURES = np.random.default_rng(0).standard_normal((IMAGES, WIDTH)).astype(np.float32)
LABELS = np.arange(IMAGES) % 4
KEPT = np.arange(IMAGES) % 7 != 3


@pytest.fixture(autouse=True)
def every_batch_is_recorded(monkeypatch):
    monkeypatch.setattr(module, "RECORD_SECONDS", -1.0)


@pytest.fixture
def folder(tmp_path):
    target = tmp_path / "train-0123"
    target.mkdir()
    return target


def batches(start=0, stop_at=None):
    """Of the images from ``start`` on; the process is killed when image ``stop_at`` is next."""
    for first in range(start, IMAGES, BATCH):
        if stop_at is not None and first >= stop_at:
            raise KeyboardInterrupt
        part = slice(first, min(first + BATCH, IMAGES))
        kept = torch.from_numpy(KEPT[part])
        yield FeatureBatch(torch.from_numpy(FEATURES[part])[kept], torch.from_numpy(LABELS[part])[kept], kept)


def opened(folder, dtype=np.float32):
    return FeatureStore(folder, IMAGES, WIDTH, dtype)


def filled(folder, dtype=np.float32):
    store = opened(folder, dtype)
    assert not store.verify()
    store.extend(batches(store.done))
    return store


def check(store, dtype=np.float32):
    assert store.verify()
    found = store.read()
    assert found.features.dtype == dtype
    np.testing.assert_array_equal(found.features, FEATURES[KEPT].astype(dtype))
    assert found.indices.tolist() == np.flatnonzero(KEPT).tolist()
    assert found.labels.tolist() == LABELS[KEPT].tolist()


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_written_and_read(folder, dtype):
    filled(folder, dtype)
    store = opened(folder, dtype)
    assert store.looks_complete
    check(store, dtype)
    np.testing.assert_array_equal(np.load(folder / "features.npy"), FEATURES[KEPT].astype(dtype))


@pytest.mark.parametrize("killed", [5, 10, 20])
def test_a_killed_extraction_goes_on(folder, killed):
    with pytest.raises(KeyboardInterrupt):
        filled_until(folder, killed)
    store = opened(folder)
    assert not store.looks_complete
    assert not store.verify()
    assert store.done == killed
    assert not store.damaged
    store.extend(batches(killed))
    check(opened(folder))


def filled_until(folder, killed):
    store = opened(folder)
    store.verify()
    store.extend(batches(0, killed))


def test_what_was_written_after_the_last_record_is_cut_off(folder):
    """A kill between writing and recording leaves rows that nobody vouches for."""
    with pytest.raises(KeyboardInterrupt):
        filled_until(folder, 10)
    for name in ("features.npy", "labels.npy"):
        with (folder / name).open("ab") as stream:
            stream.write(b"\x17" * 1000)
    store = opened(folder)
    assert not store.verify()
    store.extend(batches(store.done))
    check(opened(folder))


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "damage", "intact"),
    [
        ("features.npy", lambda path: flip(path, 128 + 4 * WIDTH * 10), 10),
        ("features.npy", lambda path: path.write_bytes(path.read_bytes()[:-30]), 20),
        ("features.npy", lambda path: path.unlink(), 0),
        ("features.npy", lambda path: flip(path, 3), 23),
        ("labels.npy", lambda path: flip(path, 128 + 16 * 5), 5),
        ("labels.npy", lambda path: path.write_bytes(b""), 0),
        ("progress.json", lambda path: path.write_text("{"), 0),
        ("progress.json", lambda path: path.write_text('{"chunks": [[5, 4, 1]]}'), 0),
        ("progress.json", lambda path: path.write_text('{"chunks": [[-5, -4, 0, 0]]}'), 0),
    ],
)
def test_damage_is_found_and_mended(folder, name, damage, intact):
    filled(folder)
    damage(folder / name)
    store = opened(folder)
    assert not store.verify()
    assert store.done == intact
    assert store.damaged == (intact < IMAGES)
    store.extend(batches(intact))
    check(opened(folder))


def test_features_of_another_width_are_not_taken(folder):
    filled(folder)
    other = FeatureStore(folder, IMAGES, WIDTH + 1, np.float32)
    assert not other.verify()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e6])
def test_features_that_are_not_finite_are_refused(folder, bad):
    store = opened(folder, np.float16)
    store.verify()
    broken = FeatureBatch(torch.full((2, WIDTH), bad), torch.zeros(2), torch.ones(2, dtype=torch.bool))
    with pytest.raises(WeightsError, match="the encoder's features are not finite"):
        store.extend([broken])


def test_a_full_disk_says_so_and_keeps_what_is_there(folder, monkeypatch):
    def full(*words):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(KeyboardInterrupt):
        filled_until(folder, 10)
    monkeypatch.setattr(module.os, "fsync", full)
    store = opened(folder)
    store.verify()
    with pytest.raises(RunError, match=r"cannot write .*features\.npy: No space left on device"):
        store.extend(batches(store.done))
    monkeypatch.undo()
    store = opened(folder)
    assert not store.verify()
    assert store.done == 10


def test_chunks_are_recorded_now_and_then(folder, monkeypatch):
    monkeypatch.setattr(module, "RECORD_SECONDS", 1000.0)
    filled(folder)
    assert len(json.loads((folder / "progress.json").read_text())["chunks"]) == 1
    check(opened(folder))
