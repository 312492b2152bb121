"""Photometric augmentation against torchvision, image by image, and against its definition."""

from __future__ import annotations

import math

import pytest
import torch
from torchvision.transforms.v2 import functional as tv

from geoexplora.bands import (
    FMOW_RGB_STATISTICS,
    FMOW_SENTINEL_BANDS,
    FMOW_SENTINEL_STATISTICS,
    RGB,
    SENTINEL1,
    SENTINEL2,
)
from geoexplora.errors import ConfigError
from geoexplora.transforms.multi_crop import Crops
from geoexplora.transforms.normalization import METHODS, Normalization
from geoexplora.transforms.photometric import BandAugmentation, Blur, ColourAugmentation, photometric

UNIT = Normalization("clip-float", ("R", "G", "B"), (127.5,) * 3, (63.75,) * 3)
"""Its mean plus and minus two deviations are 0 and 255: normalized values are digital numbers / 255."""
TEN = FMOW_SENTINEL_STATISTICS.select(FMOW_SENTINEL_BANDS)
OFF = Blur(0, 0, 0)
NOTHING = {"jitter": 0.0, "grayscale": 0.0, "solarize": 0.0, "blur": OFF}


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some_crops(channels: int = 3, images: int = 4, local: int = 3, normalization: Normalization = UNIT) -> Crops:
    draws = random(9)
    low, high = (-2.0, 2.0) if normalization.method == "standardize" else (0.0, 1.0)
    return Crops(
        low + (high - low) * torch.rand(2 * images, channels, 14, 14, generator=draws),
        low + (high - low) * torch.rand(local * images, channels, 10, 10, generator=draws),
        images,
    )


def reference(a: ColourAugmentation, crops: Crops, generator: torch.Generator) -> list[torch.Tensor]:
    """The same draws, the operations one by one and image by image by torchvision. Values are 0 to 1."""
    results = []
    for view, images in (("global", crops.global_), ("local", crops.local)):
        count = len(images)

        def uniform(low: float, high: float, count: int = count) -> list[float]:
            return (low + (high - low) * torch.rand(count, generator=generator)).tolist()

        jitter = uniform(0, 1)
        factors = [uniform(1 - width, 1 + width) for width in (a.brightness, a.contrast, a.saturation)]
        factors.append(uniform(-a.hue, a.hue))
        order = torch.rand(count, 4, generator=generator).argsort(1).tolist()
        grey, blur, sigma, inverted = uniform(0, 1), uniform(0, 1), uniform(*a.blur.sigma), uniform(0, 1)
        out = []
        for i, image in enumerate(images):
            first = view == "global" and i < crops.batch_size
            for step in order[i] if jitter[i] < a.jitter else []:
                change = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)[step]
                image = change(image, factors[step][i])
            if grey[i] < a.grayscale:
                image = tv.rgb_to_grayscale(image, 3)
            if blur[i] < (a.blur.local if view == "local" else a.blur.first if first else a.blur.other):
                image = tv.gaussian_blur(image, [a.blur.kernel] * 2, [sigma[i]] * 2)
            if view == "global" and not first and inverted[i] < a.solarize:
                image = tv.solarize(image, 0.5)
            out.append(image)
        results.append(torch.stack(out))
    return results


# torchvision weighs red by 0.2989, kornia by 0.299: up to 1e-4 where grey values enter.
@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        ({"jitter": 1.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}, 1e-5),
        ({"jitter": 1.0, "brightness": 0.0, "saturation": 0.0, "hue": 0.0}, 1e-4),
        ({"jitter": 1.0, "brightness": 0.0, "contrast": 0.0, "hue": 0.0, "saturation": 1.0}, 1.1e-4),
        ({"jitter": 1.0, "brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.5}, 1e-5),
        ({"grayscale": 0.5}, 1.1e-4),
        ({"solarize": 0.5}, 1e-6),
        ({"blur": Blur()}, 1e-5),
        ({"blur": Blur(0.5, 0.5, 0.5, (1.0, 5.0), 5)}, 1e-5),
    ],
)
def test_operations_equal_torchvisions(settings: dict[str, object], tolerance: float) -> None:
    augmentation = ColourAugmentation(UNIT, **(NOTHING | settings))
    crops = some_crops()
    for seed in range(4):
        found = augmentation(crops, random(seed))
        expected = reference(augmentation, crops, random(seed))
        torch.testing.assert_close(found.global_, expected[0], rtol=0, atol=tolerance)
        torch.testing.assert_close(found.local, expected[1], rtol=0, atol=tolerance)
    assert not torch.allclose(found.global_, crops.global_, atol=1e-2)


