"""Measure innocent requests next to hostile ones: `python -m benchmarks.serving.hostile`, --help lists the options.

Each hostile request is sent and kept in flight to one `AsyncEngine`, while a text and a request with an ordinary image
are answered again and again. Printed are the median and the longest time to first token of each, alone in the same run
(just before) and next to them, and what this process and its workers held at most.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.serving import hostile_images
from benchmarks.timing import others, say, setting
from qvl_runtime import AsyncEngine, Engine, QVLError, SamplingParams
from qvl_runtime.engine.engine import NANO
from qvl_runtime.host import resident_memory
from qvl_runtime.prompt.isolation.pool import shared_pool

ONE = SamplingParams(max_tokens=1)


class Peak:
    """The largest resident memory of this process and, together, of its workers, in bytes."""

    def __init__(self) -> None:
        self.own = self.workers = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def end(self) -> None:
        """Stop watching."""
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            self.own = max(self.own, resident_memory())
            self.workers = max(self.workers, sum(map(_resident, shared_pool().pids())))


def main() -> None:
    """Run the cases and print one JSON line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=NANO, help="checkpoint folder; default: the shipped nano")
    parser.add_argument(
        "--seconds", type=float, default=4.0, help="how long each case is measured, alone and next to hostile ones"
    )
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    parser.add_argument("--in-process", action="store_true", help="decode without workers, for comparison")
    args = parser.parse_args()
    say(**setting())
    with silent_sites() as ports:
        engine = Engine(args.model, allow_private_addresses=True, isolate_images=not args.in_process)
        asyncio.run(measure(engine, args, hostile_requests(*ports)))


async def measure(engine: Engine, args: argparse.Namespace, cases: dict[str, list[Any]]) -> None:
    """Measure each case, first without and then with its hostile requests in flight."""
    innocent: dict[str, Any] = {
        "text": "What is in a picture?",
        "image": [{"image": ordinary_image()}, {"text": "What is this?"}],
    }
    async with AsyncEngine(engine) as served:
        for prompt in innocent.values():
            await served.generate(prompt, ONE)
        for name, requests in cases.items():
            if args.only not in name:
                continue
            load, before = others(), resident_memory()
            alone = await times(served, innocent, args.seconds)
            peak = Peak()
            attackers = [asyncio.create_task(repeat(served, request)) for request in requests]
            await asyncio.sleep(0.5)
            next_to = await times(served, innocent, args.seconds)
            for attacker in attackers:
                attacker.cancel()
            errors = [type(e).__name__ for e in await asyncio.gather(*attackers, return_exceptions=True)]
            peak.end()
            figures: dict[str, Any] = {}
            for kind in innocent:
                figures[f"{kind}_alone_ms"] = 1e3 * median(alone[kind])
                figures[f"{kind}_next_to_ms"] = 1e3 * median(next_to[kind])
                figures[f"{kind}_longest_ms"] = 1e3 * max(next_to[kind])
                figures[f"{kind}_ratio"] = median(next_to[kind]) / median(alone[kind])
            say(
                hostile=name,
                requests=len(requests),
                **figures,
                rss_growth_mib=max(0, peak.own - before) / 2**20,
                workers_mib=peak.workers / 2**20,
                threads=threading.active_count(),
                other_cores=load(),
                ended=len(errors),
            )


async def times(served: AsyncEngine, prompts: dict[str, Any], seconds: float) -> dict[str, list[float]]:
    """Times to first token of the prompts, in turns, for a number of seconds."""
    taken: dict[str, list[float]] = {kind: [] for kind in prompts}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for kind, prompt in prompts.items():
            began = time.perf_counter()
            await served.generate(prompt, ONE)
            taken[kind].append(time.perf_counter() - began)
            await asyncio.sleep(0.02)
    return taken


async def repeat(served: AsyncEngine, prompt: Any) -> None:
    """Send a request again as soon as it has failed or is answered, until this is canceled."""
    while True:
        try:
            await served.generate(prompt, ONE)
        except QVLError:
            await asyncio.sleep(0.05)


def hostile_requests(silent: int, trickling: int) -> dict[str, list[Any]]:
    """The requests of each case."""
    files = {name: make() for name, make in hostile_images.FILES.items()}
    cases: dict[str, list[Any]] = {}
    cases["16 PNGs of 40 MP in a request"] = [[{"image": files["PNG of 40 MP"]}] * 16]
    for name, data in files.items():
        cases[name] = [[{"image": data}]]
    for name in ("progressive JPEG, 4 MP, 2,000 scans", "progressive JPEG, 36 MP, 2,000 scans"):
        cases[f"6 times {name}"] = [[{"image": files[name]}]] * 6
    cases["6 addresses that do not answer"] = [[{"image": f"http://127.0.0.1:{silent}/{n}"}] for n in range(6)]
    cases["100 addresses that trickle a header"] = [
        [{"image": f"http://127.0.0.1:{trickling}/{n}"}] for n in range(100)
    ]
    return cases


def ordinary_image() -> bytes:
    """A JPEG of 1024 x 768 with structure, some 100 KB."""
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize((1024, 768), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


@contextmanager
def silent_sites() -> Iterator[tuple[int, int]]:
    """The ports of a site that accepts and says nothing, and of one that sends a byte of a header now and then."""
    servers = [socket.create_server(("127.0.0.1", 0), backlog=512) for _ in range(2)]

    def accept(server: socket.socket, answer: Callable[[socket.socket], None]) -> None:
        while True:
            try:
                connection = server.accept()[0]
            except OSError:
                return
            threading.Thread(target=answer, args=(connection,), daemon=True).start()

    def trickle(connection: socket.socket) -> None:
        try:
            connection.sendall(b"HTTP/1.1 200 OK\r\nX: ")
            while True:
                connection.sendall(b"x")
                time.sleep(0.5)
        except OSError:
            connection.close()

    def wait(connection: socket.socket) -> None:
        while connection.recv(4096):
            pass
        connection.close()

    for server, answer in zip(servers, (wait, trickle), strict=True):
        threading.Thread(target=accept, args=(server, answer), daemon=True).start()
    yield servers[0].getsockname()[1], servers[1].getsockname()[1]
    for server in servers:
        server.close()


def _resident(pid: int) -> int:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0
    return pages * 4096


if __name__ == "__main__":
    main()
