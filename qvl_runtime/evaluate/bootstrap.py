"""95 % intervals: pictures are drawn again, with replacement (Efron and Tibshirani 1993, section 13.3).

Answers about one picture are not independent of each other, so that pictures are what is drawn: the same ones for rates
over the same pictures, others for rates over others. CIDEr-D's weights stay those of the whole run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from qvl_runtime.evaluate.scoring import Mark, Metric

DRAWS = 2000
AT_ONCE = 50  # draws held in memory together


class Interval(NamedTuple):
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float


class _Rate(NamedTuple):
    """A rate by picture: the sum of `amounts` over the sum of `counts`."""

    amounts: NDArray[np.float64]  # [pictures]
    counts: NDArray[np.float64]  # [pictures]
    key: int  # of the set of pictures


def score_intervals(metric: Metric, marks: Sequence[Mark], seed: int = 0) -> dict[str, Interval]:
    """Each score of a run, in percent where it is a share, with its interval."""
    return _intervals(metric, [marks], seed)


def difference_intervals(
    metric: Metric, one: Sequence[Mark], other: Sequence[Mark], seed: int = 0
) -> dict[str, Interval]:
    """How much higher each score of `one` is than of `other`, two runs with marks of the same pictures.

    The same pictures are drawn for both: what is hard for one is hard for the other.
    """
    return _intervals(metric, [one, other], seed)


def _intervals(metric: Metric, runs: Sequence[Sequence[Mark]], seed: int) -> dict[str, Interval]:
    names = list(dict.fromkeys(mark.name for marks in runs for mark in marks))
    sign = (1.0, -1.0)
    values: dict[str, float] = {}
    drawn: dict[str, NDArray[np.float64]] = {}
    for name in names:
        rates = _rates(runs, name)
        values[name] = sum(
            s * float(rate.amounts.sum() / rate.counts.sum()) for s, rate in zip(sign, rates, strict=False)
        )
        drawn[name] = _draws(rates, seed)
    found = {}
    for score, weights in metric.scores(names).items():
        sample = sum((weight * drawn[name] for name, weight in weights.items()), np.zeros(DRAWS))
        low, high = np.percentile(sample, (2.5, 97.5))
        found[score] = Interval(sum(w * values[name] for name, w in weights.items()), float(low), float(high))
    return found


def _rates(runs: Sequence[Sequence[Mark]], name: str) -> list[_Rate]:
    """The rate of this name in each run, over the pictures of all of them."""
    names = sorted({mark.picture for marks in runs for mark in marks if mark.name == name})
    pictures, key = {picture: at for at, picture in enumerate(names)}, crc32("\n".join(names).encode())
    rates = []
    for marks in runs:
        amounts, counts = np.zeros(len(pictures)), np.zeros(len(pictures))
        for mark in marks:
            if mark.name == name:
                amounts[pictures[mark.picture]] += mark.value
                counts[pictures[mark.picture]] += 1
        rates.append(_Rate(amounts, counts, key))
    return rates


def _draws(rates: Sequence[_Rate], seed: int) -> NDArray[np.float64]:
    """The rate, or the difference of two, in each draw: float64 [DRAWS]. A set of pictures is drawn alike each time."""
    pictures, parts = len(rates[0].counts), []
    rng = np.random.default_rng([seed, rates[0].key])
    for _ in range(0, DRAWS, AT_ONCE):
        at = rng.integers(pictures, size=(AT_ONCE, pictures))
        shares = [rate.amounts[at].sum(1) / rate.counts[at].sum(1) for rate in rates]
        parts.append(shares[0] - shares[1] if len(shares) == 2 else shares[0])
    return np.concatenate(parts)
