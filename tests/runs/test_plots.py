from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from geoexplora.bands import RGB, SENTINEL2
from geoexplora.errors import ConfigError
from geoexplora.runs.metrics import Metrics
from geoexplora.runs.plots import colour_bands, plot_loss, plot_reconstruction


@pytest.mark.parametrize(("rows", "knn"), [(1, False), (10, False), (200, True)])
def test_loss(tmp_path: Path, rows: int, knn: bool) -> None:
    metrics = Metrics(tmp_path / "metrics.csv")
    for step in range(rows):
        metrics.append({"step": step, "loss": math.exp(-step / 9)} | ({"knn_accuracy": 0.5} if knn else {}))
    target = tmp_path / "plots" / "loss.png"
    assert plot_loss(metrics.path, target)
    picture = imread(target)
    assert picture.shape[1] > 600
    assert (picture.shape[0] > 600) == knn
    assert picture[..., :3].std() > 0.01
    assert list(target.parent.iterdir()) == [target]


def test_no_loss_yet(tmp_path: Path) -> None:
    Metrics(tmp_path / "metrics.csv").append({"step": 0, "knn_accuracy": 0.5})
    assert not plot_loss(tmp_path / "metrics.csv", tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()


def test_reconstruction(tmp_path: Path) -> None:
    """Bright red, and nothing else, where the fourth band of the product is bright."""
    bands = ("B2", "B3", "B4", "B8")
    images = torch.zeros(2, 4, 16, 16)
    images[:, 2, :, 8:] = 3000
    masked = images.clone()
    masked[:, :, :8] = float("nan")
    plot_reconstruction(tmp_path / "r.png", images, masked, images, bands, SENTINEL2)
    picture = (imread(tmp_path / "r.png")[..., :3] * 255).round().astype(int)
    red = (picture == [255, 0, 0]).all(-1).sum()
    black = (picture == [0, 0, 0]).all(-1).sum()
    grey = (np.abs(picture - 128) <= 1).all(-1).sum()
    area = red + black + grey
    assert red / area == pytest.approx(2.5 / 6, abs=0.02)
    assert grey / area == pytest.approx(1 / 6, abs=0.02)


def test_constant_and_nan_images(tmp_path: Path) -> None:
    images = torch.ones(1, 3, 8, 8)
    plot_reconstruction(tmp_path / "r.png", images, images * float("nan"), images, ("R", "G", "B"), RGB)
    assert (tmp_path / "r.png").stat().st_size > 1000


def test_which_bands_are_shown() -> None:
    assert colour_bands(("B2", "B3", "B4", "B8"), SENTINEL2) == (("B4", "B3", "B2"), "true colour")
    assert colour_bands(("R", "G", "B"), RGB) == (("R", "G", "B"), "true colour")
    assert colour_bands(("B11", "B5", "B12"), SENTINEL2)[0] == ("B12", "B11", "B5")
    assert colour_bands(("B8",), SENTINEL2)[0] == ("B8", "B8", "B8")


def test_refuses(tmp_path: Path) -> None:
    images = torch.ones(1, 3, 8, 8)
    with pytest.raises(ValueError, match="shapes differ"):
        plot_reconstruction(tmp_path / "r.png", images, images, images[:, :2], ("R", "G", "B"), RGB)
    with pytest.raises(ConfigError, match="unknown band"):
        plot_reconstruction(tmp_path / "r.png", images, images, images, ("R", "G", "B"), RGB, shown=("X", "R", "G"))
