"""Labels and neighbours that a probe is asked to take, against those that there are.

Shapes: N rows of all splits, K classes.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geoexplora.errors import ConfigError
from geoexplora.tasks.classifiers import Folds
from geoexplora.tasks.probe.rows import Index

log = logging.getLogger(__name__)


def class_sizes(labels: Index, folds: Folds, classes: int) -> NDArray[np.int64]:
    """(folds, K) training samples of each class."""
    return np.stack([np.bincount(labels[train], minlength=classes) for train, _ in folds])


def refuse_few(shots: Sequence[int], sizes: NDArray[np.int64]) -> None:
    """Refuse to draw more labels of each class than any class has.

    Args:
        shots: training samples of each class.
        sizes: (folds, K) those there are.

    Raises:
        ConfigError: if no class has as many as any number.
    """
    if min(shots) > sizes.max():
        raise ConfigError(
            f"--few-shot {min(shots)}: no class has more than {sizes.max()} training samples",
            "Take fewer, or leave it out to learn from all.",
        )


def usable_shots(shots: Sequence[int], labels: Index, folds: Folds, classes: Sequence[str]) -> tuple[int, ...]:
    """The numbers of labels that some class has; names the classes with fewer, as their draws are not balanced.

    Args:
        shots: training samples of each class.
        labels: (N,).
        folds: pairs of rows to train and to test on.
        classes: K names.

    Raises:
        ConfigError: if no class has as many as any number.
    """
    sizes = class_sizes(labels, folds, len(classes))
    if shots:
        refuse_few(shots, sizes)
    least, most = sizes.min(0), sizes.max()
    usable = []
    for count in sorted(set(shots)):
        if count > most:
            log.warning(
                "--few-shot %d is left out: no class has more than %d training samples; without --few-shot all are"
                " learned from",
                count,
                most,
            )
            continue
        usable.append(count)
        short = [at for at in range(len(classes)) if least[at] < count and sizes[:, at].any()]
        if short:
            named = ", ".join(f"{classes[at]} {least[at]}" for at in short[:8])
            log.warning(
                "--few-shot %d: not balanced, as these classes have fewer training samples: %s%s",
                count,
                named,
                f" and {len(short) - 8} more" if len(short) > 8 else "",
            )
    return tuple(usable)


def tell_fewer_neighbours(options: Any, folds: Folds) -> None:
    """Warn of numbers of neighbours, other than the usual ones, above the number of training samples.

    Args:
        options: settings of ``geoexplora probe``.
        folds: pairs of rows to train and to test on.
    """
    least = min(len(train) for train, _ in folds)
    above = ",".join(str(k) for k in options.k if k > least)
    if above and options.k != type(options).k and "knn" in (options.classifiers or ("knn",)):
        log.warning("--k %s: there are only %d training samples, so that k is %d", above, least, least)
