"""Pictures of right and wrong predictions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imread

from geoexplora.bands import RGB
from geoexplora.runs import predictions
from geoexplora.runs.colours import CLASS_COLOURS, RIGHT, WRONG
from geoexplora.runs.predictions import plot_class_predictions, plot_mask_predictions, plot_value_predictions

BANDS = RGB.band_names
LONG = "Arable land, Land principally occupied by agriculture, with significant areas of natural vegetation, Pastures"


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were drawn; they are saved as well."""
    figures: list[Figure] = []
    save = predictions.save_figure

    def keep(figure: Figure, target: Path) -> None:
        figures.append(figure)
        save(figure, target)

    monkeypatch.setattr(predictions, "save_figure", keep)
    return figures


def noise(count: int, side: int = 8) -> torch.Tensor:
    """(N, 3, side, side), digital numbers."""
    return 255 * torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def captions(figure: Figure) -> list[tuple[str, tuple[float, ...]]]:
    """What stands below each image, and the colour of its frame."""
    shown = [axis for axis in figure.axes if axis.images]
    return [(axis.get_xlabel(), tuple(axis.spines["left"].get_edgecolor()[:3])) for axis in shown]


def draw(target: Path, truth: list[str], predicted: list[str]) -> None:
    plot_class_predictions(target, noise(len(truth)), truth, predicted, [0.876] * len(truth), BANDS, RGB)


def test_right_ones_are_green_and_wrong_ones_red(tmp_path: Path, drawn: list[Figure]) -> None:
    draw(tmp_path / "c.png", ["farm", "forest", "water"], ["farm", "lighthouse_or_tower_for_signals", "water"])
    wrong = "predicted: lighthouse or\ntower for signals\n88 %\ntruth: forest"
    assert captions(drawn[0]) == [
        ("farm\n88 %", to_rgb(RIGHT)),
        ("water\n88 %", to_rgb(RIGHT)),
        (wrong, to_rgb(WRONG)),
    ]


@pytest.mark.parametrize("count", [1, 7, 12])
@pytest.mark.parametrize("right", [True, False])
def test_only_right_or_only_wrong_ones(tmp_path: Path, drawn: list[Figure], count: int, right: bool) -> None:
    draw(tmp_path / "c.png", ["a"] * count, ["a" if right else "b"] * count)
    assert [colour for _, colour in captions(drawn[0])] == [to_rgb(RIGHT if right else WRONG)] * count


def test_long_captions_stay_within_the_figure_and_apart(tmp_path: Path, drawn: list[Figure]) -> None:
    draw(tmp_path / "c.png", [LONG] * 12, ([LONG] * 3 + ["Urban fabric, " + LONG] * 3) * 2)
    figure = drawn[0]
    figure.set_dpi(130)  # as saved: text does not scale exactly
    figure.draw_without_rendering()
    boxes = [axis.xaxis.label.get_window_extent() for axis in figure.axes if axis.images]
    pictures = [axis.get_window_extent() for axis in figure.axes if axis.images]
    assert all(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 for box in boxes)
    for number, box in enumerate(boxes):
        others = [other for at, other in enumerate(boxes) if at != number] + pictures
        assert not any(box.overlaps(other) for other in others)


def test_masks_are_drawn_in_the_colours_of_their_classes(tmp_path: Path, drawn: list[Figure]) -> None:
    truth = torch.zeros(1, 8, 8, dtype=torch.long)
    truth[:, 4:] = 2
    truth[:, :, 6:] = 255
    predicted = torch.full_like(truth, 2)
    plot_mask_predictions(tmp_path / "m.png", noise(1), truth, predicted, ["a", "b", "c_d"], 255, BANDS, RGB)
    (figure,) = drawn
    _, true, guessed, errors = (np.asarray(axis.images[0].get_array()) for axis in figure.axes)
    grey = np.full(3, 0.6)
    for row in range(8):
        for column in range(8):
            ignored = column >= 6
            colour = grey if ignored else to_rgb(CLASS_COLOURS[0 if row < 4 else 2])
            assert true[row, column] == pytest.approx(colour)
            assert guessed[row, column] == pytest.approx(to_rgb(CLASS_COLOURS[2]))
            wrong = np.full(3, 0.93) if row >= 4 else to_rgb(WRONG)
            assert errors[row, column] == pytest.approx(grey if ignored else wrong)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "c d", "ignored", "wrong"]
    assert figure.axes[3].get_xlabel() == "50.0 % wrong"


