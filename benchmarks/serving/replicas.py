"""Two replicas, simulated and measured: `python -m benchmarks.serving.replicas`. Needs simpy and some minutes.

What a `qvl serve` of one thread costs is measured in closed loops of 1 to 32 clients each: the processor time of its
model's thread, of its other threads, of the processes that decode pictures and of the clients, and its steps. From
these alone a simulation (benchmarks.serving.simulation) predicts throughput and latency of random traffic, first for
that one server, which shows what the simulation is worth, and then for two that share the traffic by the picture's
affinity with a bound (qvl_runtime.cluster.affinity.choose). The same traffic is sent to both.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import itertools
import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.serving.http_load import Server
from benchmarks.serving.process_times import ProcessTimes, seconds_of
from benchmarks.serving.simulation import LONG, PICTURES, ROWS, SHORT, Arrival, Costs, simulate, traffic
from benchmarks.timing import say, setting
from qvl_runtime.cluster.affinity import DEFAULT_BOUND, choose


class Spent(NamedTuple):
    """What some requests took."""

    requests: int
    steps: float
    model: float  # seconds of a processor, in the thread of the model
    front: float  # in the server's other threads
    decode: float  # in the processes that decode pictures
    client: float  # here


def pictures(seed: int) -> list[str]:
    """Data URLs of pictures that no other seed has."""
    from PIL import Image

    found = []
    for number in range(PICTURES):
        file = io.BytesIO()
        noise = np.random.default_rng((1 + seed, number)).integers(0, 256, (48, 48, 3), dtype=np.uint8)
        Image.fromarray(noise).save(file, "PNG")
        found.append("data:image/png;base64," + base64.b64encode(file.getvalue()).decode())
    return found


def body(url: str, question: str, tokens: int) -> dict[str, Any]:
    """A request about a picture for exactly that number of tokens."""
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    fields = {"max_tokens": tokens, "ignore_eos": True, "temperature": 0}
    return {"messages": [{"role": "user", "content": parts}], **fields}


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


class Meter:
    """Reads what a server and this process have spent."""

    def __init__(self, server: Server) -> None:
        self._server, self._pid = server, server.process.pid
        self._times = ProcessTimes({self._pid: "server"})
        tasks = [int(path.name) for path in Path(f"/proc/{self._pid}/task").iterdir()]
        # the thread that has worked most, but for the main one, which serves HTTP
        self._model = max((task for task in tasks if task != self._pid), key=self._thread)
        self._before = self._read(0)

    def spent(self, requests: int) -> Spent:
        """Since the last call, or the start."""
        before, self._before = self._before, self._read(requests)
        return Spent(requests, *(now - then for now, then in zip(self._before[1:], before[1:], strict=True)))

    def _thread(self, task: int) -> float:
        return seconds_of(Path(f"/proc/{self._pid}/task/{task}"))

    def _read(self, requests: int) -> Spent:
        self._times.look()
        used, model = self._times.by_kind(), self._thread(self._model)
        steps = asyncio.run(self._server.metric("engine_steps_total"))
        decode = used.get("picture decoders", 0.0)
        return Spent(requests, steps, model, used["server"] - model, decode, time.process_time())


async def warm(server: Server) -> None:
    """Have a server compute steps of every size from 64 answers to one, twice: it records each size the first time."""
    urls = pictures(-1)
    for turn in range(2):
        ends = np.linspace(SHORT, LONG, 64)
        asked = [server.ask(body(urls[n % PICTURES], f"{turn} {n}", int(end))) for n, end in enumerate(ends)]
        await asyncio.gather(*asked)


def measure(server: Server, seconds: float, seed: int) -> Costs:
    """The costs of a replica that is alone. The model's thread: least squares over closed loops of some clients."""
    urls, number, meter = pictures(seed), 0, Meter(server)

    async def closed(clients: int, tokens: int) -> int:
        count, end = 0, time.perf_counter() + seconds

        async def client() -> None:
            nonlocal count, number
            while time.perf_counter() < end:
                count, number = count + 1, number + 1
                await server.ask(body(urls[number % PICTURES], f"What is it? {number}", tokens))

        await asyncio.gather(*(client() for _ in range(clients)))
        return count

    async def each(question: str) -> None:
        for url in urls:
            await server.ask(body(url, question, 1))

    asyncio.run(each("New?"))
    new = meter.spent(PICTURES)
    asyncio.run(each("Seen?"))
    seen = meter.spent(PICTURES)
    parts, loops = [], []
    for clients in ROWS:
        for tokens in (SHORT, LONG):
            spent = meter.spent(asyncio.run(closed(clients, tokens)))
            loops.append(spent)
            rows = spent.requests * tokens / spent.steps
            shares = [spent.steps * float(np.interp(rows, ROWS, knot)) for knot in np.eye(len(ROWS))]
            parts.append(np.array([*shares, spent.requests]) / spent.model)  # so that errors are relative
    *steps, prefill = map(float, np.linalg.lstsq(np.array(parts), np.ones(len(parts)), rcond=None)[0])
    total = [sum(column) for column in zip(*loops, strict=True)]
    front, decode, client = (seconds / total[0] for seconds in total[3:])
    return Costs(tuple(steps), prefill, (new.model - seen.model) / PICTURES, front, decode, client)


