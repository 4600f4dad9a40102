"""What constraints cost: `python -m benchmarks.constraints`. One JSON line a figure.

Answers with boxes that are legal anyway are generated free and held to the grammar, in turns, with the same tokens; the
median of the ratios of neighbors is told, which a machine that grows slower meanwhile does not change. `--schema` times
the first token of an answer with a schema that was never seen, while others are being answered.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from dataclasses import replace
from statistics import median
from typing import Any, NamedTuple

import torch

from benchmarks.timing import say, setting
from qvl_runtime import AsyncEngine, Engine, SamplingParams
from qvl_runtime.engine.engine import NANO

IMAGE = NANO.parent / "assets" / "demo.jpg"
QUESTION = "Generate the caption in English with grounding:"
FREE = SamplingParams(temperature=0, max_tokens=90, repetition_penalty=1.0)


class Spent(NamedTuple):
    """What a batch took."""

    wall_s: float
    process_s: float
    tokens: int
    steps: int


def generate(engine: Engine, prompts: list[Any], params: SamplingParams) -> Spent:
    """Answer prompts together."""
    steps, wall, process = engine.core.steps, time.perf_counter(), time.process_time()
    answers = engine.generate(prompts, params)
    spent = time.perf_counter() - wall, time.process_time() - process
    return Spent(*spent, sum(len(answer.token_ids) for answer in answers), engine.core.steps - steps)


def boxes(engine: Engine, rows: int, rounds: int, kind: str) -> dict[str, Any]:
    """The cost of the grammar for a batch of one question, whose answer it does not change."""
    prompt = [{"image": str(IMAGE)}, {"text": QUESTION}]
    held, prompts = replace(FREE, boxes=kind), [prompt] * rows
    if engine.generate(prompts[:1], held)[0].token_ids != engine.generate(prompts[:1], FREE)[0].token_ids:
        raise SystemExit("the answer is another one under the grammar: choose another question")
    for params in (FREE, held):
        generate(engine, prompts, params)
    pairs = []
    for number in range(rounds):
        order = (FREE, held) if number % 2 else (held, FREE)
        first, second = (generate(engine, prompts, params) for params in order)
        pairs.append((first, second) if number % 2 else (second, first))
    free, constrained = zip(*pairs, strict=True)
    return {
        "rows": rows,
        "boxes": kind,
        "tokens": free[0].tokens,
        "steps": [free[0].steps, constrained[0].steps],
        "free_tokens_per_s": round(free[0].tokens / median(one.wall_s for one in free)),
        "held_tokens_per_s": round(free[0].tokens / median(one.wall_s for one in constrained)),
        "wall_ratio": round(median(b.wall_s / a.wall_s for a, b in pairs), 3),
        "process_ratio": round(median(b.process_s / a.process_s for a, b in pairs), 3),
        "us_a_token": round(1e6 * median(b.process_s - a.process_s for a, b in pairs) / free[0].tokens, 1),
    }


def schema(number: int) -> dict[str, Any]:
    """A schema that no other has compiled."""
    fields = {f"field_{number}_{i}": {"type": "string", "enum": ["a", "b", f"c{i}"]} for i in range(8)}
    return {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}


async def first_tokens(engine: Engine, others: int, rounds: int) -> dict[str, Any]:
    """Milliseconds to the first token with a new schema, one seen before, and none; the longest wait of the others."""
    found: dict[str, list[float]] = {"new": [], "seen": [], "free": []}
    gaps: list[float] = []
    async with AsyncEngine(engine) as served:

        async def stream() -> None:
            endless = SamplingParams(temperature=0, max_tokens=100_000, ignore_eos=True)
            last = time.perf_counter()
            async for _ in served.stream("Tell me", endless):
                gaps.append(time.perf_counter() - last)
                last += gaps[-1]

        async def first(params: SamplingParams) -> float:
            began = time.perf_counter()
            async for _ in served.stream("Write", params):
                return 1000 * (time.perf_counter() - began)
            raise RuntimeError("the stream ended before its first piece")

        await first(replace(FREE, json_schema=schema(-1)))  # the vocabulary, once a checkpoint
        tasks = [asyncio.create_task(stream()) for _ in range(others)]
        await asyncio.sleep(0.5)
        gaps.clear()
        for number in range(rounds):
            for name, wanted in (("new", schema(1000 * others + number)), ("seen", schema(-1)), ("free", None)):
                found[name].append(await first(replace(FREE, json_schema=wanted)))
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    figures = {f"{name}_ms": round(median(times), 2) for name, times in found.items()}
    worst = {"longest_gap_ms": round(1000 * max(gaps), 1), "gap_ms": round(1000 * median(gaps), 2)} if gaps else {}
    return {"others": others, **figures, **worst}


def main() -> None:
    """Measure on the small checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 8, 64])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--boxes", choices=("allow", "force"), default="allow")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--schema", action="store_true", help="time the first token with a new schema instead")
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    engine = Engine(max_model_len=512 if not options.schema else 2**17, kv_cache_bytes=2**28)
    for rows in options.rows:
        if options.schema:
            found = asyncio.run(first_tokens(engine, rows, options.rounds))
        else:
            found = boxes(engine, rows, options.rounds, options.boxes)
        say(**setting(), **found)


if __name__ == "__main__":
    main()