def test_masks_that_are_ignored_throughout(tmp_path: Path, drawn: list[Figure]) -> None:
    truth = torch.full((2, 8, 8), -1)
    plot_mask_predictions(tmp_path / "m.png", noise(2), truth, torch.zeros_like(truth), ["a"], -1, BANDS, RGB)
    assert drawn[0].axes[3].get_xlabel() == "all ignored"


def test_more_classes_than_colours(tmp_path: Path, drawn: list[Figure]) -> None:
    """The commonest have a colour each, the rest share black."""
    predicted = torch.arange(64).reshape(1, 8, 8).clamp(max=24)
    classes = [f"c{number}" for number in range(30)]
    plot_mask_predictions(tmp_path / "m.png", noise(1), predicted, predicted, classes, None, BANDS, RGB)
    labels = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert labels == [*(f"c{number}" for number in [*range(19), 24]), "other classes", "wrong"]
    shown = np.asarray(drawn[0].axes[2].images[0].get_array())
    assert len(np.unique(shown.reshape(-1, 3), axis=0)) == 21


@pytest.mark.parametrize("count", [1, 50, 3000])
def test_values(tmp_path: Path, drawn: list[Figure], count: int) -> None:
    rng = np.random.default_rng(0)
    truth = rng.normal(10, 3, count)
    predicted = truth + rng.normal(0, 1, count)
    plot_value_predictions(tmp_path / "v.png", truth, predicted, "height", "m")
    squared = sum((p - t) ** 2 for p, t in zip(predicted, truth, strict=True))
    title = f"RMSE {(squared / count) ** 0.5:.4g} m"
    if count > 1:
        title += f", R² {1 - squared / sum((t - truth.mean()) ** 2 for t in truth):.3f}"
    axis = drawn[0].axes[0]
    assert axis.get_title() == title
    assert axis.get_xlabel() == "true height (m)"
    assert (len(drawn[0].axes) == 2) == (count == 3000), "a density has a colour bar"


def test_values_with_images_and_values_that_are_not_finite(tmp_path: Path, drawn: list[Figure]) -> None:
    truth, predicted = [1.0, 2, 3], [1.5, 2, np.nan]
    plot_value_predictions(
        tmp_path / "v.png", truth, predicted, "x", images=noise(2), positions=[2, 0], bands=BANDS, sensor=RGB
    )
    assert [text for text, _ in captions(drawn[0])] == ["predicted nan\ntruth 3", "predicted 1.5\ntruth 1"]
    assert drawn[0].axes[0].get_title().endswith("\n1 not finite, left out")


def test_the_same_picture_is_the_same_file(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        draw(tmp_path / name, ["a", "b"], ["a", "a"])
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert imread(tmp_path / "a.png")[..., :3].std() > 0.05


def test_refuses(tmp_path: Path) -> None:
    target, mask = tmp_path / "x.png", torch.zeros(1, 8, 8, dtype=torch.long)
    with pytest.raises(ValueError, match="lengths differ"):
        plot_class_predictions(target, noise(2), ["a"], ["a"], [0.5], BANDS, RGB)
    with pytest.raises(ValueError, match="lengths differ"):
        plot_class_predictions(target, noise(0), [], [], [], BANDS, RGB)
    with pytest.raises(ValueError, match="shapes differ"):
        plot_mask_predictions(target, noise(1), mask, mask[:, 1:], ["a"], None, BANDS, RGB)
    with pytest.raises(ValueError, match="no image"):
        plot_mask_predictions(target, noise(0), mask[:0], mask[:0], ["a"], None, BANDS, RGB)
    with pytest.raises(ValueError, match="holds 7, but there are 1 classes"):
        plot_mask_predictions(target, noise(1), mask + 7, mask, ["a"], 255, BANDS, RGB)
    with pytest.raises(ValueError, match="shapes differ"):
        plot_value_predictions(target, [1.0], [1.0, 2], "x")
    with pytest.raises(ValueError, match="no value"):
        plot_value_predictions(target, [np.nan], [1.0], "x")
    with pytest.raises(ValueError, match="no sensor"):
        plot_value_predictions(target, [1.0], [1.0], "x", images=noise(1), positions=[0], bands=BANDS)
    assert not list(tmp_path.iterdir())
