"""Two replicas, simulated and measured: `python -m benchmarks.serving.replicas`. Needs simpy and some minutes.

What a `qvl serve` of one thread costs is measured with one that is alone: a new picture and a known one, a token each;
steps with 1 to 32 long answers, and closed loops of as many clients, of whose requests the processor time is told
apart: the server's threads but the model's, the processes that decode pictures, and the clients. From these alone a
simulation (benchmarks.serving.simulation) predicts throughput and latency of random traffic for one server or for two
that share it by the picture's affinity with a bound (qvl_runtime.cluster.affinity.choose). The same traffic is sent to
both.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np

from benchmarks.serving.http_load import Server
from benchmarks.serving.lock_costs import lock_costs
from benchmarks.serving.replica_costs import Meter, body, measure, pictures
from benchmarks.serving.simulation import LONG, PICTURES, SHORT, Arrival, Costs, Holding, simulate, traffic
from benchmarks.timing import say, setting
from qvl_runtime.cluster.affinity import DEFAULT_BOUND, choose
from qvl_runtime.host import machine_cpu_seconds


@contextmanager
def serving(count: int) -> Iterator[list[Server]]:
    """Servers with a thread each."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    servers = list[Server]()
    try:
        for _ in range(count):
            servers.append(Server("--max-running", "64"))
        yield servers
    finally:
        for server in servers:
            server.close()
        os.environ.pop("OMP_NUM_THREADS")
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before


async def warm(server: Server) -> None:
    """Have a server compute steps of every size from 64 answers to one, twice: it records each size the first time."""
    urls = pictures(-1)
    for turn in range(2):
        ends = np.linspace(SHORT, LONG, 64)
        asked = [server.ask(body(urls[n % PICTURES], f"{turn} {n}", int(end))) for n, end in enumerate(ends)]
        await asyncio.gather(*asked)


def mean(one: Costs, other: Costs) -> Costs:
    """Between two; the pace is that of the one, and then of the other."""
    same: dict[str, Any] = {"holding": one.holding, "pace": one.pace + other.pace}
    pairs = {name: (value, asdict(other)[name]) for name, value in asdict(one).items() if name not in same}
    return Costs(**{name: _between(*pair) for name, pair in pairs.items()}, **same)


def _between(one: Any, other: Any) -> Any:
    middle = np.add(one, other) / 2
    return tuple(middle.tolist()) if middle.ndim else float(middle)


class Replay(NamedTuple):
    """What traffic took."""

    took: list[float]  # seconds of each request
    spent: dict[str, float]  # seconds of a processor: model, front, decode and client
    steps: float  # of all models
    seconds: float  # from the first request to the last answer
    others: float  # cores that other processes used, or the host of a virtual machine for other machines

    @property
    def busy(self) -> float:
        """Cores that the traffic kept busy in the mean."""
        return sum(self.spent.values()) / self.seconds


def replay(servers: list[Server], arrivals: list[Arrival], seed: int) -> Replay:
    """Send the traffic to servers."""
    urls, names = pictures(seed), [str(number) for number in range(len(servers))]
    loads: Counter[str] = Counter(dict.fromkeys(names, 0))
    took = [0.0] * len(arrivals)

    async def run() -> None:
        began = time.perf_counter()

        async def one(number: int, arrival: Arrival) -> None:
            name = choose(str(arrival.picture), dict(loads), DEFAULT_BOUND)
            loads[name] += 1
            sent = time.perf_counter()
            status, _, _ = await servers[int(name)].ask(body(urls[arrival.picture], f"What? {number}", arrival.tokens))
            assert status == 200
            took[number] = time.perf_counter() - sent
            loads[name] -= 1

        tasks = []
        for number, arrival in enumerate(arrivals):
            await asyncio.sleep(max(0.0, began + arrival.at - time.perf_counter()))
            tasks.append(asyncio.create_task(one(number, arrival)))
        await asyncio.gather(*tasks)

    meters = [Meter(server) for server in servers]
    for meter in meters:
        asyncio.run(meter.spent(0))
    began, own, machine = time.perf_counter(), time.process_time(), machine_cpu_seconds()
    asyncio.run(run())
    seconds, own = time.perf_counter() - began, time.process_time() - own
    machine = machine_cpu_seconds() - machine
    found = [asyncio.run(meter.spent(len(arrivals))) for meter in meters]
    spent = {part: sum(getattr(one, part) for one in found) for part in ("model", "front", "decode")}
    spent["client"] = own
    others = max(0.0, machine - sum(spent.values())) / seconds
    return Replay(took, spent, sum(one.steps for one in found), seconds, others)


