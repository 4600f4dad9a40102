"""Many samples of one figure, reported as median, p10 and p90."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Spread(NamedTuple):
    """Median, p10 and p90 of a number of samples, in their unit."""

    median: float
    p10: float
    p90: float
    samples: int

    @classmethod
    def of(cls, samples: Iterable[float]) -> Spread:
        """The spread of the samples. Raises `ValueError` if there are none."""
        import numpy as np

        values = np.fromiter(samples, np.float64)
        if not len(values):
            raise ValueError("a spread needs at least one sample")
        p10, median, p90 = np.percentile(values, (10, 50, 90))
        return cls(float(median), float(p10), float(p90), len(values))

    @property
    def width(self) -> float:
        """The distance from p10 to p90, as a fraction of the median."""
        return (self.p90 - self.p10) / self.median if self.median else 0.0

    def scaled(self, factor: float) -> Spread:
        """The spread of the samples times `factor`."""
        return Spread(self.median * factor, self.p10 * factor, self.p90 * factor, self.samples)

    def plus(self, other: Spread) -> Spread:
        """The spread of the sum of two quantities, assuming that both are at their p10, or p90, at the same time."""
        samples = min(self.samples, other.samples)
        return Spread(self.median + other.median, self.p10 + other.p10, self.p90 + other.p90, samples)

    def rate(self, amount: float) -> Spread:
        """Rates, `amount` per second, of samples in seconds; the slowest times become the lowest rates."""
        return Spread(amount / self.median, amount / self.p90, amount / self.p10, self.samples)

    def text(self, unit: str = "", digits: int = 3) -> str:
        """Formatted like "4.12 (3.98-4.20) tok/s"."""
        median, low, high = (f"{value:.{digits}g}" for value in self[:3])
        return f"{median} ({low}-{high}){' ' if unit else ''}{unit}"


def percentiles(samples: Iterable[float]) -> dict[str, float]:
    """p50, p95 and p99, as latencies are reported; empty without samples."""
    import numpy as np

    values = np.fromiter(samples, np.float64)
    return {} if not len(values) else {f"p{p}": float(np.percentile(values, p)) for p in (50, 95, 99)}
