"""Multi-crop: boxes against torchvision's, determinism, whole tiles from the loader to the crops."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from scipy.stats import ks_2samp
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tv

from geoexplora.datamodules import FMoWSentinelDataModule, PhotographsDataModule
from geoexplora.datasets import FMoWSentinel
from geoexplora.errors import ConfigError
from geoexplora.transforms import MultiCrop, WholeTile, random_box, resize
from geoexplora.transforms.resampling import Boxes, resample


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(count: int = 3, side: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.rand(count, 4, side, side, generator=random(1))
    return images, torch.tensor([[30, 60], [45, 20], [20, 20]])[:count]


def draw(shape: tuple[int, int], count: int, crop: MultiCrop, seed: int = 0) -> Boxes:
    return crop._draw(torch.tensor([shape]).expand(count, 2), 1, crop.global_scale, random(seed))


@pytest.mark.parametrize("shape", [(3000, 3000), (2000, 3000), (4000, 1500)])
@pytest.mark.parametrize("scale", [(0.32, 1.0), (0.05, 0.32)])
def test_boxes_are_distributed_as_torchvisions(shape: tuple[int, int], scale: tuple[float, float]) -> None:
    # Large tiles, where torchvision's whole pixels make no difference.
    ours = torch.stack([part[:, 0] for part in draw(shape, 2000, MultiCrop(8, 8, scale))[:4]])
    draws = random(5)
    theirs = torch.tensor([random_box(*shape, scale, (3 / 4, 4 / 3), draws) for _ in range(2000)]).T.double()
    theirs /= torch.tensor([[shape[0]], [shape[1]], [shape[0]], [shape[1]]])
    for one, other in zip(ours, theirs, strict=True):
        assert ks_2samp(one, other).pvalue > 1e-3
    assert ks_2samp(ours[2] * ours[3], theirs[2] * theirs[3]).pvalue > 1e-3
    areas, ratios = ours[2] * ours[3], ours[3] * shape[1] / (ours[2] * shape[0])
    assert (ours[:2] >= 0).all()
    assert (ours[:2] + ours[2:] <= 1 + 1e-12).all()
    assert scale[0] <= areas.min() + 1e-12
    assert areas.max() <= scale[1] + 1e-12
    assert math.isclose(ratios.clamp(3 / 4, 4 / 3).sub(ratios).abs().max(), 0, abs_tol=1e-9)


@pytest.mark.parametrize("shape", [(100, 10), (10, 100), (400, 300), (300, 300)])
def test_the_box_is_central_where_none_fits(shape: tuple[int, int]) -> None:
    # A square of more than the tile's area never fits into a tile that is not square; the whole of a square one does.
    found = draw(shape, 5, MultiCrop(8, 8, (1.0, 1.0), ratio=(1.0, 1.0)))
    top, left, height, width = random_box(*shape, (1.0, 1.0), (1.0, 1.0), random())
    for part, expected in zip(found[:4], (top, left, height, width), strict=True):
        side = shape[0] if part is found.top or part is found.height else shape[1]
        torch.testing.assert_close(part, torch.full((5, 1), expected / side, dtype=torch.float64), rtol=0, atol=1e-12)


def test_crops_are_the_drawn_boxes_in_order() -> None:
    images, sizes = batch()
    crop = MultiCrop(12, 6, global_crops=2, local_crops=5)
    crops = crop(images, sizes, random(7))
    assert crops.batch_size == 3
    assert crops.global_.shape == (6, 4, 12, 12)
    assert crops.local.shape == (15, 4, 6, 6)
    draws = random(7)
    big = crop._draw(sizes, 2, crop.global_scale, draws)
    small = crop._draw(sizes, 5, crop.local_scale, draws)
    for k, boxes, size, found in [(1, big, 12, crops.global_), (4, small, 6, crops.local)]:
        for image in range(3):
            one = Boxes(*(part[image : image + 1, k : k + 1] for part in boxes))
            expected = resample(images[image : image + 1], one, size, True)[0]
            torch.testing.assert_close(found[k * 3 + image], expected, rtol=0, atol=1e-6)


def test_whole_tiles_come_back_unchanged() -> None:
    images, sizes = batch()
    square = torch.full_like(sizes, 20)
    crop = MultiCrop(20, 20, (1.0, 1.0), (1.0, 1.0), (1.0, 1.0), flip=0, local_crops=1)
    torch.testing.assert_close(crop(images, square, random()).local, images, rtol=0, atol=1e-6)
    flipped = MultiCrop(20, 20, (1.0, 1.0), (1.0, 1.0), (1.0, 1.0), flip=1, local_crops=1)
    torch.testing.assert_close(flipped(images, square, random()).local, images.flip(-1), rtol=0, atol=1e-6)


def test_half_of_the_crops_are_flipped() -> None:
    flips = draw((10, 10), 4000, MultiCrop(8, 8)).flip.float().mean()
    assert abs(flips - 0.5) < 0.04
    assert draw((10, 10), 4000, MultiCrop(8, 8, flip=1)).flip.all()
    assert not draw((10, 10), 4000, MultiCrop(8, 8, flip=0)).flip.any()


def test_nothing_depends_on_anything_but_the_generator() -> None:
    images, sizes = batch()
    crop = MultiCrop(12, 6)
    torch.manual_seed(1)
    first = crop(images, sizes, random(3))
    torch.manual_seed(2)
    second = crop(images, sizes, random(3))
    other = crop(images, sizes, random(4))
    assert torch.equal(first.global_, second.global_)
    assert torch.equal(first.local, second.local)
    assert not torch.equal(first.local, other.local)
    fewer = MultiCrop(12, 6, local_crops=0)(images, sizes, random(3))
    assert torch.equal(first.global_, fewer.global_)
    assert fewer.local.shape == (0, 4, 6, 6)
    # Whether boxes fit at once or never, as many numbers are drawn.
    states = []
    for shape in ([500, 5], [20, 20]):
        generator = random(3)
        crop(images, torch.tensor([shape] * 3), generator)
        states.append(generator.get_state())
    assert torch.equal(*states)


def test_no_gradients_and_one_image() -> None:
    images, sizes = batch(1)
    crops = MultiCrop(12, 6)(images.requires_grad_(), sizes, random())
    assert not crops.global_.requires_grad
    assert not crops.local.requires_grad
    assert crops.local.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"global_size": 0}, "global crops of 0 px"),
        ({"local_size": -1}, "local crops of -1 px"),
        ({"global_crops": 0}, "0 global and 8 local crops"),
        ({"local_crops": -1}, "2 global and -1 local crops"),
        ({"global_scale": (0.0, 1.0)}, "scale 0.0, 1.0 of global crops"),
        ({"local_scale": (0.3, 0.2)}, "scale 0.3, 0.2 of local crops"),
        ({"local_scale": (0.3, 1.2)}, "scale 0.3, 1.2 of local crops"),
        ({"ratio": (0.0, 1.0)}, "0.0, 1.0 is not a range of ratios"),
        ({"ratio": (2.0, 1.0)}, "2.0, 1.0 is not a range of ratios"),
        ({"ratio": (1.0, math.nan)}, "1.0, nan is not a range of ratios"),
        ({"flip": 1.5}, "probability 1.5 of a flip"),
    ],
)
def test_wrong_settings(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MultiCrop(**({"global_size": 8, "local_size": 4} | options))


def test_wrong_batches() -> None:
    images, sizes = batch()
    crop = MultiCrop(12, 6)
    with pytest.raises(ValueError, match=r"shape \(3, 4, 20, 19\)"):
        crop(images[..., :19], sizes, random())
    with pytest.raises(ValueError, match=r"sizes of shape \(2, 2\) are not \(3, 2\)"):
        crop(images, sizes[:2], random())
    with pytest.raises(ValueError, match="must be positive"):
        crop(images, sizes - 20, random())


@pytest.mark.parametrize("antialias", [False, True])
def test_whole_tile_is_the_resized_tile(antialias: bool) -> None:
    tile = (torch.rand(3, 14, 31, generator=random()) * 1000).numpy()
    generator = random(2)
    before = generator.get_state()
    found = WholeTile(lambda image: image / 1000, 20, antialias)(tile, generator)
    assert torch.equal(generator.get_state(), before)
    image = torch.from_numpy(tile) / 1000
    expected = tv.resize(image, [20, 20], InterpolationMode.BICUBIC, antialias=antialias)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("workers", [0, 1])
def test_loader_hands_over_whole_tiles(unlabelled_tree: Path, workers: int) -> None:
    datamodule = FMoWSentinelDataModule(unlabelled_tree, image_size=16, batch_size=7, num_workers=workers)
    datamodule.whole_tiles = 24
    datamodule.setup("fit")
    raw = FMoWSentinel(unlabelled_tree)
    loaded = next(iter(datamodule.train_dataloader()))
    assert loaded["image"].shape == (7, 10, 24, 24)
    assert loaded["size"].dtype == loaded["index"].dtype == torch.int64
    for image, size, index in zip(loaded["image"], loaded["size"], loaded["index"].tolist(), strict=True):
        tile = raw[index]["image"]
        assert size.tolist() == list(tile.shape[1:])
        expected = resize(datamodule.normalization(tile), (24, 24), datamodule.antialias)
        assert torch.equal(image, expected)
    crops = MultiCrop(16, 8)(loaded["image"], loaded["size"], random())
    assert crops.local.shape == (56, 10, 8, 8)


def test_samples_name_their_index(unlabelled_tree: Path) -> None:
    datamodule = FMoWSentinelDataModule(unlabelled_tree, image_size=16)
    datamodule.setup("fit")
    sample = datamodule.train_dataset[(3, 5)]
    assert sample["index"] == 5
    assert "size" not in sample
    photographs = PhotographsDataModule(length=64)
    photographs.whole_tiles = 32
    photographs.setup("fit")
    assert photographs.train_dataset[60]["index"] == 60
    assert photographs.train_dataset[60]["image"].shape == (3, 32, 32)


def test_whole_tiles_without_size(unlabelled_tree: Path) -> None:
    datamodule = FMoWSentinelDataModule(unlabelled_tree)
    datamodule.whole_tiles = 0
    with pytest.raises(ConfigError, match="whole tiles of 0 px"):
        datamodule.setup("fit")