def figures(arrivals: list[Arrival], took: list[float]) -> dict[str, float]:
    """Tokens a second from the first request to the last answer, and percentiles of the seconds of a request."""
    end = max(arrival.at + seconds for arrival, seconds in zip(arrivals, took, strict=True))
    p50, p95 = (float(np.percentile(took, q)) for q in (50, 95))
    return {
        "tokens_per_s": sum(arrival.tokens for arrival in arrivals) / (end - arrivals[0].at),
        "p50": p50,
        "p95": p95,
    }


def compare(
    servers: list[Server],
    rate: float,
    arguments: argparse.Namespace,
    holding: tuple[Holding, Holding, Holding],
    seed: int,
) -> None:
    """Send traffic of some requests a second to all servers, and say what it took and what the simulation makes of it.

    What one server costs is measured before and after each time, and the mean counts: a machine's speed moves within
    minutes.
    """
    cores = os.cpu_count() or 1
    count = max(20, round(rate * arguments.seconds))
    runs = [traffic(rate, count, seed + turn) for turn in range(arguments.repeat)]
    measured, singly = list[Replay](), [measure(servers[0], arguments.calibrate, seed, holding)]
    for turn, run in enumerate(runs, 1):
        measured.append(replay(servers, run, seed + turn))
        singly.append(measure(servers[0], arguments.calibrate, seed + turn + len(runs), holding))
    costs = [mean(before, after) for before, after in itertools.pairwise(singly)]
    report(servers=len(servers), cores=cores, rate=rate, costs=costs, runs=runs, measured=measured)


def report(
    servers: int,
    cores: int,
    rate: float,
    costs: list[Costs],
    runs: list[list[Arrival]],
    measured: list[Replay],
) -> None:
    """Simulate some runs, and say what they took, each for itself and together."""
    simulated = [simulate(cost, run, servers, cores) for cost, run in zip(costs, runs, strict=True)]
    each = [
        (figures(run, ours.took), figures(run, theirs.took))
        for run, ours, theirs in zip(runs, simulated, measured, strict=True)
    ]
    together = [np.percentile(np.concatenate([one.took for one in kind]), (50, 95)) for kind in (simulated, measured)]
    say(
        measure="traffic",
        replicas=servers,
        requests_per_s=rate,
        capacity=[cost.rate((SHORT + LONG) / 2, cores, servers) for cost in costs],
        busy_cores=[one.busy for one in measured],
        other_cores=[one.others for one in measured],
        ms_a_request=[
            {part: (1e3 * ours.spent[part] / len(run), 1e3 * theirs.spent[part] / len(run)) for part in theirs.spent}
            | {"steps": (ours.steps / len(run), theirs.steps / len(run))}
            for run, ours, theirs in zip(runs, simulated, measured, strict=True)
        ],
        requests=[len(run) for run in runs],
        costs=[asdict(cost) for cost in costs],
        simulated=[ours for ours, _ in each],
        measured=[theirs for _, theirs in each],
        simulated_off=[{name: ours[name] / value - 1 for name, value in theirs.items()} for ours, theirs in each],
        together_off=dict(zip(("p50", "p95"), map(float, together[0] / together[1] - 1), strict=True)),
    )


def main() -> None:
    """Measure one replica, predict one or two, and measure those."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", default="9,26,44,55", help="requests a second")
    parser.add_argument("--seconds", type=float, default=20, help="of traffic each time")
    parser.add_argument("--repeat", type=int, default=3, help="how often to send traffic, each time another")
    parser.add_argument(
        "--calibrate", type=float, default=1.0, help="seconds of each of five loops, before and after traffic"
    )
    parser.add_argument("--replicas", default="2")
    parser.add_argument("--seed", type=int, default=0, help="of the traffic and the pictures")
    arguments = parser.parse_args()
    say(**setting())
    holding = lock_costs()
    seeds = itertools.count(arguments.seed, 2 * arguments.repeat + 2)
    with serving(2) as servers:
        for server in servers:
            asyncio.run(warm(server))
        for count in map(int, arguments.replicas.split(",")):
            for rate in map(float, arguments.rates.split(",")):
                compare(servers[:count], rate, arguments, holding, next(seeds))


if __name__ == "__main__":
    main()
