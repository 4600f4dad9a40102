"""What a `qvl serve` of one thread costs while it is alone: processor time of its threads, decoders and clients."""

from __future__ import annotations

import asyncio
import base64
import io
import itertools
import math
import random
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.serving.http_load import Server
from benchmarks.serving.process_times import ProcessTimes, running_seconds, seconds_of
from benchmarks.serving.simulation import CLIENTS, LONG, PACE_S, PICTURES, ROWS, SHORT, Costs, Holding

LONGEST = 400  # tokens of answers during which a step is timed, and that are given up then
WINDOW_S = 0.2
PAUSE_S = 0.05
COLD = 30  # requests with pauses, of a token
PACE_LOOPS = 6  # in lengths of one of the loops


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


class Meter:
    """Reads what a server and this process have spent."""

    def __init__(self, server: Server) -> None:
        self._server, self._pid = server, server.process.pid
        self._times = ProcessTimes({self._pid: "server"})
        tasks = [int(path.name) for path in Path(f"/proc/{self._pid}/task").iterdir()]
        # the thread that has worked most, but for the main one, which serves HTTP
        self._model = max((task for task in tasks if task != self._pid), key=self._thread)
        self._before = Spent(0, 0, 0, 0, 0, 0)

    async def spent(self, requests: int) -> Spent:
        """Since the last call."""
        before, self._before = self._before, await self._read(requests)
        return Spent(requests, *(now - then for now, then in zip(self._before[1:], before[1:], strict=True)))

    async def model(self) -> Spent:
        """Steps and seconds of the model's thread so far."""
        return Spent(0, await self._server.metric("engine_steps_total"), self._thread(self._model), 0, 0, 0)

    def _thread(self, task: int) -> float:
        return running_seconds(Path(f"/proc/{self._pid}/task/{task}"))

    async def _read(self, requests: int) -> Spent:
        model = await self.model()
        self._times.look()
        used = self._times.by_kind()
        front = used["server"] - seconds_of(Path(f"/proc/{self._pid}/task/{self._model}"))
        return Spent(requests, model.steps, model.model, front, used.get("picture decoders", 0.0), time.process_time())


def measure(server: Server, seconds: float, seed: int, holding: tuple[Holding, Holding, Holding]) -> Costs:
    """The costs of a replica that is alone. holding: from `lock_costs`."""
    urls, meter = pictures(seed), Meter(server)
    asyncio.run(meter.spent(0))
    asyncio.run(_each(server, urls, "New?"))
    new = asyncio.run(meter.spent(PICTURES))
    asyncio.run(_each(server, urls, "Seen?"))
    seen = asyncio.run(meter.spent(PICTURES))
    asyncio.run(_each(server, urls[:COLD], "Known?", PAUSE_S))
    cold = asyncio.run(meter.spent(COLD))
    pace = asyncio.run(_pace(server, meter, urls, PACE_LOOPS * seconds))
    many = [asyncio.run(_step(server, meter, urls, rows)) for rows in ROWS[1:]]
    loops = [asyncio.run(_closed(server, meter, urls, clients, seconds)) for clients in CLIENTS]
    one, prompt = loops[0], seen.model / seen.requests  # a step with a prompt and no other answer
    steps = (one.model - one.requests * cold.model / cold.requests) / (one.steps - one.requests), *many
    joining, prefill = _joining(loops[-1], steps, prompt - steps[0])
    front, decode, client = (
        tuple(getattr(spent, part) / spent.requests for spent in loops) for part in ("front", "decode", "client")
    )
    return Costs(steps, joining, prefill, (new.model - seen.model) / PICTURES, pace, holding, front, decode, client)


async def _each(server: Server, urls: list[str], question: str, pause: float = 0.0) -> None:
    """Ask about one picture after another, for a token each."""
    for url in urls:
        await server.ask(body(url, question, 1))
        await asyncio.sleep(pause)


async def _step(server: Server, meter: Meter, urls: list[str], rows: int) -> float:
    """Seconds of the model's thread for a step with as many answers, from long ones while all of them run."""
    asked = [asyncio.create_task(server.ask(body(urls[row], f"How? {row}", LONGEST))) for row in range(rows)]
    while await server.metric("num_requests_running") < rows:
        await asyncio.sleep(0.005)
    await asyncio.sleep(PAUSE_S)  # the last prompt was begun, and may be under way
    before = await meter.model()
    await asyncio.sleep(WINDOW_S)
    after = await meter.model()
    for task in asked:
        task.cancel()
    await asyncio.gather(*asked, return_exceptions=True)
    while await server.metric("num_requests_running"):
        await asyncio.sleep(0.005)
    return (after.model - before.model) / (after.steps - before.steps)


async def _pace(server: Server, meter: Meter, urls: list[str], seconds: float) -> tuple[float, ...]:
    """What a step with one answer takes in one `PACE_S` after another, of the mean."""
    end, took = time.perf_counter() + seconds, list[float]()

    async def ask() -> None:
        for number in itertools.count():
            await server.ask(body(urls[0], f"How long? {number}", LONG))

    asking = asyncio.create_task(ask())
    before = await meter.model()
    while time.perf_counter() < end:
        await asyncio.sleep(PACE_S)
        after = await meter.model()
        took.append((after.model - before.model) / (after.steps - before.steps))
        before = after
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    return tuple((np.array(took) / np.mean(took)).tolist())


async def _closed(server: Server, meter: Meter, urls: list[str], clients: int, seconds: float) -> Spent:
    """Clients that each ask as soon as they are answered, for answers of different lengths, so that each joins alone.

    First all of them ask at once: what decodes pictures is started then, and not counted. One that is alone pauses
    between requests, as traffic of one at a time does: after a pause caches are cold, and the same work takes longer.
    """
    dice, numbers = random.Random(clients), itertools.count()
    first = [server.ask(body(urls[row % PICTURES], f"Which? {clients} {row}", 1)) for row in range(clients)]
    await asyncio.gather(*first)
    await meter.spent(0)
    end = time.perf_counter() + seconds * (3 if clients == 1 else 1)

    async def client() -> None:
        while time.perf_counter() < end:
            number = next(numbers)
            question = f"What is it? {clients} {number}"
            await server.ask(body(urls[number % PICTURES], question, dice.randint(SHORT, LONG)))
            if clients == 1:
                await asyncio.sleep(PAUSE_S)

    await asyncio.gather(*(client() for _ in range(clients)))
    return await meter.spent(next(numbers))


def _joining(spent: Spent, steps: tuple[float, ...], alone: float) -> tuple[float, float]:
    """What a step takes besides if prompts are in it, and for each: of `alone`, which is one, from a loop of many.

    Where requests join at random, `requests / steps` of them in a step, a part of the steps has none.
    """
    rows = spent.requests * (SHORT + LONG) / 2 / spent.steps
    with_any = spent.steps * (1 - math.exp(-spent.requests / spent.steps))
    besides = spent.model - spent.steps * float(np.interp(rows, ROWS, steps))
    prefill = (besides - with_any * alone) / (spent.requests - with_any)
    prefill = min(alone, max(0.0, prefill))
    return alone - prefill, prefill
