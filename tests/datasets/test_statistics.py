from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from geoexplora.datamodules import FMoWSentinelDataModule
from geoexplora.datasets.fmow_sentinel import FMoWSentinel
from geoexplora.datasets.statistics import band_statistics
from geoexplora.datasets.tiles import Tile
from geoexplora.errors import DataError
from geoexplora.transforms.normalization import Normalization

BANDS = ("B4", "B11")


def test_statistics_are_those_of_all_pixels(fmow_tree: Path) -> None:
    source = FMoWSentinel(fmow_tree, "train", BANDS)
    pixels = np.concatenate([np.asarray(source.read(i).image).reshape(2, -1) for i in range(len(source))], axis=1)
    found = band_statistics(source, BANDS)
    np.testing.assert_allclose(found.mean, pixels.mean(1), rtol=1e-9)
    np.testing.assert_allclose(found.std, pixels.std(1), rtol=1e-9)


def test_datamodule_normalizes_by_its_own_tiles(fmow_tree: Path) -> None:
    own = FMoWSentinelDataModule(fmow_tree, bands=BANDS, normalization="standardize", statistics="dataset")
    source = FMoWSentinel(fmow_tree, "train", BANDS)
    assert own.normalization == Normalization.from_statistics("standardize", band_statistics(source, BANDS))
    reference = FMoWSentinelDataModule(fmow_tree, bands=BANDS, normalization="standardize")
    assert reference.normalization.mean == (1136.26026392, 1732.16362238)


def test_whole_normalization_is_kept(fmow_tree: Path) -> None:
    stored = Normalization("standardize", BANDS, (1.0, 2.0), (3.0, 4.0))
    data = FMoWSentinelDataModule(fmow_tree, bands=BANDS, normalization=stored, statistics="dataset")
    assert data.normalization == stored


def test_flat_band_is_refused(fmow_tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = FMoWSentinel(fmow_tree, "train", BANDS)
    read = source.read

    def flat(index: int) -> Tile:
        tile = read(index)
        image = np.array(tile.image)
        image[1] = 7
        return tile._replace(image=image)

    monkeypatch.setattr(source, "read", flat)
    with pytest.raises(DataError, match="band B11 has the same value"):
        band_statistics(source, BANDS)
