"""How sure a mean is: the percentile bootstrap (Efron & Tibshirani, An Introduction to the Bootstrap, 1993, ch. 13)."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES, SEED, LEVEL = 10_000, 0, 0.95

Interval = tuple[float, float]


def about(resamples: int = RESAMPLES, seed: int = SEED) -> dict[str, Any]:
    """What an interval was drawn with, for a report."""
    return {"resamples": resamples, "seed": seed, "level": LEVEL}


def interval(values: NDArray[np.float64], resamples: int = RESAMPLES, seed: int = SEED) -> Interval | None:
    """The 95 % interval of the mean of values (n,), drawn with replacement; None if there is only one."""
    if len(values) < 2:
        return None
    drawn = values[draws(len(values), resamples, seed)].mean(axis=1)  # (resamples,)
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


@lru_cache(maxsize=8)
def draws(n: int, resamples: int, seed: int) -> NDArray[np.int64]:
    """Which of n values each resample holds (resamples, n): the same for all columns of a table, so that they agree."""
    return np.random.default_rng(seed).integers(0, n, (resamples, n))
