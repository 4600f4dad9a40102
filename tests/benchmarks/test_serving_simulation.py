"""The simulation of servers that share cores, where its result can be told by hand. Needs simpy."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.serving.simulation import ROWS, Arrival, Costs, simulate, traffic

pytest.importorskip("simpy", reason="simpy is not installed")
pytestmark = pytest.mark.unit
COSTS = Costs(
    steps=tuple(0.001 + 0.0005 * rows for rows in ROWS),
    joining=0.001,
    prefill=0.002,
    picture=0.004,
    front=(0.004,) * len(ROWS),
    decode=(0.001,) * len(ROWS),
    client=(0.002,) * len(ROWS),
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
