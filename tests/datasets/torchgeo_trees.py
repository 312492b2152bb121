"""Small datasets in the layouts of TorchGeo's classes, made by seeded generators."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import rasterio
from numpy.typing import NDArray
from PIL import Image
from torchgeo.datasets import SSL4EOL, SSL4EOS12, BigEarthNet, So2Sat

EUROSAT_ON_DISK = ("B1", "B2", "B3", "B4", "B5", "B6", "B7", "B8", "B9", "B10", "B11", "B12", "B8A")
CLASSES = ("Forest", "River")
TRAIN, VAL = 4, 2


def write_geotiff(path: Path, image: NDArray[np.generic]) -> None:
    """(C, h, w)."""
    shape = {"count": image.shape[0], "height": image.shape[1], "width": image.shape[2]}
    place = rasterio.Affine(10, 0, 0, 0, -10, 0)
    with rasterio.open(path, "w", driver="GTiff", dtype=image.dtype, transform=place, **shape) as file:
        file.write(image)


def photograph(seed: int, height: int = 24, width: int = 32) -> NDArray[np.uint8]:
    """(h, w, 3): smooth enough for JPEG, brighter in red than in green than in blue."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 60, (3, 3, 3)) + np.array([150, 90, 30])
    return np.asarray(Image.fromarray(coarse.astype(np.uint8)).resize((width, height), Image.Resampling.BILINEAR))


def spectrum(seed: int, size: int = 20) -> NDArray[np.uint16]:
    """(13, size, size) as EuroSAT stores it: band number n of its list holds 1000 n to 1000 n + 500."""
    rng = np.random.default_rng(seed)
    levels = 1000 * np.arange(1, len(EUROSAT_ON_DISK) + 1)
    return (levels[:, None, None] + rng.integers(0, 500, (len(levels), size, size))).astype(np.uint16)


def _write_tree(root: Path, images: Path, lists: str, listed: str, stored: str) -> None:
    names: dict[str, list[str]] = {"train": [], "val": []}
    for number, name in enumerate(CLASSES):
        folder = root / images / name
        folder.mkdir(parents=True)
        for index in range(TRAIN + VAL):
            seed, stem = 100 * number + index, f"{name}_{index + 1}"
            if listed == stored:
                Image.fromarray(photograph(seed)).save(folder / f"{stem}{stored}")
            else:
                write_geotiff(folder / f"{stem}{stored}", spectrum(seed))
            names["train" if index < TRAIN else "val"].append(f"{stem}{listed}")
    for split, files in names.items():
        (root / f"{lists}-{split}.txt").write_text("\n".join(files) + "\n")


def write_resisc45(root: Path) -> Path:
    """JPEG files of 24 x 32 pixels in folders of classes."""
    _write_tree(root, Path("NWPU-RESISC45"), "resisc45", ".jpg", ".jpg")
    return root


def write_ucmerced(root: Path) -> Path:
    """The same as TIFF files."""
    _write_tree(root, Path("UCMerced_LandUse/Images"), "uc_merced", ".tif", ".tif")
    return root


def write_eurosat(root: Path) -> Path:
    """GeoTIFF files of 13 bands, B8A last; the lists name JPEG files, as TorchGeo's do."""
    images = Path("ds/images/remote_sensing/otherDatasets/sentinel_2/tif")
    _write_tree(root, images, "eurosat", ".jpg", ".tif")
    return root


def reflectances(seed: int, channels: int, size: int) -> NDArray[np.uint16]:
    """(channels, size, size): channel n holds 100 n to 100 n + 50."""
    rng = np.random.default_rng(seed)
    levels = 100 * np.arange(1, channels + 1)
    return (levels[:, None, None] + rng.integers(0, 50, (channels, size, size))).astype(np.uint16)


def write_so2sat(root: Path) -> Path:
    """HDF5 files of 18 bands, Sentinel-1 first, and one-hot labels of 17 classes: image n is of class 5 n modulo 17."""
    import h5py

    root.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(So2Sat.filenames_by_version["2"].values()):
        images = np.stack([reflectances(10 * number + index, 18, 8) for index in range(TRAIN)]).transpose(0, 2, 3, 1)
        with h5py.File(root / name, "w") as file:
            file["sen1"], file["sen2"] = images[..., :8] / 1e4, images[..., 8:] / 1e4
            file["label"] = np.eye(17)[5 * np.arange(TRAIN) % 17]
    return root


