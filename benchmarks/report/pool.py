"""Several passes over the same figures, minutes apart, as one: so that the spread shows how much the machine drifts."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from qvl_runtime.profile.spread import Spread


def pooled(passes: Sequence[Any]) -> Any:
    """One record of many, all of the same JSON shape.

    A spread becomes the median of the medians, from the lowest p10 to the highest p90; any other number the median.
    A figure or the end of a list that later passes leave out is taken from those that have it; text is the first
    pass's.
    """
    first = passes[0]
    if isinstance(first, dict):
        if first.keys() == set(Spread._fields):
            return _spread(passes)
        return {key: pooled([value[key] for value in passes if value.get(key) is not None] or [None]) for key in first}
    if isinstance(first, list):
        return [pooled([values[i] for values in passes if i < len(values)]) for i in range(len(first))]
    if isinstance(first, int | float) and not isinstance(first, bool):
        return first if len(set(passes)) == 1 else statistics.median(passes)
    return first


def _spread(passes: Sequence[dict[str, float]]) -> dict[str, float]:
    return Spread(
        median=statistics.median(value["median"] for value in passes),
        p10=min(value["p10"] for value in passes),
        p90=max(value["p90"] for value in passes),
        samples=int(sum(value["samples"] for value in passes)),
    )._asdict()
