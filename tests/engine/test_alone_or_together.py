"""The promise of the engine: a request gets the tokens and log probabilities that it gets alone, bit by bit."""

from __future__ import annotations

import os
from typing import Any

import pytest

from benchmarks.serving.invariance import SETTINGS, alone, together

pytestmark = pytest.mark.cpu
# 500 of every setting take half an hour on two cores: `python -m benchmarks.serving.invariance`
REQUESTS = int(os.environ.get("QVL_INVARIANCE_REQUESTS", "20"))
# What each has of its own: drafts and chunks in bfloat16, preemption, an int8 cache, packed weights, int8 activations.
CHOSEN = [
    "bfloat16, drafts",
    "bfloat16, overlap",
    "bfloat16, preemption",
    "bfloat16, int8 cache",
    "Int4, bfloat16",
    "Int4, bfloat16, fast",
]


@pytest.fixture(scope="module")
def references() -> dict[str, list[list[Any]]]:
    """The answers alone, by the numbers of a setting."""
    return {}


@pytest.mark.parametrize("name", CHOSEN if "QVL_INVARIANCE_REQUESTS" not in os.environ else [*SETTINGS])
def test_requests_get_together_what_each_gets_alone(name: str, references: dict[str, list[list[Any]]]) -> None:
    chosen = SETTINGS[name]
    key = str((chosen.model, chosen.numbers))
    if key not in references:
        references[key] = alone(chosen, REQUESTS)
    found = together(chosen, references[key])
    assert found.differ == []
    assert not chosen.preempt or found.preemptions > 0
