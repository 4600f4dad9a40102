"""Prefetched items come in order, at most a few at a time, and torch's thread count is restored."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing

import pytest
import torch

from qvl_runtime.convert.prefetch import MAX_THREADS, prefetch

pytestmark = pytest.mark.unit


@pytest.fixture
def cores() -> Iterator[int]:
    """Three cores for torch, on any machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield 3
    torch.set_num_threads(before)


def test_results_come_in_order_made_on_one_core_each(cores: int) -> None:
    def make(item: int) -> tuple[int, int]:
        time.sleep(0.01 * (item % 3))  # the third is ready before the second
        return item * item, torch.get_num_threads()

    with closing(prefetch(range(10), make)) as made:
        assert list(made) == [(item, (item * item, 1)) for item in range(10)]
    assert torch.get_num_threads() == cores


def test_no_more_is_made_than_may_wait(cores: int) -> None:
    started: list[int] = []
    with closing(prefetch(range(100), started.append)) as made:
        for item, _ in made:
            assert len(started) <= item + 1 + min(cores, MAX_THREADS)
            if item == 5:
                break
    assert len(started) <= 6 + min(cores, MAX_THREADS) and torch.get_num_threads() == cores


def test_what_fails_is_raised_in_its_turn(cores: int) -> None:
    seen = []
    with pytest.raises(ZeroDivisionError), closing(prefetch([2, 1, 0, 3], lambda item: 6 // item)) as made:
        for _, result in made:
            seen.append(result)
    assert seen == [3, 6] and torch.get_num_threads() == cores


def test_nothing_to_do() -> None:
    assert list(prefetch([], str)) == []
