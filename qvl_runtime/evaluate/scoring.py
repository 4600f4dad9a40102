"""From answers to marks, and from marks to scores: what all metrics have in common."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from qvl_runtime.evaluate.samples import Sample

Totals = Mapping[str, Mapping[str, float]]  # a score by name: the sum of these rates, each times its weight


class Answer(NamedTuple):
    """What became of a sample."""

    number: int  # of the sample, in the order of the file
    sample: Sample
    text: str  # empty for an error
    error: str | None = None


class Mark(NamedTuple):
    """A contribution to a rate: the mean of all marks of one name."""

    name: str
    picture: str  # marks of one picture are not independent of each other
    value: float  # 0 to 1; of CIDEr-D 0 to 10
    number: int  # of the sample it comes from


class Context(NamedTuple):
    """What scoring depends on besides the answers."""

    scale: int = 999  # of the boxes' coordinates


@dataclass(frozen=True, slots=True)
class Metric:
    """How answers are compared and counted."""

    name: str
    marks: Callable[[Sequence[Answer], Context], list[Mark]]
    processed: Callable[[str], str] = str.strip  # the text that is compared
    totals: Callable[[Collection[str]], Totals] | None = None  # from the names of the marks; None: each by itself
    whole_set: bool = False  # a score depends on all samples of the run, so that a part compares with nothing
    out_of: float = 100.0

    def scores(self, names: Collection[str]) -> Totals:
        """The scores of a run with marks of these names, the headline first."""
        if self.totals is not None:
            return self.totals(names)
        ordered = [self.name, *sorted(name for name in names if name != self.name)]
        return {name: {name: 100.0} for name in ordered if name in names}


def each(score: Callable[[Answer, Context], Mapping[str, float]]) -> Callable[[Sequence[Answer], Context], list[Mark]]:
    """Marks of a metric that looks at one answer at a time; `score` returns values by name."""

    def marks(answers: Sequence[Answer], context: Context) -> list[Mark]:
        return [
            Mark(name, answer.sample.picture, value, answer.number)
            for answer in answers
            for name, value in score(answer, context).items()
        ]

    return marks
