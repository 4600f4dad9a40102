"""Paired differences: exact where there is nothing to draw, and as sure as the scenes allow."""

from __future__ import annotations

import numpy as np
import pytest

from tools.paired import Ratio, difference, standard_error

pytestmark = pytest.mark.unit


def test_a_constant_lead_has_no_spread() -> None:
    one, other = (Ratio(np.full(7, amount), np.full(7, 4.0)) for amount in (3.0, 1.0))
    assert difference(one, other) == (0.5, 0.5, 0.5) and difference(one, other).certain


def test_what_is_hard_for_both_is_no_doubt_about_either() -> None:
    """Scenes that differ a lot, and a small lead in each: sure when paired."""
    rng = np.random.default_rng(0)
    hard = rng.uniform(0, 10, 200)
    one, other = Ratio(hard + 0.1 + rng.normal(0, 0.1, 200), np.ones(200)), Ratio(hard, np.ones(200))
    found = difference(one, other)
    assert found.certain and found.low < found.value < found.high and found.high - found.low < 0.05
    apart = difference(Ratio(one.amounts[::-1], one.counts), other)
    assert not apart.certain and apart.high - apart.low > 1


def test_the_interval_is_that_of_theory() -> None:
    """Of a mean of n normal differences of spread s: 1.96 s / sqrt(n) to each side, within a tenth."""
    rng = np.random.default_rng(1)
    one, other = Ratio(rng.normal(1, 2, 400), np.ones(400)), Ratio(np.zeros(400), np.ones(400))
    found, half = difference(one, other), 1.96 * one.amounts.std() / 400**0.5
    assert found.value - found.low == pytest.approx(half, rel=0.1)
    assert found.high - found.value == pytest.approx(half, rel=0.1)
    assert 1.96 * standard_error(one, other) == pytest.approx(half, rel=0.1)
