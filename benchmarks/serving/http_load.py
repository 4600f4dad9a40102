"""The HTTP server against the engine that it runs on: throughput, aborts, event-loop lag, overload, memory.

    python -m benchmarks.serving.http_load                      # everything, the shipped nano, about five minutes
    python -m benchmarks.serving.http_load --only throughput,abort

The server runs in a process of its own, as `qvl serve` starts it, and the load comes from another one over loopback, so
on two cores model, server and clients share them. One JSON line for each measurement.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from benchmarks.timing import say, setting
from qvl_runtime.profile.spread import percentiles

ANSWER = 128  # tokens
QUESTION = "Tell me about the picture"


class Server:
    """`qvl serve` in a process of its own, and requests to it over bare sockets, which cost the load little."""

    def __init__(self, *options: str) -> None:
        command = [sys.executable, "-c", "from qvl_runtime.cli.app import main; main()", "serve", "--port", "0"]
        self.process = subprocess.Popen([*command, "--no-access-log", *options], stderr=subprocess.PIPE, text=True)
        self.port = 0
        for line in self.process.stderr or ():
            if line.startswith("listening at"):
                self.port = int(line.split(",")[0].rpartition(":")[2])
            if line.startswith("ready"):
                return
        raise RuntimeError("the server did not start")

    def close(self) -> None:
        """End it."""
        self.process.terminate()
        self.process.wait(30)

    def memory(self) -> int:
        """Its resident bytes."""
        with open(f"/proc/{self.process.pid}/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    async def send(self, body: dict[str, Any]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Send a chat request."""
        data = json.dumps(body).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=2**22)
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n"
        writer.write(head.encode() + b"Connection: close\r\n\r\n" + data)
        return reader, writer

    async def ask(self, body: dict[str, Any]) -> tuple[int, bytes, float]:
        """Send a chat request, and return status, body and the seconds to the body's first bytes."""
        began = time.perf_counter()
        reader, writer = await self.send(body)
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            first = await reader.read(65536)
            seconds = time.perf_counter() - began
            return int(head.split(b" ", 2)[1]), first + await reader.read(), seconds
        finally:
            writer.close()

    async def metric(self, name: str) -> float:
        """A metric of the server."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        text = (await reader.read()).decode()
        writer.close()
        return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(f"qvl_{name}{{"))


def question(number: int, tokens: int = ANSWER, **fields: Any) -> dict[str, Any]:
    """A request for exactly `tokens` tokens."""
    messages = [{"role": "user", "content": f"{QUESTION} {number}"}]
    return {"messages": messages, "max_tokens": tokens, "ignore_eos": True, "temperature": 0, **fields}


def throughput(server: Server, streams: tuple[int, ...]) -> None:
    """Tokens a second, whole and streamed, and those of `Engine.generate` in a process of its own, in turns."""
    for count in streams:
        runs: dict[str, list[float]] = {"engine": [], "whole": [], "stream": []}
        for turn in range(4):
            runs["engine"].append(_engine_rate(count))
            for kind in ("whole", "stream"):
                bodies = [question(i + 1000 * turn, stream=kind == "stream") for i in range(count)]
                began = time.perf_counter()
                answers = asyncio.run(_all(map(server.ask, bodies)))
                assert all(status == 200 for status, _, _ in answers)
                runs[kind].append(count * ANSWER / (time.perf_counter() - began))
        best = {name: max(rates) for name, rates in runs.items()}
        parts = {f"{name}_part": round(best[name] / best["engine"], 3) for name in ("whole", "stream")}
        say(measure="throughput", streams=count, **{name: round(rate, 1) for name, rate in best.items()}, **parts)


_ENGINE = """
import sys, time, json
from qvl_runtime import Engine, SamplingParams
count, tokens, question = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
engine = Engine()
params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
for turn in range(2):  # the first one warms up
    prompts = [[{"role": "user", "content": f"{question} {turn} {i}"}] for i in range(count)]
    began = time.perf_counter()
    engine.generate(prompts, params)
    rate = count * tokens / (time.perf_counter() - began)
