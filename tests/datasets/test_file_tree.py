"""FileTree: all files under a folder, links followed, what this package writes left out."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from geoexplora.datasets.file_tree import FileTree


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("a/1.npy", "a/b/2.npy", "c.csv"):
        file = tmp_path / "data" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(name)
        os.utime(file, ns=(0, 0))
    return tmp_path / "data"


def state(root: Path) -> bytes:
    return FileTree(root).state


@pytest.mark.parametrize("change", ["size", "time", "name", "gone", "new", "place"])
def test_the_files_and_where_they_lie(root: Path, change: str) -> None:
    before, file = state(root), root / "a/b/2.npy"
    assert state(root) == before
    if change == "size":
        file.write_text("longer than before")
        os.utime(file, ns=(0, 0))
    elif change == "time":
        os.utime(file, ns=(0, 1))
    elif change == "name":
        file.rename(file.with_name("3.npy"))
    elif change == "gone":
        file.unlink()
    elif change == "new":
        file.with_name("3.npy").touch()
    else:
        root = root.rename(root.with_name("other"))
    assert state(root) != before


@pytest.mark.parametrize("folder", [".", "probe", "a/probe"])
def test_features_and_results_do_not_count(root: Path, folder: str) -> None:
    """Neither those that are whole nor those of a probe that was killed."""
    before = state(root)
    features = root / folder / "features/train-0123456789abcdef"
    features.mkdir(parents=True)
    for names in ((".lock",), ("features.npy", "labels.npy"), ("progress.json", ".progress.json.tmp")):
        for name in names:
            (features / name).touch()
        assert state(root) == before, names
    for name in ("probe.json", "per_class.csv", "confusion.png"):
        (root / folder / name).touch()
        assert state(root) == before, name


def test_runs_do_not_count(root: Path) -> None:
    before = state(root)
    (root / "runs/a/checkpoints").mkdir(parents=True)
    for name in ("run.json", "metrics.csv", "checkpoints/last.ckpt"):
        (root / "runs/a" / name).touch()
    assert state(root) == before
    (root / "run.json").touch()
    (root / "new.npy").touch()
    assert state(root) != before, "the root itself is data, whatever lies in it"


def test_links_are_followed_and_not_in_circles(root: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "image.npy").touch()
    (root / "images").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(root)
    (root / "a/itself").symlink_to(root / "a/itself")
    (root / "nowhere").symlink_to(tmp_path / "nowhere")
    before = state(root)
    assert state(root) == before
    os.utime(elsewhere / "image.npy", ns=(0, 1))
    assert state(root) != before


def test_it_is_read_once(root: Path) -> None:
    tree = FileTree(root)
    before = tree.state
    (root / "new.npy").touch()
    assert tree.state == before != state(root)
