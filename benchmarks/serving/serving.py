"""Requests that arrive at random, over AsyncEngine: latency and throughput at several rates, and one at a time.

    python -m benchmarks.serving --rates 2,5,10 --requests 60           # the shipped nano
    python -m benchmarks.serving --synthetic qwen-vl-chat-int4 --precision fast --rates 0.05,0.1 --requests 12

Arrivals are a Poisson process. Two thirds of the requests carry an image, of a few that repeat; the others are text.
One JSON line for each rate; without a rate limit (`inf`) all arrive at once.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks.timing import say, setting
from qvl_runtime import Engine, SamplingParams
from qvl_runtime.engine.async_engine import AsyncEngine
from qvl_runtime.profile.spread import percentiles

QUESTIONS = ("What is in the image?", "Box the largest thing.", "What colors are there?", "Read the number.")
TEXTS = ("Hello!", "Tell me about boxes.", "Count to ten.")


@dataclass(slots=True)
class Latencies:
    """The latencies of one request, in seconds."""

    ttft: float = 0.0
    gaps: list[float] = field(default_factory=list)  # between its pieces
    tokens: int = 0


def requests(engine: Engine, count: int, images: int, turn: int) -> list[tuple[Any, SamplingParams]]:
    """Conversations of one turn and how long their answers are. Turns differ only in what the caches compare."""
    rng, size = random.Random(0), engine.config.visual.image_size
    noise = np.random.default_rng(turn).integers(0, 256, (images, size, size, 3), dtype=np.uint8)
    made = []
    for _ in range(count):
        parts: list[dict[str, Any]] = [{"type": "text", "text": rng.choice(TEXTS)}]
        if rng.random() < 2 / 3:
            shown = {"type": "image", "image": noise[rng.randrange(images)]}
            parts = [shown, {"type": "text", "text": rng.choice(QUESTIONS)}]
        length = rng.choice((8, 16, 32))
        params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=length, cache_salt=f"{turn}")
        made.append(([{"role": "user", "content": parts}], params))
    return made


async def arrive(
    engine: AsyncEngine, submissions: list[tuple[Any, SamplingParams]], rate: float, seed: int
) -> list[Latencies]:
    """Submit the requests at random intervals, `rate` a second, and return the latencies of each."""
    rng = random.Random(seed)

    async def one(prompt: Any, params: SamplingParams) -> Latencies:
        seen, last = Latencies(), time.perf_counter()
        began = last
        async for piece in engine.stream(prompt, params):
            now = time.perf_counter()
            if not seen.tokens:
                seen.ttft = now - began
            else:
                seen.gaps += [(now - last) / max(1, len(piece.token_ids))] * len(piece.token_ids)
            seen.tokens, last = seen.tokens + len(piece.token_ids), now
        return seen

    tasks = []
    for prompt, params in submissions:
        tasks.append(asyncio.create_task(one(prompt, params)))
        await asyncio.sleep(rng.expovariate(rate) if rate < float("inf") else 0)
    return list(await asyncio.gather(*tasks))


def serve(engine: Engine, submissions: list[tuple[Any, SamplingParams]], rate: float) -> dict[str, Any]:
    """Throughput, latencies and hit rates at one rate of arrivals, in requests a second."""

    async def run() -> list[Latencies]:
        async with AsyncEngine(engine) as served:
            return await arrive(served, submissions, rate, 1)

    before, began = engine.report()["caches"], time.perf_counter()
    seen = asyncio.run(run())
    took, after = time.perf_counter() - began, engine.report()["caches"]
    looked_up, hit = (after["prefixes"][k] - before["prefixes"][k] for k in ("asked_tokens", "hit_tokens"))
    return {
        "rate": rate,
        "requests": len(seen),
        "tok_s": sum(s.tokens for s in seen) / took,
        "seconds": took,
        "ttft_s": percentiles(s.ttft for s in seen),
        "tpot_s": percentiles(g for s in seen for g in s.gaps),
        "prefix_hit_rate": hit / max(1, looked_up),
    }


def one_at_a_time(engine: Engine, submissions: list[tuple[Any, SamplingParams]]) -> dict[str, Any]:
    """The same requests, each after the last is done, as a script around the original would run them."""
    began, tokens = time.perf_counter(), 0
    for prompt, params in submissions:
        tokens += len(engine.chat(prompt, params).token_ids)
    took = time.perf_counter() - began
    return {"rate": "one at a time", "requests": len(submissions), "tok_s": tokens / took, "seconds": took}


def measure(options: dict[str, Any], rates: list[float], count: int, images: int) -> list[dict[str, Any]]:
    """One record for each rate and one for one at a time, every time with empty caches."""
    records, engine = [], Engine(**options)
    for turn, rate in enumerate([*rates, None]):
        submissions = requests(engine, count, images, turn)
        records.append(one_at_a_time(engine, submissions) if rate is None else serve(engine, submissions, rate))
    return records


def main() -> None:
    """Print one JSON line for each rate, and one for one request at a time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint; without it the shipped nano")
    parser.add_argument("--synthetic", choices=["qwen-vl-chat", "qwen-vl-chat-int4"])
    parser.add_argument("--precision", default="exact", choices=["exact", "fast"])
    parser.add_argument("--rates", default="2,5,10,inf", help="requests a second")
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--images", type=int, default=6, help="different images among the requests")
    args = parser.parse_args()
    say(**setting())
    options = {"model": args.model, "synthetic": args.synthetic, "precision": args.precision}
    for record in measure(options, [float(r) for r in args.rates.split(",")], args.requests, args.images):
        say(**record)


if __name__ == "__main__":
    main()
