"""The bundled sample as a source of tiles."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt

from geoexplora.bands import SENTINEL2
from geoexplora.datasets import SampleTiles, sample
from geoexplora.datasets.sample_dataset import COUNT, area_splits
from geoexplora.errors import ConfigError, DataError

ALL = range(COUNT)


def test_mask_is_where_the_polygons_lie() -> None:
    mask = sample.class_mask()
    assert (mask.shape, mask.dtype) == ((768, 1536), np.uint8)
    assert set(np.unique(mask)) == {0, 1, 2, 3, 4, sample.IGNORE}
    for number, name in enumerate(sample.CLASSES):
        alone = sample.class_mask([name])
        assert set(np.unique(alone)) == {0, sample.IGNORE}
        assert (alone[mask == number] == 0).mean() > 0.95, "but for what smaller polygons cover"
    with pytest.raises(ConfigError, match="no land use desert"):
        sample.class_mask(["desert"])


def test_labels_are_those_of_the_tiles_classes() -> None:
    tiles = SampleTiles("class", ALL)
    expected = sample.labelled_tiles(16)
    assert (tiles.target, tiles.classes, tiles.sensor) == ("class", sample.CLASSES, SENTINEL2)
    np.testing.assert_array_equal(tiles.labels, expected.labels)
    np.testing.assert_array_equal(tiles.location_ids, expected.blocks)
    assert len(set(tiles.image_ids.tolist())) == len(tiles)
    images = expected.images()
    mask = sample.class_mask()
    for index in (0, 17, len(tiles) - 1):
        tile = tiles.read(index)
        np.testing.assert_array_equal(tile.image, images[index])
        assert (tile.target, tile.unreadable) == (int(expected.labels[index]), -1)
        top, left, height, width = expected.windows[index]
        assert (mask[top : top + height, left : left + width] == tile.target).mean() >= 0.5
        assert str(tiles.path(index)) == f"tile of the sample at row {top}, column {left}"
    assert tiles.read(-1).target == tiles.labels[-1]
    with pytest.raises(IndexError):
        tiles.read(len(tiles))


@pytest.mark.parametrize("size", [16, 40])
def test_masks_cover_all_known_land_use(size: int) -> None:
    tiles = SampleTiles("mask", ALL, tile_size=size)
    assert (tiles.target, tiles.classes) == ("mask", sample.CLASSES)
    assert set(tiles.labels.tolist()) == {-1}
    mask, known = sample.class_mask(), 0
    for index in range(len(tiles)):
        tile = tiles.read(index)
        assert isinstance(tile.target, np.ndarray)
        assert tile.target.shape == tile.image.shape[1:] == (size, size)
        top, left = divmod(int(tiles.image_ids[index]), 1536)
        np.testing.assert_array_equal(tile.target, mask[top : top + size, left : left + size])
        known += (found := int((tile.target != sample.IGNORE).sum()))
        assert found > 0
    reachable = mask.reshape(2, 384, 4, 384)[:, : 384 // size * size, :, : 384 // size * size]
    assert known == (reachable != sample.IGNORE).sum()


def test_without_targets_it_is_the_whole_scene() -> None:
    tiles = SampleTiles("none", ALL, ("B8A", "red"), 48)
    assert (tiles.target, tiles.classes, tiles.bands) == ("none", (), ("B8A", "B4"))
    assert len(tiles) == 768 * 1536 // 48**2
    tile = tiles.read(5)
    assert tile.target is None
    top, left = divmod(int(tiles.image_ids[5]), 1536)
    scene = sample.read_scene().image[[8, 3], top : top + 48, left : left + 48]
    np.testing.assert_array_equal(tile.image, scene)
    assert set(tiles[5]) == {"image"}


@pytest.mark.parametrize("target", ["class", "mask"])
def test_samples_in_torchgeos_style(target: Any) -> None:
    tiles = SampleTiles(target, (5,), tile_size=24, transforms=lambda found: found | {"seen": True})
    found = tiles[3]
    assert found["seen"]
    assert (found["image"].shape, found["image"].dtype) == ((13, 24, 24), torch.float32)
    target_found = found["mask" if target == "mask" else "label"]
    assert target_found.dtype == torch.int64
    np.testing.assert_array_equal(target_found.numpy(), np.asarray(tiles.read(3).target))
    figure = tiles.plot(found)
    assert figure.axes[0].get_title() == ("" if target == "mask" else sample.CLASSES[int(target_found)])
    plt.close(figure)


@pytest.mark.parametrize("fold", ALL)
def test_areas_of_the_splits(fold: int) -> None:
    splits = area_splits(fold)
    assert splits["test_gt"] == (fold,)
    assert sorted(block for blocks in splits.values() for block in blocks) == list(ALL)
    tiles = sample.labelled_tiles()

    def rarest(val: tuple[int, ...]) -> int:
        """How many tiles the rarest class has, in the blocks to validate on or to learn from."""
        train = [block for block in ALL if block not in (fold, *val)]
        parts = (tiles.labels[np.isin(tiles.blocks, part)].tolist() for part in (val, train))
        return min(part.count(label) for part in parts for label in range(len(sample.CLASSES)))

    pairs = [pair for pair in combinations(ALL, 2) if fold not in pair]
    assert rarest(splits["val"]) == max(rarest(pair) for pair in pairs) > 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"target": "boxes"}, ConfigError, "the sample has no target 'boxes'\nKnown: none, class, mask"),
        ({"tile_size": 400}, ConfigError, "tile size of 400 does not fit"),
        ({"tile_size": 0}, ConfigError, "tile size of 0 does not fit"),
        ({"bands": ("B99",)}, ConfigError, "unknown band"),
        ({"tile_size": 384, "blocks": (0,)}, DataError, "no tile of 384 px with known land use .* area blocks 0\nTake"),
    ],
)
def test_bad_input(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SampleTiles(**({"target": "class", "blocks": ALL} | options))


@pytest.mark.parametrize("fold", [-1, 8])
def test_a_fold_that_is_not_there(fold: int) -> None:
    with pytest.raises(ConfigError, match=f"the sample has no fold {fold}\nIts area blocks are 0 to 7"):
        area_splits(fold)