def write_bigearthnet(root: Path) -> Path:
    """Folders of 12 bands of 12, 6 or 2 pixels and a JSON file with land cover by CORINE's 43 names.

    Band number n holds 1000 n to 1000 n + 500. Beside them Sentinel-1's, of one value each: VV -10, VH -20.
    """
    rng = np.random.default_rng(0)
    images = root / BigEarthNet.metadata["s2"]["directory"]
    bands = SSL4EOS12.metadata["s2a"]["bands"]
    for split, count in (("train", TRAIN), ("val", VAL), ("test", VAL)):
        names = [f"S2A_MSIL2A_20170613T101031_{split}_{index}" for index in range(count)]
        for name in names:
            (images / name).mkdir(parents=True)
            for number, band in enumerate(bands, start=1):
                size = {"B1": 2, "B9": 2, "B2": 12, "B3": 12, "B4": 12, "B8": 12}.get(band, 6)
                padded = band if len(band) == 3 else f"B0{band[1:]}"
                level = 1000 * number + rng.integers(0, 500, (1, size, size))
                write_geotiff(images / name / f"{name}_{padded}.tif", level.astype(np.uint16))
            labels = rng.choice(BigEarthNet.class_sets[43], 3, replace=False).tolist()
            (images / name / f"{name}_labels_metadata.json").write_text(json.dumps({"labels": labels}))
            radar = root / BigEarthNet.metadata["s1"]["directory"] / f"S1_{name}"
            radar.mkdir(parents=True)
            for band, level in (("VV", -10), ("VH", -20)):
                write_geotiff(radar / f"{radar.name}_{band}.tif", np.full((1, 12, 12), level, np.float32))
            (radar / f"{radar.name}_labels_metadata.json").write_text(json.dumps({"labels": labels}))
        lines = "".join(f"{name},S1_{name}\n" for name in names)
        (root / BigEarthNet.splits_metadata[split]["filename"]).write_text(lines)
    return root


def write_ssl4eo_l(root: Path, split: str) -> Path:
    """Three places of one season in 8 bits: channel n, counted from 1, holds 20 n."""
    levels = 20 * np.arange(1, len(SSL4EOL.metadata[split]["all_bands"]) + 1)
    for place in range(3):
        folder = root / f"ssl4eo_l_{split}" / f"{place:07}" / "L_20200101"
        folder.mkdir(parents=True)
        write_geotiff(folder / "all_bands.tif", np.tile(levels[:, None, None], (1, 4, 4)).astype(np.uint8))
    return root


def write_ssl4eo_s12(root: Path, count: int = 3) -> Path:
    """Folders of two seasons each, of 13 bands: their number n holds 1000 n + 100 for the place + the season."""
    for place in range(count):
        for season in range(2):
            folder = root / "s2c" / f"{place:07}" / f"2020010{season + 1}T101031_20200101T101031_T33UUU"
            folder.mkdir(parents=True)
            for number, band in enumerate(SSL4EOS12.metadata["s2c"]["bands"], start=1):
                level = np.full((1, 4, 4), 1000 * number + 100 * place + season, np.uint16)
                write_geotiff(folder / f"{band}.tif", level)
    return root


def land_cover(seed: int, size: int = 24) -> NDArray[np.uint8]:
    """(size, size): four rectangles of LoveDA's values 0 to 7."""
    return np.random.default_rng(seed).integers(0, 8, (2, 2), np.uint8).repeat(size // 2, 0).repeat(size // 2, 1)


def write_loveda(root: Path) -> Path:
    """PNG files of 24 pixels and their masks, urban and rural; the test split has no masks."""
    for split, count in (("Train", TRAIN // 2), ("Val", VAL // 2), ("Test", 1)):
        for scene in ("Urban", "Rural"):
            images, masks = (root / split / scene / name for name in ("images_png", "masks_png"))
            images.mkdir(parents=True)
            for index in range(count):
                mask = land_cover(index + 10 * len(split))
                Image.fromarray(mask[..., None] * np.array([10, 20, 30], np.uint8)).save(images / f"{index}.png")
                if split != "Test":
                    masks.mkdir(exist_ok=True)
                    Image.fromarray(mask).save(masks / f"{index}.png")
    return root


def write_tropical_cyclone(root: Path) -> Path:
    """JPEG files of grey pictures, and csv files with wind speeds, whole knots: 30, 37, 44, ..."""
    for split, prefix in (("train", "training"), ("test", "test")):
        (root / split).mkdir(parents=True)
        names = [f"abc_{index:03}" for index in range(TRAIN)]
        tables = {
            "features": [("Image ID", "Storm ID", "Relative Time", "Ocean")] + [(name, "abc", 0, 1) for name in names],
            "labels": [("Image ID", "Wind Speed")] + [(name, 30 + 7 * index) for index, name in enumerate(names)],
        }
        for index, name in enumerate(names):
            Image.fromarray(photograph(index, 366, 366)[..., 0]).save(root / split / f"{name}.jpg")
        for table, rows in tables.items():
            with (root / f"{prefix}_set_{table}.csv").open("w", newline="") as file:
                csv.writer(file).writerows(rows)
    return root


def files(root: Path) -> list[Path]:
    """All images, in the order of the classes and names."""
    return sorted(path for path in root.rglob("*") if path.suffix in {".jpg", ".tif"})
