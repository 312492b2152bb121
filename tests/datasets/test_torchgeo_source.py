"""TorchGeo's datasets as sources of tiles: bands by name, what cannot be read, what cannot be opened."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchgeo.datasets
from PIL import Image
from torch import Tensor
from torchgeo.datasets import SSL4EOL, BigEarthNet, NonGeoDataset

from geoexplora.bands import LANDSAT_ETM, LANDSAT_OLI, LANDSAT_TM, RGB, SENSORS, SENTINEL1, SENTINEL2, Sensor
from geoexplora.datasets import torchgeo_opening
from geoexplora.datasets.torchgeo_opening import find_class, find_splits, open_torchgeo
from geoexplora.datasets.torchgeo_source import TorchGeoTiles
from geoexplora.errors import ConfigError, DataError
from geoexplora.registry import find_dataset, torchgeo_names
from geoexplora.torchgeo_facts import FACTS

from .torchgeo_trees import (
    CLASSES,
    EUROSAT_ON_DISK,
    TRAIN,
    VAL,
    files,
    photograph,
    spectrum,
    write_bigearthnet,
    write_eurosat,
    write_geotiff,
    write_resisc45,
    write_ssl4eo_l,
    write_ucmerced,
)


def opened(name: str, root: Path, split: str = "train", **options: Any) -> TorchGeoTiles:
    return TorchGeoTiles(open_torchgeo(find_class(name), root, split), **options)


class InMemory(NonGeoDataset):
    """Samples that a test makes up; attributes as given."""

    def __init__(self, samples: list[dict[str, Any]], **attributes: Any) -> None:
        self.given = samples
        vars(self).update(attributes)

    def __len__(self) -> int:
        return len(self.given)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.given[index]


def images(count: int, channels: int, seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"image": torch.rand(channels, 6, 7, generator=generator)} for _ in range(count)]


def test_resisc45(tmp_path: Path) -> None:
    tiles = opened("RESISC45", write_resisc45(tmp_path))
    assert (tiles.sensor, tiles.bands, tiles.classes) == (RGB, ("R", "G", "B"), CLASSES)
    assert len(tiles) == len(CLASSES) * TRAIN
    assert tiles.labels.tolist() == [0] * TRAIN + [1] * TRAIN
    assert len(set(tiles.image_ids.tolist())) == len(tiles)
    for index in range(len(tiles)):
        tile = tiles.read(index)
        pixels = np.asarray(Image.open(tiles.path(index)))
        np.testing.assert_array_equal(tile.image, pixels.transpose(2, 0, 1))
        assert (tile.target, tile.unreadable) == (int(tiles.labels[index]), -1)
        assert tiles.path(index).parent.name == CLASSES[index // TRAIN]
    assert tiles.read(-1).target == 1
    with pytest.raises(IndexError):
        tiles.read(len(tiles))
    validation = opened("RESISC45", tmp_path, "val")
    assert len(validation) == len(CLASSES) * VAL
    assert not set(validation.image_ids.tolist()) & set(tiles.image_ids.tolist())


@pytest.mark.parametrize("bands", [("B", "G", "R"), ("G",), ("red", "blue")])
def test_bands_of_photographs(tmp_path: Path, bands: tuple[str, ...]) -> None:
    tiles = opened("UCMerced", write_ucmerced(tmp_path), bands=bands)
    whole = opened("UCMerced", tmp_path)
    assert tiles.bands == RGB.select(bands)
    np.testing.assert_array_equal(tiles.read(3).image, whole.read(3).image[list(RGB.indices(bands))])


@pytest.mark.parametrize("bands", [None, ("B8A",), ("B12", "B8A", "B2"), ("nir", "B8A", "B01")])
def test_eurosat_bands_are_matched_by_name(tmp_path: Path, bands: tuple[str, ...] | None) -> None:
    tiles = opened("EuroSAT", write_eurosat(tmp_path), bands=bands)
    assert tiles.sensor == SENTINEL2
    assert tiles.bands == (SENTINEL2.band_names if bands is None else SENTINEL2.select(bands))
    for index in range(len(tiles)):
        raw = spectrum(100 * (index // TRAIN) + index % TRAIN)
        expected = np.stack([raw[EUROSAT_ON_DISK.index(band)] for band in tiles.bands])
        np.testing.assert_array_equal(tiles.read(index).image, expected)


def test_class_folders_of_ones_own(tmp_path: Path) -> None:
    for name in CLASSES:
        (tmp_path / name).mkdir()
        Image.fromarray(photograph(1)[..., 0]).save(tmp_path / name / "grey.png")
    tiles = opened("NonGeoClassificationDataset", tmp_path)
    assert (len(tiles), tiles.sensor, tiles.classes) == (2, RGB, CLASSES)
    assert (tiles.read(0).image[0] == tiles.read(0).image[2]).all()


@pytest.mark.parametrize(
    ("names", "sensor", "given"),
    [
        (("VV", "VH"), SENTINEL1, None),
        (("B02", "B03", "B04", "B8A"), SENTINEL2, None),
        (("B1", "B2", "B3"), LANDSAT_OLI, LANDSAT_OLI),
        (("S2_B04", "S1_B1", "S2_B02"), SENTINEL2, SENTINEL2),
    ],
)
@pytest.mark.parametrize("attribute", ["bands", "all_band_names", "all_bands"])
def test_sensor_follows_from_the_names(names: tuple[str, ...], sensor: Any, given: Any, attribute: str) -> None:
    dataset = InMemory(images(3, len(names)), **{attribute: names})
    tiles = TorchGeoTiles(dataset, sensor=given)
    assert tiles.sensor == sensor
    for position, band in enumerate(tiles.bands):
        on_disk = next(i for i, name in enumerate(names) if name.replace("0", "").removeprefix("S2_") == band)
        np.testing.assert_array_equal(tiles.read(1).image[position], dataset[1]["image"][on_disk].numpy())
    assert list(tiles.bands) == sorted(tiles.bands, key=sensor.band_names.index)


def test_facts_agree_with_torchgeo() -> None:
    assert set(FACTS) <= set(torchgeo_names())
    for name, facts in FACTS.items():
        assert issubclass(find_class(name), NonGeoDataset)
        assert not (facts.all_bands and facts.bands)
        for images in (facts, *facts.variants.values()):
            assert images.sensor in SENSORS.values()
            assert {len(images.scale), len(images.offset)} <= {1, len(images.bands)}
    assert FACTS["SeasonalContrastS2"].arguments["bands"] == torchgeo.datasets.SeasonalContrastS2.all_bands


@pytest.mark.parametrize(
    ("split", "sensor", "white"),
    [
        ("tm_toa", LANDSAT_TM, 0.4),
        ("etm_toa", LANDSAT_ETM, 0.4),
        ("etm_sr", LANDSAT_ETM, 0.3),
        ("oli_tirs_toa", LANDSAT_OLI, 0.4),
        ("oli_sr", LANDSAT_OLI, 0.3),
    ],
)
def test_each_split_of_ssl4eo_l_is_of_its_own_sensor(tmp_path: Path, split: Any, sensor: Sensor, white: float) -> None:
    tiles = TorchGeoTiles(SSL4EOL(write_ssl4eo_l(tmp_path, split), split))
    told = SSL4EOL.metadata[split]
    assert tiles.sensor == sensor
    assert tuple(band.partition("_")[0] for band in tiles.bands) == told["all_bands"]
    assert [tiles.bands[at] for at in told["rgb_bands"]] == list(sensor.select(("red", "green", "blue")))
    for position, band in enumerate(tiles.bands):
        level = 20 * (position + 1) / 255  # of 8 bits; from -25 to 45 degrees Celsius where it is thermal
        expected = 248.15 + 70 * level if sensor.band(band).common_name.startswith("lwir") else white * level
        np.testing.assert_allclose(tiles.read(1).image[position], expected, rtol=1e-6)


def test_polarizations_of_bigearthnet_in_the_order_of_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BigEarthNet, "image_size", (12, 12))
    root = write_bigearthnet(tmp_path)
    radar = TorchGeoTiles(BigEarthNet(root, bands="s1", checksum=False))
    assert (radar.sensor, radar.bands) == (SENTINEL1, ("VV", "VH"))
    both = BigEarthNet(root, bands="all", checksum=False)
    for tiles in (radar, TorchGeoTiles(both, sensor=SENTINEL1)):
        assert tiles.read(0).image[:, 5, 5].tolist() == [-10, -20]
    optical = TorchGeoTiles(both)
    assert optical.sensor == SENTINEL2
    assert (optical.read(0).image.mean((1, 2)) // 1000).tolist() == list(range(1, 13))
    fake = type("BigEarthNetV2", (InMemory,), {})
    assert TorchGeoTiles(fake(images(1, 2), bands="s1"), ("VH",)).sensor == SENTINEL1


@pytest.mark.parametrize(
    ("name", "bands", "sensor"),
    [
        ("SEN12MS", ("VV", "VH"), SENTINEL1),
        ("SSL4EOS12", ("VV", "VH"), SENTINEL1),
        ("SEN12MS", ("VH", "B02"), SENTINEL2),
        ("SeasonalContrastS2", ("B4", "B3", "B2"), SENTINEL2),
    ],
)
def test_a_part_of_a_known_dataset(name: str, bands: tuple[str, ...], sensor: Sensor) -> None:
    dataset = type(name, (InMemory,), {})(images(1, len(bands)), bands=bands)
    tiles = TorchGeoTiles(dataset)
    assert tiles.sensor == sensor
    assert {f"B0{band[1:]}" if name == "SEN12MS" and band[0] == "B" else band for band in tiles.bands} <= set(bands)


def test_so2sat_has_its_radar_first_whatever_order_is_asked_for() -> None:
    So2Sat = type("So2Sat", (InMemory,), {})
    parts = {"s1_band_names": ["S1_B1"], "s2_band_names": ["S2_B04", "S2_B02"]}
    dataset = So2Sat(images(1, 3), bands=("S2_B04", "S1_B1", "S2_B02"), **parts)
    tiles = TorchGeoTiles(dataset, ("B2", "B4"))
    np.testing.assert_allclose(tiles.read(0).image, 10_000 * dataset[0]["image"].numpy()[[2, 1]], rtol=1e-6)
    with pytest.raises(ConfigError, match="are of no known sensor"):
        TorchGeoTiles(So2Sat(images(1, 1), bands=("S1_B1",)))


def test_reflectances_of_so2sat_come_in_the_sensors_units() -> None:
    names = tuple(torchgeo.datasets.So2Sat.all_band_names)
    So2Sat = type("So2Sat", (InMemory,), {})  # h5py, which the true one needs, is not installed everywhere
    dataset = So2Sat(images(2, len(names)), bands=names)
    tiles = TorchGeoTiles(dataset, bands=("B8A", "B2"))
    at = [names.index("S2_B8A"), names.index("S2_B02")]
    np.testing.assert_allclose(tiles.read(0).image, 10_000 * dataset[0]["image"].numpy()[at], rtol=1e-6)
    with pytest.raises(ConfigError, match="So2Sat has no band B1, B10\nSet --bands to some of: B2,B3"):
        TorchGeoTiles(dataset, bands=("B1", "B10"))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.float32, torch.float64])
def test_types_are_kept(dtype: torch.dtype) -> None:
    samples = [{"image": (sample["image"] * 200).to(dtype)} for sample in images(2, 3)]
    np.testing.assert_array_equal(TorchGeoTiles(InMemory(samples)).read(1).image, samples[1]["image"].numpy())


def test_missing_pixels_hold_the_mean_of_their_band() -> None:
    samples = images(4, 3)
    samples[1]["image"][0, :2] = float("nan")
    samples[1]["image"][2, 0, 0] = float("inf")
    samples[2]["image"][1] = float("nan")
    tiles = TorchGeoTiles(InMemory(samples))
    found, raw = tiles.read(1).image, samples[1]["image"].numpy()
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[0, :2], raw[0, 2:].mean(), rtol=1e-6)
    np.testing.assert_allclose(found[2, 0, 0], raw[2].ravel()[1:].mean(), rtol=1e-6)
    np.testing.assert_array_equal(found[1], raw[1])
    assert tiles.read(2).unreadable == 2
    np.testing.assert_array_equal(tiles.read(2).image, samples[3]["image"].numpy())
    tiles.note_unreadable(2)
    assert tiles.unreadable.seen == {2: "image 2 of InMemory (band G holds nothing but NaN)"}


class Seasons(InMemory):
    """Draws one of ten constant images, as SSL4EO-S12 draws a season."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"image": torch.full((3, 2, 2), float(random.choice(range(10))))}