print(rate)
"""


def _engine_rate(count: int) -> float:
    arguments = [sys.executable, "-c", _ENGINE, str(count), str(ANSWER), QUESTION]
    return float(subprocess.run(arguments, capture_output=True, text=True, check=True).stdout)


async def _all(works: Any) -> list[Any]:
    return await asyncio.gather(*works)


def abort(server: Server, streams: tuple[int, ...]) -> None:
    """Milliseconds from the close of the connections until no request runs and no block is held."""

    async def one(count: int, body: Callable[[int], dict[str, Any]]) -> float:
        sent = [await server.send(body(i)) for i in range(count)]
        while await server.metric("num_requests_running") < count:
            await asyncio.sleep(0.01)
        began = time.perf_counter()
        for _, writer in sent:
            writer.transport.abort()
        while await server.metric("num_requests_running") or await server.metric("kv_cache_usage_perc"):
            await asyncio.sleep(0)
        return 1000 * (time.perf_counter() - began)

    kinds: dict[str, Callable[[int], dict[str, Any]]] = {
        "decode": lambda i: question(i, 1800),
        "stream": lambda i: question(i, 1800, stream=True),
        "prefill": lambda i: question(i, 8) | {"messages": [{"role": "user", "content": f"{i} words" * 1500}]},
    }
    for kind, body in kinds.items():
        for count in streams if kind != "prefill" else (1,):
            times = [asyncio.run(one(count, body)) for _ in range(5)]
            say(measure="abort", during=kind, streams=count, ms=[round(ms, 1) for ms in sorted(times)])


def lag(server: Server, megabytes: int = 10) -> None:
    """How long /health/live takes while pictures of `megabytes` in base64 are sent: the lag of the event loop."""
    import numpy as np
    from PIL import Image

    file, side = io.BytesIO(), int((megabytes * 0.75 * 2**20 / 3) ** 0.5)
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, "PNG", compress_level=0)
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What?"}]
    body = {"messages": [{"role": "user", "content": parts}], "max_tokens": 1}

    async def run(path: str) -> tuple[list[float], list[float]]:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)

        async def ping() -> float:
            began = time.perf_counter()
            writer.write(b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n")
            await reader.readuntil(b"}")
            return 1000 * (time.perf_counter() - began)

        idle = [await ping() for _ in range(200)]
        busy = []
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", _SENDER, str(server.port), path)
        while process.returncode is None:
            busy.append(await ping())
            await asyncio.sleep(0.001)
        writer.close()
        return idle, busy

    with tempfile.NamedTemporaryFile("w", suffix=".json") as request:
        json.dump(body, request)
        request.flush()
        idle, busy = asyncio.run(run(request.name))
    say(measure="lag", megabytes=round(len(url) / 1e6, 1), idle_ms=_spread(idle), busy_ms=_spread(busy))


_SENDER = """
import http.client, sys
data = open(sys.argv[2], "rb").read()
for _ in range(8):
    connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]))
    connection.request("POST", "/v1/chat/completions", data)
    assert connection.getresponse().status == 200
    connection.close()
"""


def _spread(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {"p50": round(ordered[len(ordered) // 2], 2), "p99": round(ordered[int(len(ordered) * 0.99)], 2)} | {
        "max": round(ordered[-1], 2)
    }


def overload(server: Server, clients: int = 256) -> None:
    """All clients at once against `--max-waiting 64`: each gets a right answer or 429, and none is lost."""

    def text(body: bytes) -> str:
        return str(json.loads(body)["choices"][0]["message"]["content"])

    async def run() -> tuple[list[str], list[tuple[int, bytes, float]]]:
        alone = [await server.ask(question(i, 32)) for i in range(8)]
        return [text(body) for _, body, _ in alone], await _all(server.ask(question(i % 8, 32)) for i in range(clients))

    want, answers = asyncio.run(run())
    statuses = [status for status, _, _ in answers]
    right = sum(status == 200 and text(body) == want[i % 8] for i, (status, body, _) in enumerate(answers))
    found = {"clients": clients, "answered": statuses.count(200), "right": right, "refused_429": statuses.count(429)}
    say(measure="overload", **found, ttft_s=percentiles(s for status, _, s in answers if status == 200))


def memory(server: Server, requests: int) -> None:
    """Resident memory over many requests, a third of them with a picture, some of which are left early."""
    from PIL import Image

    pictures = []
    for i in range(8):
        file = io.BytesIO()
        Image.new("RGB", (64, 64), (i * 30, 99, 200)).save(file, "PNG")
        pictures.append("data:image/png;base64," + base64.b64encode(file.getvalue()).decode())

    async def one(number: int) -> None:
        body = question(number % 977, 4, stream=number % 2 == 0)
        if number % 3 == 0:
            image = {"type": "image_url", "image_url": {"url": pictures[number % 8]}}
            body["messages"] = [{"role": "user", "content": [image, {"type": "text", "text": f"{number % 101}?"}]}]
        if number % 20 == 19:
            _, writer = await server.send(body)
            writer.transport.abort()
        else:
            status, _, _ = await server.ask(body)
            assert status == 200

    async def some(start: int, count: int) -> None:
        limit = asyncio.Semaphore(16)

        async def limited(number: int) -> None:
            async with limit:
                await one(number)

        await _all(limited(number) for number in range(start, start + count))

    sizes = []
    for start in range(0, requests, requests // 10):
        asyncio.run(some(start, requests // 10))
        sizes.append(round(server.memory() / 2**20, 1))
    say(measure="memory", requests=requests, MiB_after_each_tenth=sizes)


def main() -> None:
    """Run what was asked for, and print one JSON line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    everything = ("throughput", "abort", "lag", "overload", "memory")
    parser.add_argument("--only", default=",".join(everything), help="a list, of " + ", ".join(everything))
    parser.add_argument("--streams", default="1,8,64")
    parser.add_argument("--requests", type=int, default=10_000)
    arguments = parser.parse_args()
    chosen = arguments.only.split(",")
    streams = tuple(int(count) for count in arguments.streams.split(","))
    say(**setting())
    server = Server("--max-waiting", "64")
    try:
        measures: dict[str, Callable[[], None]] = {
            "throughput": lambda: throughput(server, streams),
            "abort": lambda: abort(server, streams),
            "lag": lambda: lag(server),
            "overload": lambda: overload(server),
            "memory": lambda: memory(server, arguments.requests),
        }
        for name in chosen:
            measures[name]()
    finally:
        server.close()


if __name__ == "__main__":
    main()
