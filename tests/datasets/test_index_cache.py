"""The index beside a tree: used, made anew, done without."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from geoexplora.datasets.index_cache import cached, folder_times, signature


class Builder:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> dict[str, np.ndarray[Any, Any]]:
        self.calls += 1
        return {"paths": np.array([b"a", b"bcd"]), "numbers": np.arange(3), "none": np.array([], dtype="S1")}


def test_built_once_for_a_state(tmp_path: Path) -> None:
    file, build = tmp_path / "index.npz", Builder()
    first = cached(file, "one", build)
    second = cached(file, "one", build)
    assert build.calls == 1
    assert first.keys() == second.keys() == {"paths", "numbers", "none"}
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])
        assert first[name].dtype == second[name].dtype
    cached(file, "two", build)
    assert build.calls == 2
    assert [path.name for path in tmp_path.iterdir()] == ["index.npz"]


@pytest.mark.parametrize("content", [b"", b"junk", b"PK\3\4junk", "cut"])
def test_a_damaged_file_is_replaced(tmp_path: Path, content: bytes | str) -> None:
    file, build = tmp_path / "index.npz", Builder()
    cached(file, "one", build)
    file.write_bytes(file.read_bytes()[:300] if isinstance(content, str) else content)
    cached(file, "one", build)
    assert build.calls == 2
    cached(file, "one", build)
    assert build.calls == 2


def test_a_file_of_objects_is_not_trusted(tmp_path: Path) -> None:
    file, build = tmp_path / "index.npz", Builder()
    np.savez(file, signature=np.array("one"), paths=np.array([{}], dtype=object))
    assert cached(file, "one", build)["paths"].dtype == "S3"
    assert build.calls == 1


def test_without_a_place_to_keep_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()  # in its stead a folder would be needed: root may write anywhere else
    build = Builder()
    with caplog.at_level(logging.INFO):
        arrays = cached(tmp_path / "file" / "index.npz", "one", build)
    assert arrays["numbers"].tolist() == [0, 1, 2]
    assert "the next start reads all files again" in caplog.text


def test_times_of_folders(tmp_path: Path) -> None:
    place = tmp_path / "train" / "farm" / "farm_0"
    place.mkdir(parents=True)
    (place / "deeper").mkdir()
    names = [name for name, _ in folder_times(tmp_path / "train", 2)]
    assert names == ["train", "train/farm", "train/farm/farm_0"]
    states = [signature(folder_times(tmp_path / "train", 2))]
    assert states[0] == signature(folder_times(tmp_path / "train", 2))

    def changed(folder: Path) -> bool:
        # Clocks of file systems may stand still for some milliseconds.
        os.utime(folder, ns=(0, folder.stat().st_mtime_ns + 10**9))
        states.append(signature(folder_times(tmp_path / "train", 2)))
        return states[-1] not in states[:-1]

    assert changed(place)
    assert changed(place.parent)
    assert changed(tmp_path / "train")
    assert not changed(place / "deeper")
