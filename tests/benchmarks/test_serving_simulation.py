"""The simulation of servers that share cores, where its result can be told by hand. Needs simpy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from benchmarks.serving.simulated_cores import TICK_S, Cores, Thread
from benchmarks.serving.simulation import CLIENTS, ROWS, Arrival, Costs, Holding, simulate, traffic

pytest.importorskip("simpy", reason="simpy is not installed")
pytestmark = pytest.mark.unit
COSTS = Costs(
    steps=tuple(0.001 + 0.0005 * rows for rows in ROWS),
    joining=0.001,
    prefill=0.002,
    picture=0.004,
    pace=(1.0,),
    holding=(Holding(0.3, 1), Holding(0.5, 20), Holding(0.2, 40)),
    front=(0.004,) * len(CLIENTS),
    decode=(0.001,) * len(CLIENTS),
    client=(0.002,) * len(CLIENTS),
)
OUTSIDE = 0.004 + 0.001 + 0.002  # of the model


def test_a_request_alone_takes_the_sum_of_its_parts() -> None:
    took = simulate(COSTS, [Arrival(0.0, 1, 10), Arrival(1.0, 1, 10)], replicas=1, cores=2).took
    known = OUTSIDE + 0.001 + 0.002 + 10 * 0.0015
    assert took == pytest.approx([known + 0.004, known])


def test_a_request_costs_the_server_what_it_does_with_as_many_others() -> None:
    busy = replace(COSTS, front=(0.004, 0.001, 0.001, 0.001, 0.001))
    assert busy.part("front", 1) == 0.004 and busy.part("front", 100) == 0.001
    four = [Arrival(0.0, 1, 1)] * 4
    assert max(simulate(busy, four, replicas=1, cores=64).took) < max(simulate(COSTS, four, replicas=1, cores=64).took)


def test_requests_that_join_together_share_steps() -> None:
    took = simulate(COSTS, [Arrival(0.0, 1, 100)] * 4, replicas=1, cores=4).took
    alone = simulate(COSTS, [Arrival(0.0, 1, 100)], replicas=1, cores=4).took[0]
    assert max(took) < 2.2 * alone  # 4 rows: 0.003 a step rather than 0.0015


def test_two_servers_are_no_faster_than_the_cores_they_share() -> None:
    arrivals = [Arrival(0.0, picture, 40) for picture in range(40)]
    work = len(arrivals) * (40 * 0.0005 + COSTS.prefill + COSTS.picture + OUTSIDE)
    one, two = (max(simulate(COSTS, arrivals, replicas=2, cores=cores).took) for cores in (1, 2))
    assert one > work and work / 2 < two < 0.6 * one


def test_traffic_has_the_rate_that_was_asked_for() -> None:
    arrivals = traffic(50.0, 2000, 1)
    assert 2000 / arrivals[-1].at == pytest.approx(50, rel=0.1)
    assert traffic(50.0, 2000, 1) == arrivals != traffic(50.0, 2000, 2)
    assert COSTS.rate(40, cores=2, replicas=1) < COSTS.rate(40, cores=2, replicas=2) < 2 * COSTS.rate(40, 4, 1)


def ends(cores: int, wanted: list[tuple[float, float]]) -> list[float]:
    """When threads end that begin at some time and want some time each."""
    import simpy

    env = simpy.Environment()
    machine, found = Cores(env, cores), [0.0] * len(wanted)

    def thread(number: int, begin: float, seconds: float) -> Iterator[Any]:
        yield env.timeout(begin)
        yield from machine.compute(Thread(), seconds)
        found[number] = env.now

    for number, one in enumerate(wanted):
        env.process(thread(number, *one))
    env.run()
    return found


def test_threads_on_cores_of_their_own_do_not_wait() -> None:
    assert ends(2, [(0.0, 0.01), (0.0, 0.02)]) == pytest.approx([0.01, 0.02])


def test_threads_on_one_core_take_turns_and_lose_no_time() -> None:
    assert max(ends(1, [(0.0, 0.01), (0.0, 0.01)])) == pytest.approx(0.02)
    short = ends(1, [(0.0, 0.1), (0.0505, 0.001)])[1]  # the first has used up its slice, and gives way at once
    assert short == pytest.approx(0.0515)


def test_a_thread_that_gave_way_waits_for_a_tick_though_a_core_is_idle() -> None:
    # both cores are busy at 41 ms; the third thread takes the first one's core, which continues when the second's is
    # idle, and not at once, as it has just run
    first, second, third = ends(2, [(0.0, 0.05), (0.0, 0.0412), (0.041, 0.01)])
    assert second == pytest.approx(0.0412) and third == pytest.approx(0.051)
    assert 0.05 + TICK_S / 2 < first < 0.05 + TICK_S


def test_a_slow_time_makes_steps_longer() -> None:
    slow = replace(COSTS, pace=(2.0, 1.0))
    took = [simulate(costs, [Arrival(0.0, 1, 10)], replicas=1, cores=2).took[0] for costs in (slow, COSTS)]
    assert took[0] - took[1] == pytest.approx(10 * 0.0015)


def test_the_lock_of_a_server_makes_its_model_wait_for_its_other_threads() -> None:
    arrivals = [Arrival(0.0, 1, 40), *(Arrival(0.02 + 0.008 * number, 1, 1) for number in range(8))]
    free = replace(COSTS, holding=(Holding(0.0, 1),) * 3)
    with_lock, without = (simulate(costs, arrivals, 1, cores=64).took[0] for costs in (COSTS, free))
    assert with_lock > without