def mean(one: Costs, other: Costs) -> Costs:
    """Between two."""
    steps = tuple((a + b) / 2 for a, b in zip(one.steps, other.steps, strict=True))
    names = [name for name in Costs.__slots__ if name != "steps"]
    return Costs(steps, **{name: (getattr(one, name) + getattr(other, name)) / 2 for name in names})


def replay(servers: list[Server], arrivals: list[Arrival], seed: int) -> list[float]:
    """Send the traffic to servers, and return the seconds that each request takes."""
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

    asyncio.run(run())
    return took


def figures(arrivals: list[Arrival], took: list[float]) -> dict[str, float]:
    """Tokens a second from the first request to the last answer, and percentiles of the seconds of a request."""
    end = max(arrival.at + seconds for arrival, seconds in zip(arrivals, took, strict=True))
    p50, p95 = (float(np.percentile(took, q)) for q in (50, 95))
    return {
        "tokens_per_s": sum(arrival.tokens for arrival in arrivals) / (end - arrivals[0].at),
        "p50": p50,
        "p95": p95,
    }


def compare(servers: list[Server], load: float, seconds: float, calibrate: float, turn: int) -> None:
    """Send traffic to all servers, and say what it took and what the simulation makes of it.

    What one server costs is measured before and after, and the mean counts: a machine's speed moves within minutes.
    """
    cores = os.cpu_count() or 1
    before = measure(servers[0], calibrate, 3 * turn)
    rate = load * before.rate((SHORT + LONG) / 2, cores, len(servers))
    arrivals = traffic(rate, max(20, round(rate * seconds)), turn)
    measured = figures(arrivals, replay(servers, arrivals, 3 * turn + 1))
    after = measure(servers[0], calibrate, 3 * turn + 2)
    costs = mean(before, after)
    simulated = figures(arrivals, simulate(costs, arrivals, len(servers), cores))
    say(
        measure="traffic",
        replicas=len(servers),
        load=load,
        requests_per_s=rate,
        requests=len(arrivals),
        costs=asdict(costs),
        speed_after=after.rate(40, cores, 1) / before.rate(40, cores, 1),
        simulated=simulated,
        measured=measured,
        simulated_off={name: simulated[name] / value - 1 for name, value in measured.items()},
    )


def main() -> None:
    """Measure one replica, predict one and two, and measure those."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loads", default="0.3,0.6,0.85", help="parts of what the replicas or the cores can take")
    parser.add_argument("--seconds", type=float, default=15, help="of traffic at each load")
    parser.add_argument(
        "--calibrate", type=float, default=1.5, help="seconds of each of ten closed loops, twice a load"
    )
    parser.add_argument("--replicas", default="1,2")
    arguments = parser.parse_args()
    say(**setting())
    turns = itertools.count()
    with serving(2) as servers:
        for server in servers:
            asyncio.run(warm(server))
        for count in map(int, arguments.replicas.split(",")):
            for load in map(float, arguments.loads.split(",")):
                compare(servers[:count], load, arguments.seconds, arguments.calibrate, next(turns))


if __name__ == "__main__":
    main()