def test_the_whole_equals_torchvision_image_by_image() -> None:
    augmentation = ColourAugmentation(UNIT)
    crops = some_crops(images=8)
    for seed in range(5):
        found, expected = augmentation(crops, random(seed)), reference(augmentation, crops, random(seed))
        torch.testing.assert_close(found.global_, expected[0], rtol=0, atol=5e-4)
        torch.testing.assert_close(found.local, expected[1], rtol=0, atol=5e-4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bands", [("R", "G", "B"), ("B", "R", "G")])
def test_colours_are_changed_in_digital_numbers(method: str, bands: tuple[str, ...]) -> None:
    order = [bands.index(name) for name in ("R", "G", "B")]
    normalization = Normalization.from_statistics(method, FMOW_RGB_STATISTICS.select(bands))
    crops = some_crops(normalization=normalization)
    found = ColourAugmentation(normalization)(crops, random(3))
    unit = [normalization.inverse(part)[:, order].div(255).clamp(0, 1) for part in (crops.global_, crops.local)]
    expected = ColourAugmentation(UNIT)(Crops(unit[0], unit[1], crops.batch_size), random(3))
    plain = Normalization.from_statistics(method.replace("uint8", "float"), FMOW_RGB_STATISTICS)
    for one, other in ((found.global_, expected.global_), (found.local, expected.local)):
        torch.testing.assert_close(one[:, order], plain(other * 255), rtol=0, atol=1e-5)
        if method != "standardize":
            assert one.min() >= 0
            assert one.max() <= 1


@pytest.mark.parametrize("method", ["clip-uint8", "clip-float"])
def test_without_an_operation_only_overshoots_change(method: str) -> None:
    # No second truncation: it would darken every crop by half a level.
    normalization = Normalization.from_statistics(method, TEN)
    crops = some_crops(10, normalization=normalization)
    over = Crops(crops.global_ * 1.2 - 0.1, crops.local * 1.2 - 0.1, crops.batch_size)
    before = over.global_.clone()
    found = BandAugmentation(normalization, jitter=0, blur=OFF)(over, random())
    torch.testing.assert_close(found.global_, over.global_.clamp(0, 1), rtol=0, atol=2e-6)
    torch.testing.assert_close(found.local, over.local.clamp(0, 1), rtol=0, atol=2e-6)
    assert torch.equal(over.global_, before)


@pytest.mark.parametrize("method", METHODS)
def test_bands_are_moved_about_their_means(method: str) -> None:
    normalization = Normalization.from_statistics(method, TEN)
    mean, std = (torch.tensor(part)[:, None, None] for part in (TEN.mean, TEN.std))
    augmentation = BandAugmentation(normalization, jitter=1.0, blur=OFF)
    # Narrow crops: nothing is clipped, so that gain and offset can be read off.
    z = torch.rand(400, 10, 6, 6, generator=random(2)) * 0.4 - 0.2
    x = z if method == "standardize" else z / 4 + 0.5
    found = normalization.inverse(augmentation(Crops(x, x[:0], 200), random()).global_).sub(mean).div(std)
    centred = z - z.mean((2, 3), keepdim=True)
    gains = (found * centred).sum((2, 3)) / centred.square().sum((2, 3))
    offsets = (found - gains[..., None, None] * z).mean((2, 3))
    torch.testing.assert_close(found, gains[..., None, None] * z + offsets[..., None, None], rtol=0, atol=1e-4)
    assert 0.6 * 0.9 - 1e-3 < gains.min() < 0.65
    assert 1.35 < gains.max() < 1.4 * 1.1 + 1e-3
    assert offsets.abs().max() < 0.5 + 1e-3
    assert abs(gains.mean() - 1) < 0.05
    assert abs(offsets.mean()) < 0.05
    # A band's own part is small beside its image's.
    assert 0 < gains.std(1).mean() < 0.4 * gains.mean(1).std()
    assert 0 < offsets.std(1).mean() < 0.4 * offsets.mean(1).std()


def test_probabilities_over_many_draws() -> None:
    """Each operation alone, on images that it cannot leave as they are; three deviations of 1000 draws are 0.05."""
    images = torch.rand(1000, 3, 10, 10, generator=random(4)) * 0.9 + 0.05
    crops = Crops(torch.cat((images, images)), images, 1000)

    def shares(**settings: object) -> list[float]:
        found = ColourAugmentation(UNIT, **(NOTHING | settings))(crops, random(6))
        views = (found.global_[:1000], found.global_[1000:], found.local)
        return [float(((view - images).abs().amax((1, 2, 3)) > 1e-4).float().mean()) for view in views]

    assert shares() == [0, 0, 0]
    assert shares(jitter=0.8) == pytest.approx([0.8] * 3, abs=0.05)
    assert shares(grayscale=0.2) == pytest.approx([0.2] * 3, abs=0.05)
    assert shares(solarize=0.2) == pytest.approx([0, 0.2, 0], abs=0.05)
    assert shares(solarize=0.2)[::2] == [0, 0]
    # The kernel's least width, 0.1, changes nothing.
    assert shares(blur=Blur(sigma=(1.0, 2.0))) == pytest.approx([1, 0.1, 0.5], abs=0.05)
    found = BandAugmentation(UNIT, blur=OFF)(crops, random(6)).local
    assert ((found - images).abs().amax((1, 2, 3)) > 1e-4).float().mean() == pytest.approx(0.8, abs=0.05)


@pytest.mark.parametrize("kind", ["colour", "bands", "none"])
def test_nothing_depends_on_anything_but_the_generator(kind: str) -> None:
    augmentation = photometric(kind, RGB, UNIT)
    crops = some_crops()
    torch.manual_seed(1)
    first = augmentation(crops, random(3))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = augmentation(crops, random(3))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.global_, second.global_)
    assert torch.equal(first.local, second.local)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = augmentation(crops, random(3))
    assert torch.equal(cast.global_, first.global_)
    # As many numbers are drawn whatever the images show.
    one, other = random(3), random(3)
    augmentation(crops, one)
    augmentation(Crops(crops.global_ * 0, crops.local * 0, crops.batch_size), other)
    assert torch.equal(one.get_state(), other.get_state())


