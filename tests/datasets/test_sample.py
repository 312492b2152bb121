"""The bundled sample."""

from __future__ import annotations

from pathlib import Path

import geopandas
import numpy as np
import pandas as pd
import pytest
import rasterio
from shapely import from_wkt
from shapely.geometry import box

from geoexplora.bands import SENTINEL2
from geoexplora.datasets import sample
from geoexplora.datasets.sample_tree import AREA_SPLITS, write_fmow_tree
from geoexplora.errors import ConfigError, DataError


def test_scene() -> None:
    image, transform, crs = sample.read_scene()
    assert image.shape == (13, 768, 1536)
    assert image.dtype == np.uint16
    assert (image.mean(axis=(1, 2)) > 1).all()
    assert (transform.c, transform.f, transform.a, transform.e) == (330000, 5822040, 10, -10)
    assert crs.to_epsg() == 32633
    # Coarse bands keep their measured values.
    with rasterio.open(sample.folder() / "T33UUU_20170216T102101_B11.jp2") as file:
        np.testing.assert_array_equal(image[11, ::2, ::2], file.read(1))


def test_attribution_stays_beside_the_files() -> None:
    text = (sample.folder().parent / "ATTRIBUTION.md").read_text()
    assert "modified Copernicus Sentinel data 2017" in text
    assert "OpenStreetMap contributors" in text
    assert "ODbL" in text


def test_unlabelled_tiles_cover_the_scene() -> None:
    tiles = sample.unlabelled_tiles(16)
    assert len(tiles) == 48 * 96
    assert (tiles.labels == -1).all()
    corners = {(int(top), int(left)) for top, left, _, _ in tiles.windows}
    assert corners == {(top, left) for top in range(0, 768, 16) for left in range(0, 1536, 16)}
    assert len(sample.unlabelled_tiles(64, stride=32)) == 8 * 11 * 11


@pytest.mark.parametrize("size", [16, 20, (10, 30)])
def test_tiles_keep_within_their_block(size: int | tuple[int, int]) -> None:
    tiles = sample.unlabelled_tiles(size)
    top, left, height, width = tiles.windows.T
    assert ((top // 384) * 4 + left // 384 == tiles.blocks).all()
    assert (((top + height - 1) // 384) * 4 + (left + width - 1) // 384 == tiles.blocks).all()
    if not isinstance(size, int):
        assert set(np.unique([height, width])) == set(range(10, 31))
        again = sample.unlabelled_tiles(size)
        np.testing.assert_array_equal(tiles.windows, again.windows)


def test_labelled_tiles_lie_in_their_class() -> None:
    tiles = sample.labelled_tiles()
    assert 1000 < len(tiles) < 1100
    polygons = geopandas.read_file(sample.folder() / "landuse.gpkg").to_crs(32633)
    unions = {name: polygons[polygons["fclass"] == name].union_all() for name in tiles.classes}
    for row in range(0, len(tiles), 25):
        top, left, height, width = tiles.windows[row]
        west, north = 330000 + left * 10, 5822040 - top * 10
        window = box(west, north - height * 10, west + width * 10, north)
        covered = window.intersection(unions[tiles.classes[tiles.labels[row]]]).area / window.area
        # Pixels count or do not: the polygons' edges make a small difference.
        assert covered > 0.45
    assert all(image.shape == (13, 16, 16) for image in tiles.images())


def test_stricter_shares_keep_fewer_tiles() -> None:
    counts = [len(sample.labelled_tiles(min_share=share)) for share in (0.3, 0.5, 0.9)]
    assert counts == sorted(counts, reverse=True)
    assert len(set(counts)) == 3


def test_impossible_tiles_are_refused() -> None:
    with pytest.raises(ConfigError, match="tile size of 400"):
        sample.unlabelled_tiles(400)
    with pytest.raises(ConfigError, match="stride of 0"):
        sample.unlabelled_tiles(16, stride=0)
    with pytest.raises(ConfigError, match=r"no land use lava\nIt has: .*forest"):
        sample.labelled_tiles(classes=("forest", "lava"))


def test_tree_is_a_true_one(fmow_tree: Path) -> None:
    scene = sample.read_scene()
    seen = set()
    for split, blocks in AREA_SPLITS.items():
        frame = pd.read_csv(fmow_tree / f"{split}.csv")
        assert list(frame.columns) == ["Unnamed: 0", "category", "location_id", "image_id", "timestamp", "polygon"]
        assert set(frame["location_id"]) == set(blocks)
        assert set(frame["category"]) == set(sample.CLASSES)
        assert set(frame["timestamp"]) == {"2017-02-16T10:21:01Z"}
        for row in frame.itertuples():
            place = f"{row.category}_{row.location_id}"
            path = fmow_tree / "fmow-sentinel" / split / row.category / place / f"{place}_{row.image_id}.tif"
            seen.add(path)
            with rasterio.open(path) as file:
                left, top = round((file.bounds.left - 330000) / 10), round((5822040 - file.bounds.top) / 10)
                assert file.crs == scene.crs
                assert file.dtypes == ("uint16",) * len(SENTINEL2.bands)
                expected = scene.image[:, top : top + file.height, left : left + file.width]
                np.testing.assert_array_equal(file.read(), expected)
            west, south, east, north = from_wkt(row.polygon).bounds
            assert 12.4 < west < east < 12.8
            assert 52.4 < south < north < 52.6
    assert seen == set(fmow_tree.rglob("*.tif"))


def test_tree_is_not_written_over_another(fmow_tree: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="exists already"):
        write_fmow_tree(fmow_tree)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be written"):
        write_fmow_tree(tmp_path / "file", limit=1)
