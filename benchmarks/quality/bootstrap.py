"""Figures of several training runs on the same items, with intervals that know both."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Statistic = Callable[[Floats], Floats]
"""A figure of one run as a function of how often each item counts: ``[k, items]`` to ``[k]``."""

DRAWS = 2000


@dataclass(frozen=True)
class Estimate:
    """A mean and the draws of its bootstrap."""

    mean: float
    draws: Floats

    @property
    def bounds(self) -> tuple[float, float]:
        """Ends of the 95 % interval."""
        low, high = np.percentile(self.draws, (2.5, 97.5))
        return float(low), float(high)

    def __sub__(self, other: "Estimate") -> "Estimate":
        return Estimate(self.mean - other.mean, self.draws - other.draws)

    @property
    def verdict(self) -> str:
        """Of a difference, in words."""
        low, high = self.bounds
        return "better" if low > 0 else "worse" if high < 0 else "not told apart"

    def text(self, sign: str = "") -> str:
        """In percent, e.g. ``83.1 [80.2, 86.0]``."""
        low, high = self.bounds
        return f"{100 * self.mean:{sign}.1f} [{100 * low:{sign}.1f}, {100 * high:{sign}.1f}]"


def estimate(statistics: Sequence[Statistic], items: int) -> Estimate:
    """Mean of a figure over runs; runs and items are drawn anew with replacement, apart from each other.

    Equal numbers of items, and of runs, are drawn alike, so that a difference of two estimates is a paired one.

    Args:
        statistics: The figure of every run.
        items: Number of items, the same ones for all runs.
    """
    counts = _counts(items)
    runs = np.random.default_rng(1).integers(len(statistics), size=(DRAWS, len(statistics)))
    values = np.stack([of(counts) for of in statistics], 1)  # [DRAWS, runs]
    draws = np.take_along_axis(values, runs, 1).mean(1)
    return Estimate(float(np.mean([of(np.ones((1, items)))[0] for of in statistics])), draws)


@cache  # every figure of a page is drawn alike
def _counts(items: int) -> Floats:
    """``[DRAWS, items]`` how often each item is drawn."""
    drawn = np.random.default_rng(0).integers(items, size=(DRAWS, items))
    return np.stack([np.bincount(row, minlength=items) for row in drawn]).astype(np.float64)


def mean_of(values: Floats) -> Statistic:
    """The statistic that is the mean of one value an item, ``[items]``."""
    return lambda counts: counts @ values / counts.sum(1)
