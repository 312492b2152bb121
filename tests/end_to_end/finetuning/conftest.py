"""Fixtures of the fine-tunings from the command line."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from .helpers import Kind, made_up_datasets, refuse, write_all_kinds


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The made-up datasets have names."""
    made_up_datasets(monkeypatch)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, Kind], Path]:
    """Made-up datasets by sensor and kind of target. Read only."""
    return write_all_kinds(tmp_path_factory.mktemp("made_up"))


@pytest.fixture
def classes(data: dict[tuple[str, Kind], Path]) -> Path:
    """The made-up dataset of Sentinel-2 with a class for each image. Read only."""
    return data["sentinel-2", "class"]


@pytest.fixture
def refused(explora_run: Path, tmp_path: Path) -> Callable[..., str]:
    """The message of a fine-tuning that is refused."""
    return partial(refuse, tmp_path / "refused", explora_run)
