"""Intervals by drawing pictures again: of a score, and of the difference of two runs."""

from __future__ import annotations

import random

import pytest

from qvl_runtime.evaluate.bootstrap import difference_intervals, score_intervals
from qvl_runtime.evaluate.metrics.table import EXACT, MME, RELAXED
from qvl_runtime.evaluate.scoring import Mark

pytestmark = pytest.mark.unit


def marks(values: list[float], each: int = 1, name: str = "accuracy") -> list[Mark]:
    """`each` marks of every picture."""
    return [Mark(name, f"p{i // each}", value, i) for i, value in enumerate(values)]


def test_an_interval_is_that_of_the_normal_distribution_for_many_pictures() -> None:
    found = score_intervals(EXACT, marks([1.0, 0.0, 1.0, 1.0] * 100))["accuracy"]
    error = 1.96 * (0.75 * 0.25 / 400) ** 0.5 * 100
    assert found.value == 75.0
    assert [found.low, found.high] == pytest.approx([75 - error, 75 + error], abs=0.6)


def test_questions_of_one_picture_count_as_one_draw() -> None:
    values = [1.0] * 40 + [0.0] * 40
    alone = score_intervals(EXACT, marks(values))["accuracy"]
    shared = score_intervals(EXACT, marks(values, each=10))["accuracy"]
    assert shared.high - shared.low > 2.5 * (alone.high - alone.low)


def test_a_difference_of_equal_runs_is_certain() -> None:
    values = [float(random.Random(i).random() < 0.5) for i in range(200)]
    found = difference_intervals(EXACT, marks(values), marks(values))["accuracy"]
    assert tuple(found) == (0.0, 0.0, 0.0)


def test_a_paired_difference_is_narrower_than_the_scores() -> None:
    values = [float(random.Random(i).random() < 0.5) for i in range(300)]
    better = [1.0 if i % 30 == 0 else value for i, value in enumerate(values)]
    found = difference_intervals(EXACT, marks(better), marks(values))["accuracy"]
    gained = sum(b - v for b, v in zip(better, values, strict=True))
    assert found.value == pytest.approx(100 * gained / 300)
    alone = score_intervals(EXACT, marks(values))["accuracy"]
    assert found.high - found.low < 0.4 * (alone.high - alone.low)


def test_rates_over_the_same_pictures_are_drawn_together() -> None:
    # Accuracy and accuracy+ that are right for the same pictures: their sum spreads further than over others.
    one, plus = (marks([1.0, 0.0] * 100, name=f"count: {kind}") for kind in ("accuracy", "accuracy+"))
    others = [mark._replace(picture=f"q{mark.picture}") for mark in plus]
    same, apart = (score_intervals(MME, one + second)["count"] for second in (plus, others))
    assert same.high - same.low == pytest.approx(2**0.5 * (apart.high - apart.low), rel=0.1)


def test_the_mean_of_two_halves_whatever_their_sizes() -> None:
    human, augmented = marks([1.0] * 10, name="human"), marks([0.0] * 90, name="augmented")
    other = [Mark(mark.name, f"q{mark.picture}", mark.value, 10 + mark.number) for mark in augmented]
    assert score_intervals(RELAXED, human + other)["relaxed accuracy"].value == 50.0
