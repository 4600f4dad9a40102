"""Servers that share the cores of one machine, simulated event by event (simpy), from what one of them costs.

A request passes through the client, the server's threads for HTTP and prompts, and a process that decodes its picture,
from one to the next as `PARTS` has it. Then it joins the model at its next step. A step takes what it took with as many
answers in it, `joining` if any request joins, `prefill` for each that does, and `picture` if that one's picture is not
in the replica's cache; after it, each of its answers has a token more.

Threads share cores as `simulated_cores` has it. The client, and a server's threads but that of the model, do one piece
of work at a time, as Python does. The model's thread needs the same lock of its server, but not in its kernels: it
waits for it after each call, and the others wait while it has it. Steps take longer and shorter from one `PACE_S` to
the next, as they did in one server that was alone.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from benchmarks.serving.simulated_cores import Cores, Thread
from qvl_runtime.cluster.affinity import DEFAULT_BOUND, choose

PICTURES = 60
ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)  # answers in a step: kernels take some of them at a time
CLIENTS = (1, 4, 8, 16, 32)
SHORT, LONG = 16, 64  # tokens of an answer
PACE_S = 0.25
SWITCH_S = 0.005  # of Python's lock, if others want it: sys.getswitchinterval()
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


class Holding(NamedTuple):
    """How some work of the model holds Python's lock: for a part of it, before, between and after calls of kernels."""

    part: float  # of the time: the rest is in kernels, which let others have the lock
    calls: float  # that last long enough for another thread to take it


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds of a processor; in tuples: of a step with as many answers as `ROWS` says, or with `CLIENTS` requests."""

    steps: tuple[float, ...]  # a step
    joining: float  # what a step takes besides if any prompt is computed in it
    prefill: float  # and for each prompt, whose picture is known
    picture: float  # and for each new picture
    pace: tuple[float, ...]  # what a step takes in one `PACE_S` after another, of the mean: a machine's speed moves
    holding: tuple[Holding, Holding, Holding]  # Python's lock: a step's decoding, its prompts, and its new pictures
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
        return float(np.interp(requests, CLIENTS, getattr(self, name)))

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
    machine = _Machine(env, Cores(env, cores))
    offsets = [number * len(costs.pace) // replicas for number in range(replicas)]
    servers = {
        str(number): _Replica(machine, simpy.Resource(env, 1), costs, arrivals, offset)
        for number, offset in enumerate(offsets)
    }
    loads = dict.fromkeys(servers, 0)
    took = [0.0] * len(arrivals)
    client, clients = simpy.Resource(env, 1), Thread()

    def request(number: int) -> Iterator[Any]:
        name = choose(str(arrivals[number].picture), dict(loads), DEFAULT_BOUND)
        loads[name] += 1
        locks = {"client": client, "front": servers[name].lock}
        threads = {"client": clients, "front": servers[name].front, "decode": Thread()}
        left = {"client": costs.part("client", sum(loads.values()))}
        left |= {part: costs.part(part, loads[name]) for part in ("front", "decode")}
        for part, seconds in [(part, share * left[part]) for part, share in PARTS]:
            yield from machine.work(part, seconds, threads[part], locks.get(part))
            left[part] -= seconds
        yield from servers[name].answer(number)
        for part in ("front", "client"):
            yield from machine.work(part, left[part], threads[part], locks[part])
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

    def __init__(self, env: Any, cores: Cores) -> None:
        self.env, self._cores = env, cores
        self.spent: dict[str, float] = defaultdict(float)

    def work(self, part: str, seconds: float, thread: Thread, lock: Any = None) -> Iterator[Any]:
        """Compute for some time in a thread. lock: what to hold meanwhile, `SWITCH_S` at a time."""
        self.spent[part] += seconds
        while seconds > 1e-9:
            turn = min(seconds, SWITCH_S)
            if lock is None:
                yield from self._cores.compute(thread, turn)
            else:
                with lock.request() as held:
                    yield held
                    yield from self._cores.compute(thread, turn)
            seconds -= turn


class _Replica:
    """A server."""

    def __init__(self, machine: _Machine, lock: Any, costs: Costs, arrivals: list[Arrival], offset: int) -> None:
        self.lock = lock  # of its threads but that of the model
        self.count = 0  # steps
        self.thread, self.front = Thread(), Thread()
        self._machine, self._costs, self._arrivals = machine, costs, arrivals
        self._offset = offset  # in the pace
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
            for seconds, holding in zip(self._work(len(left), joined), self._costs.holding, strict=True):
                yield from self._model(seconds, holding)
            self.count += 1
            for number in list(left):
                left[number] -= 1
                if not left[number]:
                    del left[number]
                    self._ends.pop(number).succeed()

    def _work(self, rows: int, joined: list[int]) -> tuple[float, float, float]:
        """Seconds of a step: of its answers, its prompts, and its new pictures."""
        costs = self._costs
        new = {self._arrivals[number].picture for number in joined} - self._cached
        self._cached |= new
        prompts = bool(joined) * costs.joining + len(joined) * costs.prefill
        moment = self._offset + int(self._machine.env.now / PACE_S)
        return costs.step(rows) * costs.pace[moment % len(costs.pace)], prompts, len(new) * costs.picture

    def _model(self, seconds: float, holding: Holding) -> Iterator[Any]:
        """Compute: Python with the lock and kernels without it in turns."""
        calls = max(1, round(holding.calls))
        for _ in range(calls if seconds else 0):
            yield from self._machine.work("model", seconds * holding.part / calls, self.thread, self.lock)
            yield from self._machine.work("model", seconds * (1 - holding.part) / calls, self.thread)
