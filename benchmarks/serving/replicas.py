"""Two replicas, simulated and measured: `python -m benchmarks.serving.replicas`. Needs simpy and some minutes.

The step of a `qvl serve` with one thread is measured in closed loops of 1 to 16 clients each, and so is the time of a
picture. From these alone a discrete-event simulation predicts throughput and latency of two servers that share random
traffic, by the picture's affinity with a bound (qvl_runtime.cluster.affinity.choose); then the same is sent to two.

A replica computes steps while it has requests. A step takes `base`, and `row` for each answer in it; a request that
joins adds `prefill`, and `picture` if its picture is not in the replica's cache. After each step, each of its answers
has a token more.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.serving.http_load import Server
from benchmarks.timing import say, setting
from qvl_runtime.cluster.affinity import DEFAULT_BOUND, choose

PICTURES = 60
SHORT, LONG = 16, 64  # tokens of an answer in the closed loops, and the range of those in the traffic


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds of a replica."""

    base: float
    row: float
    prefill: float
    picture: float

    def rate(self, tokens: float) -> float:
        """Requests a second of a replica with all pictures cached and 8 answers in each step."""
        return 8 / (tokens * (self.base + 8 * self.row) + 8 * self.prefill)


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


def simulate(costs: Costs, arrivals: list[Arrival], replicas: int) -> list[float]:
    """The seconds that each request takes, in order."""
    import simpy

    env = simpy.Environment()
    names = [str(number) for number in range(replicas)]
    waiting: dict[str, list[int]] = {name: [] for name in names}
    loads = dict.fromkeys(names, 0)
    wake = {name: env.event() for name in names}
    took = [0.0] * len(arrivals)

    def replica(name: str) -> Iterator[Any]:
        cached: set[int] = set()
        left: dict[int, int] = {}
        while True:
            if not (left or waiting[name]):
                wake[name] = env.event()
                yield wake[name]
            spent, joined = 0.0, waiting[name][:]
            waiting[name].clear()
            for number in joined:
                picture = arrivals[number].picture
                spent += costs.prefill + (0.0 if picture in cached else costs.picture)
                cached.add(picture)
                left[number] = arrivals[number].tokens
            yield env.timeout(spent + costs.base + costs.row * len(left))
            for number in list(left):
                left[number] -= 1
                if not left[number]:
                    del left[number]
                    loads[name] -= 1
                    took[number] = env.now - arrivals[number].at

    def source() -> Iterator[Any]:
        for number, arrival in enumerate(arrivals):
            yield env.timeout(arrival.at - env.now)
            name = choose(str(arrival.picture), dict(loads), DEFAULT_BOUND)
            loads[name] += 1
            waiting[name].append(number)
            if not wake[name].triggered:
                wake[name].succeed()

    for name in names:
        env.process(replica(name))
    env.process(source())
    env.run(until=arrivals[-1].at + 600)
    return took


def pictures(seed: int) -> list[str]:
    """Data URLs of pictures that no other seed has."""
    from PIL import Image

    found = []
    for number in range(PICTURES):
        file = io.BytesIO()
        noise = np.random.default_rng((seed, number)).integers(0, 256, (48, 48, 3), dtype=np.uint8)
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


def measure(servers: list[Server], seconds: float) -> Costs:
    """The costs of a replica, by least squares over closed loops of some clients with short and long answers.

    All replicas have as many clients at the same time: they share the machine with each other, the load and the
    processes that decode pictures.
    """
    urls, numbers = pictures(1), iter(range(10**9))

    async def closed(clients: int, tokens: int) -> float:
        """Mean seconds of a request."""
        taken, end = list[float](), time.perf_counter() + seconds

        async def client(server: Server) -> None:
            while time.perf_counter() < end:
                number = next(numbers)
                began = time.perf_counter()
                await server.ask(body(urls[number % PICTURES], f"What is it? {number}", tokens))
                taken.append(time.perf_counter() - began)

        await asyncio.gather(*(client(server) for server in servers for _ in range(clients)))
        return sum(taken) / len(taken)

    async def each(question: str) -> float:
        async def one(server: Server) -> None:
            for url in urls:
                await server.ask(body(url, question, 1))

        began = time.perf_counter()
        await asyncio.gather(*map(one, servers))
        return (time.perf_counter() - began) / PICTURES

    new = asyncio.run(each("New?"))
    seen = min(asyncio.run(each(f"Seen {turn}?")) for turn in range(3))
    rows, right = [], []
    for clients in (1, 4, 16):
        for tokens in (SHORT, LONG):
            found = asyncio.run(closed(clients, tokens))
            # of each row's tokens; the other clients' prompts fall into its time as well
            rows.append([tokens / found, tokens * clients / found, clients / found])
            right.append(1.0)  # relative errors
    base, row, prefill = np.linalg.lstsq(np.array(rows), np.array(right), rcond=None)[0]
    return Costs(float(base), float(row), float(prefill), max(0.0, new - seen))


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


def main() -> None:
    """Measure one replica, predict two, and measure those."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loads", default="0.5,0.8", help="parts of what two replicas can take")
    parser.add_argument("--seconds", type=float, default=20, help="of traffic at each load")
    parser.add_argument("--calibrate", type=float, default=5, help="seconds of each of six closed loops")
    arguments = parser.parse_args()
    say(**setting())
    with serving(2) as servers:
        for server in servers:  # both warm
            asyncio.run(server.ask(body(pictures(9)[0], "?", LONG)))
        costs = measure(servers, arguments.calibrate)
        say(measure="costs", **{f"{name}_ms": 1000 * getattr(costs, name) for name in Costs.__slots__})
        for turn, load in enumerate(map(float, arguments.loads.split(","))):
            rate = 2 * load * costs.rate((SHORT + LONG) / 2)
            arrivals = traffic(rate, max(20, round(rate * arguments.seconds)), turn)
            found = {
                "simulated": figures(arrivals, simulate(costs, arrivals, len(servers))),
                "measured": figures(arrivals, replay(servers, arrivals, turn + 100)),
            }
            off = {name: found["simulated"][name] / value - 1 for name, value in found["measured"].items()}
            say(measure="two replicas", load=load, requests=len(arrivals), **found, simulated_off=off)


if __name__ == "__main__":
    main()
