"""Pictures of what a fine-tuned model got right and wrong.

Shapes: N images, C bands, H W size, K classes, M images shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import batched
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from geoexplora.bands import Sensor
from geoexplora.runs.colours import CLASS_COLOURS, RIGHT, WRONG, Array, colour_pictures
from geoexplora.runs.figures import save_figure

_COLUMNS = 6
_CELL = 1.75
_LINE = 0.13
"""Inches, of an image and of a line of its caption."""
_CHARACTERS = 25
_LINES = 3
"""Length and number of the lines that the name of a class, or the names of several, may fill."""

_PLAIN = "0.7"
_IGNORED = "0.6"
_AGREEING = "0.93"
_OTHER = "black"

_HEXBIN_FROM = 2000


def plot_class_predictions(
    target: Path,
    images: Tensor,
    truth: Sequence[str],
    predicted: Sequence[str],
    confidence: Sequence[float],
    bands: Sequence[str],
    sensor: Sensor,
) -> None:
    """Draw images that were classified rightly, framed green, above those classified wrongly, framed red.

    Args:
        target: the PNG to write, whole or not at all.
        images: (N, C, H, W), in the sensor's units (not normalized); a dozen are easy to look at.
        truth: N names of classes; of several labels the names joined by commas.
        predicted: N names likewise; an image is right if it equals the truth.
        confidence: N probabilities of the prediction, 0-1.
        bands: names of the C bands.
        sensor: their sensor.

    Raises:
        ValueError: if the lengths differ or there is no image.
        RunError: if the picture cannot be written.
    """
    lengths = {len(images), len(truth), len(predicted), len(confidence)}
    if len(lengths) > 1 or not len(images) or images.shape[1] != len(bands):
        raise ValueError(
            f"lengths differ: images {tuple(images.shape)}, {len(truth)} true and {len(predicted)} predicted classes, "
            f"{len(confidence)} confidences, {len(bands)} bands"
        )
    pictures, title = colour_pictures(images, bands, sensor)
    captions = [_class_caption(*values) for values in zip(truth, predicted, confidence, strict=True)]
    right = [number for number in range(len(images)) if truth[number] == predicted[number]]
    wrong = [number for number in range(len(images)) if truth[number] != predicted[number]]
    blocks = [block for block in (("✓ right", RIGHT, right), ("✗ wrong", WRONG, wrong)) if block[2]]
    columns = min(_COLUMNS, max(len(numbers) for _, _, numbers in blocks))
    heights = [0.3 + _grid_height([captions[i] for i in numbers], columns) for _, _, numbers in blocks]
    figure = Figure(figsize=(max(columns * _CELL, 3.0), sum(heights) + 0.3), layout="constrained")
    parts: Any = figure.subfigures(len(blocks), 1, height_ratios=heights, squeeze=False)[:, 0]
    for part, (name, colour, numbers) in zip(parts, blocks, strict=True):
        part.suptitle(name, fontsize=11, color=colour, fontweight="bold")
        _draw_grid(part, pictures[numbers], [captions[i] for i in numbers], columns, colour)
    figure.suptitle(title, fontsize=9, color="0.35")
    save_figure(figure, target)


def plot_mask_predictions(
    target: Path,
    images: Tensor,
    truth: Tensor,
    predicted: Tensor,
    classes: Sequence[str],
    ignore_index: int | None,
    bands: Sequence[str],
    sensor: Sensor,
) -> None:
    """Draw input, true mask, predicted mask and where the two differ, side by side, a row for each image.

    A class has the same colour in every picture, as long as there are no more classes than colours; else the commonest
    classes here have one each and the others share black. Ignored pixels are grey in truth and errors.

    Args:
        target: the PNG to write, whole or not at all.
        images: (N, C, H, W), in the sensor's units (not normalized).
        truth: (N, H, W), class indices.
        predicted: (N, H, W), class indices.
        classes: names of the K classes.
        ignore_index: value of the truth that is not a class.
        bands: names of the C bands.
        sensor: their sensor.

    Raises:
        ValueError: if the shapes differ, there is no image, or a mask holds a value that is no class.
        RunError: if the picture cannot be written.
    """
    if not truth.shape == predicted.shape == (len(images), *images.shape[2:]) or images.shape[1] != len(bands):
        raise ValueError(
            f"shapes differ: images {tuple(images.shape)}, masks {tuple(truth.shape)} and {tuple(predicted.shape)}, "
            f"{len(bands)} bands"
        )
    if not len(images):
        raise ValueError("no image to draw")
    true, guessed = (x.detach().cpu().long().numpy() for x in (truth, predicted))
    ignored = np.zeros(true.shape, bool) if ignore_index is None else true == ignore_index
    values, counts = np.unique(np.concatenate([true[~ignored], guessed.ravel()]), return_counts=True)
    alien = [int(value) for value in values if not 0 <= value < len(classes)]
    if alien:
        raise ValueError(f"a mask holds {', '.join(map(str, alien))}, but there are {len(classes)} classes")
    colours = _class_colours(values, counts, len(classes))
    table = np.array([to_rgb(colours.get(value, _OTHER)) for value in range(len(classes))])
    grey = np.array(to_rgb(_IGNORED))
    differ = np.where((true != guessed)[..., None], to_rgb(WRONG), to_rgb(_AGREEING))
    inputs, title = colour_pictures(images, bands, sensor)
    columns = {
        "input": inputs,
        "truth": np.where(ignored[..., None], grey, table[np.where(ignored, 0, true)]),
        "prediction": table[guessed],
        "errors": np.where(ignored[..., None], grey, differ),
    }
    legend = [Patch(color=colours[value], label=_shortened(classes[value], 1)) for value in colours]
    legend += [Patch(color=_OTHER, label="other classes")] if len(colours) < len(values) else []
    legend += [Patch(color=_IGNORED, label="ignored")] if ignored.any() else []
    legend += [Patch(color=WRONG, label="wrong")]
    legend_lines = -(-len(legend) // 4)
    figure = Figure(figsize=(8.4, 2.2 * len(images) + 0.5 + 0.2 * legend_lines), layout="constrained")
    grid: Any = figure.subplots(len(images), len(columns), squeeze=False)
    for column, (label, pictures) in enumerate(columns.items()):
        grid[0, column].set_title(label, fontsize=10)
        for axis, picture in zip(grid[:, column], pictures, strict=True):
            _draw_image(axis, picture, _PLAIN)
    for axis, *masks in zip(grid[:, -1], true, guessed, ignored, strict=True):
        axis.set_xlabel(_share_wrong(*masks), fontsize=8)
    figure.legend(handles=legend, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=9, color="0.35")
    save_figure(figure, target)


def plot_value_predictions(
    target: Path,
    truth: npt.ArrayLike,
    predicted: npt.ArrayLike,
    name: str,
    unit: str = "",
    *,
    images: Tensor | None = None,
    positions: Sequence[int] | npt.NDArray[np.int64] = (),
    bands: Sequence[str] = (),
    sensor: Sensor | None = None,
) -> None:
    """Draw predicted against true values, and beside them some images, such as those of the largest errors.

    Many points are drawn as a density. The title gives the root mean squared error and the coefficient of
    determination (1 - squared error / squared deviation of the truth from its mean).

    Args:
        target: the PNG to write, whole or not at all.
        truth: (N,).
        predicted: (N,).
        name: what is predicted.
        unit: its unit.
        images: (M, C, H, W), in the sensor's units (not normalized).
        positions: where each of the M images stands among the N values.
        bands: names of the C bands.
        sensor: their sensor.

    Raises:
        ValueError: if the lengths differ, there is no finite value, or images come without their bands and sensor.
        RunError: if the picture cannot be written.
    """
    true, guessed = (np.asarray(x, dtype=np.float64) for x in (truth, predicted))
    if true.shape != guessed.shape or true.ndim != 1:
        raise ValueError(f"shapes differ: {true.shape} true and {guessed.shape} predicted values")
    finite = np.isfinite(true) & np.isfinite(guessed)
    if not finite.any():
        raise ValueError("no value to draw is finite")
    if images is None or not len(images):
        figure = Figure(figsize=(4.8, 4.9), layout="constrained")
        _draw_values(figure.add_subplot(), true[finite], guessed[finite], name, unit, int((~finite).sum()))
        save_figure(figure, target)
        return
    if sensor is None or images.shape[1] != len(bands) or len(images) != len(positions):
        raise ValueError(
            f"images {tuple(images.shape)} with {len(positions)} positions, {len(bands)} bands"
            f"{'' if sensor else ' and no sensor'}"
        )
    pictures, title = colour_pictures(images, bands, sensor)
    captions = [f"predicted {_with_unit(guessed[i], unit)}\ntruth {_with_unit(true[i], unit)}" for i in positions]
    columns = min(4, len(images))
    height = _grid_height(captions, columns)
    width = max(columns * _CELL, 3.0)
    figure = Figure(figsize=(4.8 + width, max(4.9, height + 0.3)), layout="constrained")
    parts: Any = figure.subfigures(1, 2, width_ratios=[4.8, width])
    left, right = parts
    _draw_values(left.add_subplot(), true[finite], guessed[finite], name, unit, int((~finite).sum()))
    right.suptitle(title, fontsize=9, color="0.35")
    _draw_grid(right, pictures, captions, columns, _PLAIN)
    save_figure(figure, target)


def _class_caption(truth: str, predicted: str, confidence: float) -> str:
    sure = f"{100 * confidence:.0f} %"
    if truth == predicted:
        return f"{_shortened(truth)}\n{sure}"
    return f"{_shortened(f'predicted: {predicted}')}\n{sure}\n{_shortened(f'truth: {truth}')}"


def _shortened(name: str, lines: int = _LINES) -> str:
    """Broken into lines, at underscores as well, and cut where they are too many."""
    return "\n".join(wrap(name.replace("_", " "), _CHARACTERS, max_lines=lines, placeholder=" …"))


def _class_colours(values: npt.NDArray[np.int64], counts: npt.NDArray[np.int64], classes: int) -> dict[int, str]:
    """Colours of the classes that occur, by index."""
    if classes <= len(CLASS_COLOURS):
        return {int(value): CLASS_COLOURS[value] for value in values}
    commonest = np.sort(values[np.argsort(-counts, kind="stable")[: len(CLASS_COLOURS)]])
    return {int(value): colour for value, colour in zip(commonest, CLASS_COLOURS, strict=False)}


def _share_wrong(truth: npt.NDArray[np.int64], predicted: npt.NDArray[np.int64], ignored: npt.NDArray[np.bool_]) -> str:
    return "all ignored" if ignored.all() else f"{100 * (truth != predicted)[~ignored].mean():.1f} % wrong"


def _grid_height(captions: Sequence[str], columns: int) -> float:
    """Inches of the rows of images with their captions."""
    rows = batched(captions, columns)
    return sum(_CELL + _LINE * max(caption.count("\n") + 1 for caption in row) for row in rows)


def _draw_grid(part: Any, pictures: Array, captions: Sequence[str], columns: int, frame: str) -> None:
    """Draw framed images with captions below, row by row, into a (sub)figure."""
    grid = part.subplots(-(-len(pictures) // columns), columns, squeeze=False).ravel()
    for axis in grid[len(pictures) :]:
        axis.set_axis_off()
    for axis, picture, caption in zip(grid, pictures, captions, strict=False):
        _draw_image(axis, picture, frame)
        axis.set_xlabel(caption, fontsize=7.5)


def _draw_image(axis: Axes, picture: Array, frame: str) -> None:
    axis.imshow(picture, interpolation="nearest")
    axis.set_anchor("S")  # the layout leaves room for a caption only below where the axes were before their aspect
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set(color=frame, linewidth=0.7 if frame == _PLAIN else 2.5)


def _draw_values(axis: Axes, truth: Array, predicted: Array, name: str, unit: str, dropped: int) -> None:
    ends = float(min(truth.min(), predicted.min())), float(max(truth.max(), predicted.max()))
    margin = 0.04 * (ends[1] - ends[0]) or 1.0
    low, high = ends[0] - margin, ends[1] + margin
    if len(truth) < _HEXBIN_FROM:
        axis.scatter(truth, predicted, s=14, alpha=0.5, color=CLASS_COLOURS[0], linewidths=0)
    else:
        density = axis.hexbin(
            truth, predicted, gridsize=50, bins="log", mincnt=1, cmap="viridis_r", extent=(low, high, low, high)
        )
        axis.figure.colorbar(density, ax=axis, shrink=0.7, pad=0.02, label="samples")
    axis.plot([low, high], [low, high], color="0.4", lw=1, ls="--", zorder=0)
    axis.set(xlim=(low, high), ylim=(low, high), aspect="equal")
    label = f"{name} ({unit})" if unit else name
    axis.set_xlabel(f"true {label}")
    axis.set_ylabel(f"predicted {label}")
    error = float(np.square(predicted - truth).mean())
    deviation = float(truth.var())
    determination = f", R² {1 - error / deviation:.3f}" if deviation else ""
    left_out = f"\n{dropped} not finite, left out" if dropped else ""
    axis.set_title(f"RMSE {_with_unit(error**0.5, unit)}{determination}{left_out}", fontsize=10)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def _with_unit(value: float, unit: str) -> str:
    return f"{value:.4g} {unit}".rstrip()