@pytest.mark.parametrize(("images", "local"), [(1, 2), (1, 0), (3, 0)])
@pytest.mark.parametrize("channels", [3, 10])
def test_small_batches(images: int, local: int, channels: int) -> None:
    normalization = UNIT if channels == 3 else Normalization.from_statistics("clip-uint8", TEN)
    augmentation = photometric("auto", RGB if channels == 3 else SENTINEL2, normalization)
    crops = some_crops(channels, images, local)
    crops.global_.requires_grad_()
    found = augmentation(crops, random())
    assert found.batch_size == images
    for before, after in ((crops.global_, found.global_), (crops.local, found.local)):
        assert before.shape == after.shape
        assert after.dtype == torch.float32
        assert after.isfinite().all()
        assert not after.requires_grad


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_flat_colours_stay_finite(value: float) -> None:
    images = torch.full((64, 3, 8, 8), value)
    found = ColourAugmentation(UNIT)(Crops(images, images, 32), random())
    assert found.global_.isfinite().all()
    assert found.local.isfinite().all()


def test_kinds() -> None:
    ten = Normalization.from_statistics("standardize", TEN)
    colours = Normalization.from_statistics("standardize", FMOW_SENTINEL_STATISTICS.select(("B4", "B3", "B2")))
    radar = Normalization("standardize", ("VV", "VH"), (-12.0, -18.0), (4.0, 4.0))
    two = Normalization("clip-float", ("R", "G"), (127.5,) * 2, (63.75,) * 2)
    assert isinstance(photometric("auto", RGB, UNIT), ColourAugmentation)
    assert isinstance(photometric("colour", RGB, UNIT), ColourAugmentation)
    assert isinstance(photometric("bands", RGB, UNIT), BandAugmentation)
    for sensor, normalization in ((SENTINEL2, ten), (SENTINEL2, colours), (SENTINEL1, radar), (RGB, two)):
        assert isinstance(photometric("auto", sensor, normalization), BandAugmentation)
        with pytest.raises(ConfigError, match="are not red, green and blue of the sensor rgb"):
            photometric("colour", sensor, normalization)
    crops = some_crops()
    assert photometric("none", SENTINEL2, ten)(crops, random()) is crops
    with pytest.raises(ConfigError, match="unknown photometric augmentation 'color'"):
        photometric("color", RGB, UNIT)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ColourAugmentation(UNIT, jitter=1.1), "jitter 1.1 is out of range"),
        (lambda: ColourAugmentation(UNIT, grayscale=-0.1), "grayscale -0.1 is out of range"),
        (lambda: ColourAugmentation(UNIT, solarize=math.nan), "solarize nan is out of range"),
        (lambda: ColourAugmentation(UNIT, contrast=1.5), "contrast 1.5 is out of range"),
        (lambda: ColourAugmentation(UNIT, hue=0.6), "hue of 0.6 turns"),
        (lambda: ColourAugmentation(Normalization.from_statistics("clip-float", TEN)), "not red, green and blue"),
        (lambda: BandAugmentation(UNIT, gain=2), "gain 2 is out of range"),
        (lambda: BandAugmentation(UNIT, jitter=2), "jitter 2 is out of range"),
        (lambda: BandAugmentation(UNIT, offset=-1), "offsets -1, 0.1 are out of range"),
        (lambda: Blur(first=2), "blur_first 2 is out of range"),
        (lambda: Blur(sigma=(0, 1)), "0, 1 is not a range of a blur's widths"),
        (lambda: Blur(kernel=8), "kernel of 8 pixels has no centre"),
        (lambda: ColourAugmentation(UNIT)(Crops(torch.rand(2, 3, 4, 4), torch.rand(0, 3, 8, 8), 1), random()), "4 px"),
    ],
)
def test_wrong_settings(make: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()  # type: ignore[operator]
