"""What all figures of a run share."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from geoexplora.weights.atomic import atomic_path


def save_figure(figure: Figure, target: Path) -> None:
    """Write a figure as a PNG, whole or not at all; the same figure gives the same bytes.

    Raises:
        RunError: if it cannot be written.
    """
    with atomic_path(target) as temporary:
        figure.savefig(temporary, format="png", dpi=130, metadata={"Software": None})
