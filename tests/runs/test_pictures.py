"""Pictures of reconstructions and of features."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from numpy.typing import NDArray

from geoexplora.bands import RGB, SENTINEL2
from geoexplora.errors import ConfigError
from geoexplora.runs.pictures import plot_features, plot_reconstruction


def pixels(path: Path) -> NDArray[np.int64]:
    """(H, W, 3), 0-255."""
    return (imread(path)[..., :3] * 255).round().astype(int)


def test_reconstruction(tmp_path: Path) -> None:
    """Bright red, and nothing else, where the fourth band of the product is bright."""
    bands = ("B2", "B3", "B4", "B8")
    images = torch.zeros(2, 4, 16, 16)
    images[:, 2, :, 8:] = 3000
    masked = images.clone()
    masked[:, :, :8] = float("nan")
    plot_reconstruction(tmp_path / "r.png", images, masked, images, bands, SENTINEL2)
    picture = pixels(tmp_path / "r.png")
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


@pytest.mark.parametrize("size", [(16, 16), (16, 32)])
def test_features_are_drawn_in_their_colours_at_the_size_of_the_image(tmp_path: Path, size: tuple[int, int]) -> None:
    """Every colour of every patch covers its share of the area of the input beside it, which is black and white."""
    images = torch.zeros(2, 3, *size)
    images[..., size[1] // 2 :] = 1
    before = torch.tensor([[[[1.0, 0, 0]], [[0, 1, 0]]], [[[0, 0, 1]], [[0, 1, 0]]]]).expand(2, 2, 2, 3)
    after = 1 - before
    plot_features(tmp_path / "f.png", images, before, after, ("R", "G", "B"), RGB)
    picture = pixels(tmp_path / "f.png")
    area = {
        name: int((picture == [int(x) for x in name.split()]).all(-1).sum())
        for name in ("0 0 0", "255 0 0", "0 255 0", "0 0 255", "0 255 255", "255 0 255", "255 255 0")
    }
    assert area["0 0 0"] > 10_000
    for name, count in area.items():
        share = 0.5 if name in {"255 0 0", "0 0 255", "0 255 255", "255 255 0"} else 1.0
        assert count / area["0 0 0"] == pytest.approx(share, abs=0.03), name


def test_features_without_those_before(tmp_path: Path) -> None:
    images, after = torch.rand(3, 3, 8, 8), torch.rand(3, 4, 4, 3)
    plot_features(tmp_path / "two.png", images, None, after, ("R", "G", "B"), RGB)
    plot_features(tmp_path / "three.png", images, after, after, ("R", "G", "B"), RGB)
    two, three = (imread(tmp_path / name).shape for name in ("two.png", "three.png"))
    assert two[0] == three[0]
    assert two[1] / three[1] == pytest.approx(2 / 3, abs=0.01)


def test_the_same_picture_is_the_same_file(tmp_path: Path) -> None:
    images, after = torch.rand(1, 3, 8, 8), torch.rand(1, 4, 4, 3)
    for name in ("a.png", "b.png"):
        plot_features(tmp_path / name, images, None, after, ("R", "G", "B"), RGB)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_refuses(tmp_path: Path) -> None:
    images = torch.ones(1, 3, 8, 8)
    with pytest.raises(ValueError, match="shapes differ"):
        plot_reconstruction(tmp_path / "r.png", images, images, images[:, :2], ("R", "G", "B"), RGB)
    with pytest.raises(ConfigError, match="unknown band"):
        plot_reconstruction(tmp_path / "r.png", images, images, images, ("R", "G", "B"), RGB, shown=("X", "R", "G"))
    for before, after in (
        (None, torch.rand(1, 4, 4)),
        (None, torch.rand(2, 4, 4, 3)),
        (torch.rand(1, 4, 4, 2), torch.rand(1, 4, 4, 3)),
    ):
        with pytest.raises(ValueError, match="shapes differ"):
            plot_features(tmp_path / "f.png", images, before, after, ("R", "G", "B"), RGB)
    with pytest.raises(ValueError, match="2 bands"):
        plot_features(tmp_path / "f.png", images, None, torch.rand(1, 4, 4, 3), ("R", "G"), RGB)
    assert not list(tmp_path.iterdir())
