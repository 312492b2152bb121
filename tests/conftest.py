"""Fixtures that several folders share: small trees cut from the bundled sample."""

from __future__ import annotations

import shutil
from pathlib import Path

# First: typing keeps the order in which a union was first named, and jsonargparse reads 1 by it. With "float, int" from
# elsewhere in its cache, the Trainer's "int, float" would take limit_train_batches: 1 for 1.0, all batches.
import lightning.pytorch  # noqa: F401
import pytest

from geoexplora.datasets.sample_tree import write_fmow_tree


@pytest.fixture(scope="session")
def fmow_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A labelled fMoW-Sentinel tree of at most 3 tiles of 16 px a class and block: all splits. Read only."""
    return write_fmow_tree(tmp_path_factory.mktemp("fmow") / "data", tile_size=16, limit=3)


@pytest.fixture(scope="session")
def unlabelled_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unlabelled tree of tiles of 20 to 40 px, 6 a block: train.csv only. Read only."""
    return write_fmow_tree(tmp_path_factory.mktemp("unlabelled") / "data", (20, 40), labelled=False, limit=6)


@pytest.fixture
def own_tree(fmow_tree: Path, tmp_path: Path) -> Path:
    """A copy of the labelled tree that a test may damage."""
    return shutil.copytree(fmow_tree, tmp_path / "own")