def test_a_season_is_drawn_once_for_all() -> None:
    tiles = TorchGeoTiles(Seasons(images(30, 3)))
    state = random.getstate()
    first = [float(tiles.read(index).image[0, 0, 0]) for index in range(30)]
    assert random.getstate() == state
    random.seed(5)
    assert [float(tiles.read(index).image[0, 0, 0]) for index in range(30)] == first
    assert len(set(first)) > 3


@pytest.mark.parametrize(
    ("name", "write", "content", "reason"),
    [
        ("RESISC45", write_resisc45, b"no picture", "it is no image of a known format"),
        ("RESISC45", write_resisc45, b"", "it is no image of a known format"),
        ("EuroSAT", write_eurosat, b"no picture", "not recognized as being in a supported file format"),
    ],
)
def test_unreadable_images(
    tmp_path: Path, name: str, write: Any, content: bytes, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    tiles = opened(name, write(tmp_path), max_unreadable=0.3)
    good = tiles.read(2).image
    for index in (0, 1):
        tiles.path(index).write_bytes(content)
    tile = opened(name, tmp_path, max_unreadable=0.3).read(0)  # the first may be broken when the data are opened
    assert (tile.unreadable, tile.target) == (0, 0)
    np.testing.assert_array_equal(tile.image, good)
    with caplog.at_level(logging.WARNING):
        tiles.note_unreadable(1)
        tiles.note_unreadable(1)
    assert caplog.text.count(f"{tiles.path(1)} cannot be used ({reason}") == 1
    tiles.note_unreadable(0)
    for index in range(2, 8):
        tiles.path(index).write_bytes(content)
    with pytest.raises(DataError, match=r"3 of 8 tiles .* more than the bearable share of 30\.0%"):
        tiles.read(3)
    with pytest.raises(DataError, match="3 of 8 tiles"):
        opened(name, tmp_path, max_unreadable=0.3)


def test_truncated_and_vanished_images(tmp_path: Path) -> None:
    tiles = opened("RESISC45", write_resisc45(tmp_path), max_unreadable=0.3)
    whole = tiles.path(0).read_bytes()
    tiles.path(0).write_bytes(whole[: len(whole) // 2])
    tiles.path(1).unlink()
    for index in (0, 1):
        tiles.note_unreadable(index)
    assert "truncated" in tiles.unreadable.seen[0]
    assert "No such file or directory" in tiles.unreadable.seen[1]


def test_another_number_of_bands(tmp_path: Path) -> None:
    write_eurosat(tmp_path)
    write_geotiff(files(tmp_path)[1], spectrum(1)[:4])
    tiles = opened("EuroSAT", tmp_path)
    with pytest.raises(DataError, match=r"TorchGeo's EuroSAT cannot make an image of \S+Forest_2\.tif: "):
        tiles.read(1)
    samples = [*images(2, 3), *images(1, 4)]
    with pytest.raises(DataError, match="image 2 of InMemory has 4 bands, not 3\nAll tiles"):
        TorchGeoTiles(InMemory(samples)).read(2)


@pytest.mark.parametrize(
    ("samples", "attributes", "error", "message"),
    [
        ([], {}, DataError, "InMemory has no image"),
        ([{"mask": torch.zeros(3, 4, 4)}], {}, ConfigError, "hold mask, no image"),
        ([{"image": torch.zeros(2, 3, 4, 4)}], {}, ConfigError, r"shape \(2, 3, 4, 4\) \(a time series\)"),
        ([{"image": torch.zeros(4, 4)}], {}, ConfigError, r"has the shape \(4, 4\)\nOnly"),
        (images(1, 5), {}, ConfigError, "does not name the 5 bands"),
        (images(1, 3), {"bands": ("B02", "B8A")}, DataError, "names 2 bands .* images have 3"),
        (images(1, 2), {"bands": ("B1", "B2")}, ConfigError, "fit sentinel-2, landsat-tm, landsat-etm, landsat-oli"),
        (images(1, 2), {"bands": ("B02", "Q7")}, ConfigError, "are of no known sensor"),
    ],
)
def test_what_cannot_be_a_source(
    samples: Any, attributes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        TorchGeoTiles(InMemory(samples, **attributes))
    assert "\n" in str(caught.value), "a remedy follows"


@pytest.mark.parametrize(
    ("bands", "sensor", "message"),
    [
        (("B2",), None, "unknown band 'B2' for rgb"),
        (("R", "R"), None, "named twice"),
        (None, SENTINEL2, "does not name the 3 bands"),
    ],
)
def test_wrong_bands(bands: Any, sensor: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TorchGeoTiles(InMemory(images(1, 3)), bands, sensor)


@pytest.mark.parametrize(
    ("name", "splits"),
    [
        ("RESISC45", {"train": "train", "val": "val", "test_gt": "test"}),
        ("So2Sat", {"train": "train", "val": "validation", "test_gt": "test"}),
        ("PatternNet", {"train": None}),
        ("SSL4EOS12", {"train": None}),
        ("SKIPPD", {"train": None, "test_gt": "test"}),
        ("FireRisk", {"train": "train", "val": "val"}),
    ],
)
def test_splits(name: str, splits: dict[str, str | None]) -> None:
    assert find_splits(find_class(name)) == splits


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("NAIP", "NAIP is a GeoDataset"),
        ("Landsat8", "Landsat8 is a GeoDataset"),
        ("NonGeoDataset", "no dataset 'NonGeoDataset' that can be opened"),
        ("stack_samples", "no dataset 'stack_samples'"),
        ("Nonsense", "no dataset 'Nonsense'"),
    ],
)
def test_what_is_no_dataset_of_chips(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_class(name)


def test_names_are_known_without_torchgeo() -> None:
    assert set(torchgeo_names()) == set(torchgeo.datasets.__all__)
    entry = find_dataset("torchgeo:RESISC45")
    assert (entry.sensor, entry.needs_root, entry.arguments) == ("rgb", True, {"name": "RESISC45"})
    assert find_dataset("torchgeo:BigEarthNet").sensor is None
    with pytest.raises(ConfigError, match=r"TorchGeo has no dataset 'resisc45'\nDid you mean RESISC45"):
        find_dataset("torchgeo:resisc45")
    with pytest.raises(ConfigError, match=r"unknown dataset 'RESISC45'.*\n.*Known: fmow-sentinel, .*, torchgeo:NAME"):
        find_dataset("RESISC45")


def test_a_dataset_that_is_not_there(tmp_path: Path) -> None:
    resisc = find_class("RESISC45")
    with pytest.raises(DataError, match=r"TorchGeo finds no RESISC45 in .* \(split train\)\nNothing is downloaded"):
        open_torchgeo(resisc, tmp_path, "train")
    with pytest.raises(DataError, match="nowhere does not exist\nName the folder that holds RESISC45"):
        open_torchgeo(resisc, tmp_path / "nowhere", "train")
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="file is not a folder"):
        open_torchgeo(resisc, tmp_path / "file", "train")
    write_resisc45(tmp_path)
    (tmp_path / "resisc45-train.txt").unlink()
    with pytest.raises(DataError, match=r"cannot read .*resisc45-train\.txt"):
        open_torchgeo(resisc, tmp_path, "train")


def test_a_constructor_that_wants_more(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="CopernicusBench needs more than a folder: name"):
        open_torchgeo(find_class("CopernicusBench"), tmp_path, "train")

    class Fussy(InMemory):
        def __init__(self, root: Path) -> None:
            raise AssertionError("no season is given")

    with pytest.raises(DataError, match=r"Fussy cannot be opened in .*: AssertionError: no season is given"):
        open_torchgeo(Fussy, tmp_path, "train")


def test_a_missing_package(tmp_path: Path) -> None:
    class Needy(InMemory):
        def __init__(self, root: Path, checksum: bool = True, download: bool = True) -> None:
            assert not checksum
            assert not download
            raise torchgeo_opening.DependencyNotFoundError("h5py is not installed\nRun this.")

    with pytest.raises(ConfigError, match=r"Needy cannot be opened: h5py is not installed Run this\.\nInstall"):
        open_torchgeo(Needy, tmp_path, "train")
