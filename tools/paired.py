"""Two checkpoints on the same scenes: how far apart their rates are, and how sure that is.

Answers about one image are not independent of each other, so that scenes are what is drawn again (bootstrap, Efron
and Tibshirani 1993, section 13.3): the same ones for both checkpoints, since what is hard for one is hard for the
other.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

DRAWS = 4000
AT_ONCE = 100  # draws held in memory together


class Ratio(NamedTuple):
    """A rate, scene by scene: the sum of `amounts` over the sum of `counts`."""

    amounts: NDArray[np.float64]  # [scenes]
    counts: NDArray[np.float64]  # [scenes]

    @property
    def value(self) -> float:
        """The rate over all scenes."""
        return float(self.amounts.sum() / self.counts.sum())


class Difference(NamedTuple):
    """A difference of two rates with its 95 % interval."""

    value: float
    low: float  # of the interval that holds it 95 times in 100
    high: float

    @property
    def certain(self) -> bool:
        """Whether zero is outside the interval."""
        return self.low > 0 or self.high < 0


def difference(one: Ratio, other: Ratio, seed: int = 0) -> Difference:
    """How much higher the rate of `one` is than that of `other`, both of the same scenes."""
    low, high = np.percentile(_drawn(one, other, seed), (2.5, 97.5))
    return Difference(one.value - other.value, float(low), float(high))


def standard_error(one: Ratio, other: Ratio, seed: int = 0) -> float:
    """The standard error of that difference over draws of the scenes."""
    return float(_drawn(one, other, seed).std())


def _drawn(one: Ratio, other: Ratio, seed: int) -> NDArray[np.float64]:
    """The difference of the rates in each draw of the scenes."""
    rng, scenes = np.random.default_rng(seed), len(one.counts)
    drawn = []
    for _ in range(0, DRAWS, AT_ONCE):
        at = rng.integers(scenes, size=(AT_ONCE, scenes))
        rates = (r.amounts[at].sum(1) / r.counts[at].sum(1) for r in (one, other))
        drawn.append(next(rates) - next(rates))
    return np.concatenate(drawn)
