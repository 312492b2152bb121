"""The natural photographs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from sklearn.datasets import load_sample_image

from geoexplora.datasets.photographs import GREY, NAMES, Photographs, load_photographs
from geoexplora.errors import ConfigError


def test_photographs_are_colour_and_differ() -> None:
    photographs = load_photographs()
    assert len(photographs) == len(NAMES)
    for name, photograph in zip(NAMES, photographs, strict=True):
        assert photograph.dtype == np.uint8
        assert photograph.shape[0] == 3
        assert min(photograph.shape[1:]) >= 300
        assert ((photograph[0] != photograph[2]).mean() > 0.5) == (name not in GREY)
    np.testing.assert_array_equal(photographs[NAMES.index("china")].transpose(1, 2, 0), load_sample_image("china.jpg"))


def test_samples() -> None:
    dataset = Photographs(length=20)
    assert len(dataset) == 20
    assert set(dataset[0]) == {"image", "unreadable"}
    assert dataset[0]["image"].dtype == torch.float32
    assert torch.equal(dataset[1]["image"], dataset[1 + len(NAMES)]["image"])
    with pytest.raises(IndexError):
        dataset[20]
    with pytest.raises(ConfigError, match="length of 0"):
        Photographs(length=0)


def test_bands_by_name() -> None:
    assert torch.equal(Photographs(bands=("blue", "R"))[0]["image"], Photographs()[0]["image"][[2, 0]])
    with pytest.raises(ConfigError, match="unknown band 'nir'"):
        Photographs(bands=("nir",))


def test_plot() -> None:
    figure = Photographs().plot(Photographs()[2])
    assert np.asarray(figure.axes[0].images[0].get_array()).shape == (400, 600, 3)
    plt.close(figure)


def test_a_photograph_is_named_in_messages() -> None:
    photographs = Photographs(length=40)
    assert str(photographs.path(0)) == NAMES[0]
    assert str(photographs.path(-1)) == NAMES[39 % len(NAMES)]
    assert (photographs.target, photographs.classes) == ("none", ())
