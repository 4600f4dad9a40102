"""Servers that share the cores of one machine, simulated event by event (simpy), from what one of them costs.

A request takes the client some work, then the server's threads outside of the model (HTTP, the prompt, JSON), then a
process that decodes its picture; it joins the model at its next step. A step takes what it took with as many answers in
it, `prefill` for each request that joins, and `picture` if that one's picture is not in the replica's cache; after it,
each of its answers has a token more. The last part of a request's work outside of the model follows its last token.

Work is done in turns of `TURN_S` on whichever core is free, in the order of asking, as a system that shares its
cores fairly would do it. A server has one piece of work at a time on a core, as Python does: steps and other threads
take turns.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from qvl_runtime.cluster.affinity import DEFAULT_BOUND, choose

PICTURES = 60
ROWS = (1, 4, 8, 16, 32)
SHORT, LONG = 16, 64  # tokens of an answer
TURN_S = 0.001


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds of a processor."""

    steps: tuple[float, ...]  # a step with as many answers as `ROWS` says
    prefill: float  # a prompt whose picture is known, in the thread of the model
    picture: float  # what a new picture takes there besides
    front: float  # a request in the server's other threads
    decode: float  # a picture in the process that decodes it
    client: float  # a request in the client

    def step(self, rows: int) -> float:
        """A step with some answers in it: between those that were measured, and beyond, on straight lines."""
        last = ROWS[-1]
        slope = (self.steps[-1] - self.steps[-2]) / (last - ROWS[-2])
        return float(np.interp(rows, ROWS, self.steps)) + max(0, rows - last) * slope

    def rate(self, tokens: float, cores: int, replicas: int) -> float:
        """Requests a second at which replicas with 8 answers in each step, or all cores, are busy."""
        server = self.front + self.prefill + tokens * self.step(8) / 8
        return min(replicas / server, cores / (server + self.decode + self.client))


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request: when it comes, its picture, and its tokens."""

    at: float
    picture: int
    tokens: int


def traffic(rate: float, count: int, seed: int) -> list[Arrival]:
    """Requests at random times, about pictures of which some are asked about more often than others."""
    dice, now, found = random.Random(seed), 0.0, list[Arrival]()
    weights = [1 / (1 + rank) ** 0.5 for rank in range(PICTURES)]
    for _ in range(count):
        now += dice.expovariate(rate)
        found.append(Arrival(now, dice.choices(range(PICTURES), weights)[0], dice.randint(SHORT, LONG)))
    return found


def simulate(costs: Costs, arrivals: list[Arrival], replicas: int, cores: int) -> list[float]:
    """The seconds that each request takes, in order."""
    import simpy

    env = simpy.Environment()
    machine = _Machine(env, simpy.Resource(env, cores))
    servers = {str(number): _Replica(machine, simpy.Resource(env, 1), costs, arrivals) for number in range(replicas)}
    loads = dict.fromkeys(servers, 0)
    took = [0.0] * len(arrivals)
    client = simpy.Resource(env, 1)

    def request(number: int) -> Iterator[Any]:
        name = choose(str(arrivals[number].picture), dict(loads), DEFAULT_BOUND)
        loads[name] += 1
        yield from machine.work(costs.client / 2, client)
        yield from servers[name].answer(number)
        yield from machine.work(costs.client / 2, client)
        loads[name] -= 1
        took[number] = env.now - arrivals[number].at

    def source() -> Iterator[Any]:
        for number, arrival in enumerate(arrivals):
            yield env.timeout(arrival.at - env.now)
            env.process(request(number))

    for server in servers.values():
        env.process(server.steps())
    env.process(source())
    env.run(until=arrivals[-1].at + 600)
    return took


class _Machine:
    """Cores."""

    def __init__(self, env: Any, cores: Any) -> None:
        self.env, self._cores = env, cores

    def work(self, seconds: float, lock: Any = None) -> Iterator[Any]:
        """Take a core for some time, in turns with others. lock: what to hold meanwhile."""
        while seconds > 0:
            held = None if lock is None else lock.request()
            if held is not None:
                yield held
            with self._cores.request() as core:
                yield core
                yield self.env.timeout(min(seconds, TURN_S))
            if held is not None:
                lock.release(held)
            seconds -= TURN_S


class _Replica:
    """A server."""

    def __init__(self, machine: _Machine, lock: Any, costs: Costs, arrivals: list[Arrival]) -> None:
        self._machine, self._lock, self._costs, self._arrivals = machine, lock, costs, arrivals
        self._waiting: list[int] = []
        self._ends: dict[int, Any] = {}  # of requests: events
        self._cached: set[int] = set()
        self._wake = machine.env.event()

    def answer(self, number: int) -> Iterator[Any]:
        """What becomes of a request."""
        costs, machine = self._costs, self._machine
        yield from machine.work(costs.front * 3 / 4, self._lock)
        yield from machine.work(costs.decode)
        done = self._ends[number] = machine.env.event()
        self._waiting.append(number)
        if not self._wake.triggered:
            self._wake.succeed()
        yield done
        yield from machine.work(costs.front / 4, self._lock)

    def steps(self) -> Iterator[Any]:
        """The thread of the model."""
        left: dict[int, int] = {}
        while True:
            if not (left or self._waiting):
                self._wake = self._machine.env.event()
                yield self._wake
            joined = self._waiting[:]
            self._waiting.clear()
            yield from self._machine.work(sum(map(self._prefill, joined)), self._lock)
            left |= {number: self._arrivals[number].tokens for number in joined}
            yield from self._machine.work(self._costs.step(len(left)), self._lock)
            for number in list(left):
                left[number] -= 1
                if not left[number]:
                    del left[number]
                    self._ends.pop(number).succeed()

    def _prefill(self, number: int) -> float:
        picture = self._arrivals[number].picture
        new = picture not in self._cached
        self._cached.add(picture)
        return self._costs.prefill + new * self._costs.picture
