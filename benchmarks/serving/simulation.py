"""Servers that share the cores of one machine, simulated event by event (simpy), from what one of them costs.

A request passes through the client, the server's threads for HTTP and prompts, and a process that decodes its picture,
from one to the next as `PARTS` has it. Then it joins the model at its next step. A step takes what it took with as many
answers in it, `joining` if any request joins, `prefill` for each that does, and `picture` if that one's picture is not
in the replica's cache; after it, each of its answers has a token more.

Work is done in turns of `TURN_S` on whichever core is free, in the order of asking, as a system that shares its cores
fairly would do it. The client, and a server's threads but that of the model, do one piece of work at a time, as Python
does. The model waits for none of them: of a step's time, what is neither the processor's nor the wait for a core was
measured as 0.0 to 0.1 ms.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from qvl_runtime.cluster.affinity import DEFAULT_BOUND, choose

PICTURES = 60
ROWS = (1, 4, 8, 16, 32)
SHORT, LONG = 16, 64  # tokens of an answer
TURN_S = 0.001
# From the request's arrival to its place in the queue of the model: who works, and the part of all that one does for a
# request; after its last token the server and the client do the rest. Measured by thread: of a server's work 70 % is
# its event loop's, 24 % that of the thread which has the picture decoded, 6 % that of the one which makes the prompt.
PARTS = (
    ("client", 0.6),
    ("front", 0.3),
    ("front", 0.06),
    ("front", 0.06),
    ("front", 0.12),
    ("decode", 0.5),
    ("front", 0.06),
    ("decode", 0.5),
    ("front", 0.06),
    ("front", 0.1),
)


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds of a processor. Those in tuples were measured with as many requests at a time as `ROWS` says."""

    steps: tuple[float, ...]  # a step
    joining: float  # what a step takes besides if any prompt is computed in it
    prefill: float  # and for each prompt, whose picture is known
    picture: float  # and for each new picture
    front: tuple[float, ...]  # a request in the server's threads but that of the model
    decode: tuple[float, ...]  # a picture in the process that decodes it
    client: tuple[float, ...]  # a request in the client

    def step(self, rows: int) -> float:
        """A step with some answers in it: between those that were measured, and beyond, on straight lines."""
        last = ROWS[-1]
        slope = (self.steps[-1] - self.steps[-2]) / (last - ROWS[-2])
        return float(np.interp(rows, ROWS, self.steps)) + max(0, rows - last) * slope

    def part(self, name: str, requests: int) -> float:
        """What a request takes in `front`, `decode` or `client`, of some that are there at a time."""
        return float(np.interp(requests, ROWS, getattr(self, name)))

    def rate(self, tokens: float, cores: int, replicas: int) -> float:
        """Requests a second at which replicas with 8 answers in each step, or all cores, are busy."""
        model = self.joining + self.prefill + tokens * self.step(8) / 8
        other = sum(self.part(name, 8) for name in ("front", "decode", "client"))
        return min(replicas / model, cores / (model + other))


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


class Simulated(NamedTuple):
    """What traffic takes."""

    took: list[float]  # seconds of each request, in order
    spent: dict[str, float]  # seconds of a processor: model, front, decode and client
    steps: int  # of all models


def simulate(costs: Costs, arrivals: list[Arrival], replicas: int, cores: int) -> Simulated:
    """Send traffic to simulated servers."""
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
        locks = {"client": client, "front": servers[name].lock}
        left = {"client": costs.part("client", sum(loads.values()))}
        left |= {part: costs.part(part, loads[name]) for part in ("front", "decode")}
        for part, seconds in [(part, share * left[part]) for part, share in PARTS]:
            yield from machine.work(part, seconds, locks.get(part))
            left[part] -= seconds
        yield from servers[name].answer(number)
        for part in ("front", "client"):
            yield from machine.work(part, left[part], locks[part])
        loads[name] -= 1
        took[number] = env.now - arrivals[number].at

    def source() -> Iterator[Any]:
        asked = []
        for number, arrival in enumerate(arrivals):
            yield env.timeout(arrival.at - env.now)
            asked.append(env.process(request(number)))
        yield env.all_of(asked)

    for server in servers.values():
        env.process(server.steps())
    env.run(until=env.process(source()))
    return Simulated(took, dict(machine.spent), sum(server.count for server in servers.values()))


class _Machine:
    """Cores."""

    def __init__(self, env: Any, cores: Any) -> None:
        self.env, self._cores = env, cores
        self.spent: dict[str, float] = defaultdict(float)

    def work(self, part: str, seconds: float, lock: Any = None) -> Iterator[Any]:
        """Take a core for some time, in turns with others. lock: what to hold meanwhile."""
        self.spent[part] += seconds
        while seconds > 1e-9:
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
        self.lock = lock  # of its threads but that of the model
        self.count = 0  # steps
        self._machine, self._costs, self._arrivals = machine, costs, arrivals
        self._waiting: list[int] = []
        self._ends: dict[int, Any] = {}  # of requests: events
        self._cached: set[int] = set()
        self._wake = machine.env.event()

    def answer(self, number: int) -> Iterator[Any]:
        """Queue a request, and wait for its last token."""
        done = self._ends[number] = self._machine.env.event()
        self._waiting.append(number)
        if not self._wake.triggered:
            self._wake.succeed()
        yield done

    def steps(self) -> Iterator[Any]:
        """The thread of the model."""
        left: dict[int, int] = {}
        while True:
            if not (left or self._waiting):
                self._wake = self._machine.env.event()
                yield self._wake
            joined = self._waiting[:]
            self._waiting.clear()
            left |= {number: self._arrivals[number].tokens for number in joined}
            seconds = self._costs.step(len(left)) + sum(map(self._prefill, joined))
            yield from self._machine.work("model", seconds + bool(joined) * self._costs.joining)
            self.count += 1
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
