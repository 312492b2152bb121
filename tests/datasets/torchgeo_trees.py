"""Small datasets in the layouts of TorchGeo's classes, made by seeded generators."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import rasterio
from numpy.typing import NDArray
from PIL import Image

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


def files(root: Path) -> list[Path]:
    """All images, in the order of the classes and names."""
    return sorted(path for path in root.rglob("*") if path.suffix in {".jpg", ".tif"})
