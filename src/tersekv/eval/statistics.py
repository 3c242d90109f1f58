"""Means with bootstrap intervals over samples, and numbers as short as they are exact."""

from collections.abc import Sequence
from typing import Any

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95


def interval(values: Sequence[float | int], seed: int = 0) -> tuple[float, float] | None:
    """Percentile bootstrap of the mean: resample the samples with replacement. None for fewer than two samples.

    For a difference, pass the differences of paired samples: what both arms share then cancels.
    """
    x = np.asarray(values, dtype=np.float64)
    if len(x) < 2:
        return None
    drawn = np.random.default_rng(seed).integers(len(x), size=(RESAMPLES, len(x)))
    low, high = np.quantile(x[drawn].mean(-1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def mean_and_interval(name: str, values: Sequence[float | int], seed: int = 0) -> dict[str, Any]:
    """{name: mean, name_interval: [low, high] or None}."""
    found = interval(values, seed)
    return {name: float(np.mean(values)), f"{name}_interval": None if found is None else list(found)}


def difference(mine: Sequence[float | int], other: Sequence[float | int], seed: int = 0) -> dict[str, Any]:
    """Of samples in the same order: {difference: mean, difference_interval}. Raises ValueError for other lengths."""
    return mean_and_interval("difference", [x - y for x, y in zip(mine, other, strict=True)], seed)


def digits(value: float, count: int = 4) -> float:
    """Rounded to significant digits, so that a line of a thousand numbers stays readable."""
    return float(f"{value:.{count}g}")
