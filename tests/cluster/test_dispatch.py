"""Rows go to workers, come back when one dies, and end whatever happens. No Ray: workers are names."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qvl_runtime.cluster.dispatch import LIVES, Dispatch
from qvl_runtime.cluster.rows import Row
from qvl_runtime.reading.lines import Line

pytestmark = pytest.mark.unit


def rows(count: int) -> list[Row]:
    return [Row(i, Line(i + 1, b"{}", 2)) for i in range(count)]


def chunked(count: int, size: int = 4) -> Dispatch:
    made = rows(count)
    return Dispatch(made[i : i + size] for i in range(0, count, size))


def positions(taken: list[Row]) -> list[int]:
    return [row.position for row in taken]


def test_a_worker_gets_chunks_until_it_has_enough() -> None:
    dispatch = chunked(20)
    assert positions(dispatch.take("a", 6)) == [0, 1, 2, 3]
    assert positions(dispatch.take("a", 6)) == [4, 5, 6, 7]
    assert dispatch.take("a", 6) == []
    dispatch.answered("a", [0, 1, 2])
    assert positions(dispatch.take("a", 6)) == [8, 9, 10, 11]


def test_suspects_are_answered_alone_while_other_workers_go_on_with_the_rest() -> None:
    dispatch = chunked(12)
    assert len(dispatch.take("a", 4)) == len(dispatch.take("b", 4)) == 4
    assert dispatch.lost("a") == []
    assert positions(dispatch.take("b", 8)) == [8, 9, 10, 11]  # it has rows of its own, so it gets no suspect
    assert positions(dispatch.take("c", 8)) == [0]
    assert dispatch.take("c", 8) == []
    dispatch.answered("c", [0])
    assert positions(dispatch.take("c", 8)) == [1]
    dispatch.answered("b", [4, 5, 6, 7, 8, 9, 10, 11])
    assert positions(dispatch.take("b", 8)) == [2]  # nothing else is left to do
    assert not dispatch.is_over
    dispatch.answered("b", [2])
    dispatch.answered("c", [1])
    assert positions(dispatch.take("b", 8)) == [3]
    dispatch.answered("b", [3])
    assert dispatch.is_over


def test_a_row_that_kills_twice_is_given_up_and_the_others_are_answered() -> None:
    guilty, answered, hopeless = 5, set(), []
    dispatch = chunked(12)
    for number in range(100):
        worker = f"w{number}"  # a new one for each that died
        while taken := dispatch.take(worker, 8):
            if any(row.position == guilty for row in taken):
                hopeless += dispatch.lost(worker)
                break
            dispatch.answered(worker, positions(taken))
            answered |= set(positions(taken))
        if dispatch.is_over:
            break
    assert number == LIVES and positions(hopeless) == [guilty]
    assert answered == set(range(12)) - {guilty}


@given(st.integers(0, 60), st.integers(1, 9), st.integers(1, 4), st.integers(1, 30), st.integers(0, 2**32))
def test_every_row_ends_once_whenever_workers_die(count: int, size: int, workers: int, room: int, seed: int) -> None:
    dice = random.Random(seed)
    dispatch = chunked(count, size)
    names = {f"w{i}" for i in range(workers)}
    held: dict[str, list[int]] = {name: [] for name in names}
    ended: list[int] = []
    born, deaths = workers, 0
    while not dispatch.is_over:
        for name in sorted(names):
            while taken := dispatch.take(name, room):
                held[name] += positions(taken)
        busy = [name for name in sorted(names) if held[name]]
        assert busy, "rows are left and no worker has any"
        name = dice.choice(busy)
        if dice.random() < 0.2 and deaths < 50:
            deaths += 1
            ended += positions(dispatch.lost(name))
            names.discard(name)
            held.pop(name)
            names.add(f"w{born}")
            held[f"w{born}"] = []
            born += 1
        else:
            some = dice.sample(held[name], dice.randint(1, len(held[name])))
            dispatch.answered(name, some)
            ended += some
            held[name] = [position for position in held[name] if position not in some]
    assert sorted(ended) == list(range(count))
