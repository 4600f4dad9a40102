"""Many samples of one figure, said as median, p10 and p90: a figure without its spread is not believed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Spread(NamedTuple):
    """Of so many samples, in their unit."""

    median: float
    p10: float
    p90: float
    samples: int

    @classmethod
    def of(cls, taken: Iterable[float]) -> Spread:
        """Raises `ValueError` where there are none."""
        import numpy as np

        values = np.fromiter(taken, np.float64)
        if not len(values):
            raise ValueError("a spread needs at least one sample")
        p10, median, p90 = np.percentile(values, (10, 50, 90))
        return cls(float(median), float(p10), float(p90), len(values))

    @property
    def width(self) -> float:
        """How far apart p10 and p90 are, as a share of the median."""
        return (self.p90 - self.p10) / self.median if self.median else 0.0

    def scaled(self, factor: float) -> Spread:
        return Spread(self.median * factor, self.p10 * factor, self.p90 * factor, self.samples)

    def plus(self, other: Spread) -> Spread:
        """Of work that is done after the other: as if both were at their p10 together, and at their p90."""
        samples = min(self.samples, other.samples)
        return Spread(self.median + other.median, self.p10 + other.p10, self.p90 + other.p90, samples)

    def rate(self, amount: float) -> Spread:
        """Of samples in seconds: `amount` a second. The slowest times are the lowest rates."""
        return Spread(amount / self.median, amount / self.p90, amount / self.p10, self.samples)

    def said(self, unit: str = "", digits: int = 3) -> str:
        """Such as "4.12 (3.98-4.20) tok/s"."""
        median, low, high = (f"{value:.{digits}g}" for value in self[:3])
        return f"{median} ({low}-{high}){' ' if unit else ''}{unit}"


def percentiles(samples: Iterable[float]) -> dict[str, float]:
    """p50, p95 and p99, as latencies are said."""
    import numpy as np

    values = np.fromiter(samples, np.float64)
    return {} if not len(values) else {f"p{p}": float(np.percentile(values, p)) for p in (50, 95, 99)}
