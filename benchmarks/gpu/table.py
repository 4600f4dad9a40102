"""The documented table on the full-size model: speed, memory, requests together, and time to first token.

Documented for an A100-SXM4-80G: tokens a second while generating up to 2048 and 8192 tokens after an image, and peak
memory there, of the original code in BF16 and Int4. Here the speed is that of tokens at `POINTS` places along the way,
32 after each; a step's time grows evenly with the context, so that the mean of theirs is the mean of all.
"""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median
from typing import Any

import torch

from benchmarks.gpu.asking import IMAGE_TOKENS, first_token_seconds, text, tokens_per_second, with_picture
from benchmarks.gpu.bounds import full_config, token_bytes
from benchmarks.gpu.engines import NAMES, kv_dtype
from benchmarks.gpu.place import Place
from qvl_runtime import Engine

Row = dict[str, Any]
SPEED = {("bf16", 2048): 28.87, ("bf16", 8192): 24.32, ("int4", 2048): 37.79, ("int4", 8192): 34.34}  # tok/s
MEMORY = {("bf16", 2048): 22.60, ("bf16", 8192): 28.01, ("int4", 2048): 11.82, ("int4", 8192): 17.23}  # GB
POINTS, DECODED = 5, 32
TINY = 3  # tokens of a prompt without a GPU, as the interpreter runs each row by itself
BATCHES = (1, 2, 4, 8, 16, 32, 64)
CONTEXTS = (2048, 8192)
TEXTS = (32, 128, 300, 512, 1024, 2048)  # prompts for the time to first token
QUESTION = 32  # tokens after a picture
TURNS = 3


def speeds(place: Place, engine: Engine, kind: str) -> Iterator[Row]:
    """Decode speed and peak memory by context."""
    for context in (12,) if place.tiny else CONTEXTS:
        yield _speed(place, engine, kind, context)
        yield _memory(place, engine, kind, context)


def throughput(place: Place, engine: Engine, kind: str) -> Iterator[Row]:
    """Tokens a second of 1 to 64 requests together."""
    for batch in (2,) if place.tiny else BATCHES:
        length, tokens = (TINY, 2) if place.tiny else (128, 48)
        speed = tokens_per_second(engine, [text(length, 100 * batch + r) for r in range(batch)], tokens)
        yield {"what": "throughput", "model": kind, "requests": batch, "tok_s": speed}


def first_tokens(place: Place, engine: Engine, kind: str) -> Iterator[Row]:
    """Time to first token by prompt length, of a new picture with a question, and of another question about it."""
    for length in (TINY,) if place.tiny else TEXTS:
        taken = [first_token_seconds(place, engine, text(length, 31 * length + 7 * turn)) for turn in range(TURNS)]
        yield _first(kind, f"{length} tokens", taken)
    if place.tiny:
        return
    new: list[float] = []
    again: list[float] = []
    for turn in range(TURNS):
        for taken, seed in ((new, 500 + turn), (again, 600 + turn)):
            taken.append(
                first_token_seconds(place, engine, with_picture(engine, IMAGE_TOKENS + QUESTION, seed, 1 + turn))
            )
    yield _first(kind, "a new picture and 32 tokens", new)
    yield _first(kind, "the same picture and other 32 tokens", again)


def _first(kind: str, prompt: str, taken: list[float]) -> Row:
    return {
        "what": "first token",
        "model": kind,
        "prompt": prompt,
        "ms": 1e3 * median(taken),
        "slowest_ms": 1e3 * max(taken),
    }


def _speed(place: Place, engine: Engine, kind: str, context: int) -> Row:
    tokens = 2 if place.tiny else DECODED
    first = TINY if place.tiny else IMAGE_TOKENS + 2
    points = 1 if place.tiny else POINTS
    places = [first + (context - tokens - first) * i // max(1, points - 1) for i in range(points)]
    prompts = [text(at, at) if place.tiny else with_picture(engine, at, 0, 0) for at in places]
    steps = [1 / tokens_per_second(engine, [prompt], tokens) for prompt in prompts]
    speed = len(steps) / sum(steps)
    row: Row = {"what": "speed", "model": kind, "tokens": context, "tok_s": speed}
    if place.tiny:
        return row
    documented = SPEED.get((kind, context))
    rate = speed * token_bytes(full_config(NAMES[kind]), sum(places) // len(places), kv_dtype(kind))
    return row | {
        "documented": documented,
        "times": speed / documented if documented else None,
        "gb_s": None if kind == "int4-options" else rate / 1e9,  # the head is not in 16 bits
        "of_peak": rate / place.peak if place.peak and kind != "int4-options" else None,
    }


def _memory(place: Place, engine: Engine, kind: str, context: int) -> Row:
    """Peak of what was allocated, with a KV cache for `context` tokens: the rest of the cache is subtracted."""
    if place.tiny:
        return {"what": "memory", "model": kind, "tokens": context, "gb": None}
    cache = engine.core.runner.cache
    peak = torch.cuda.max_memory_allocated() - (cache.num_slots - context) * cache.bytes_per_token
    documented = MEMORY.get((kind, context))
    return {
        "what": "memory",
        "model": kind,
        "tokens": context,
        "gb": peak / 1e9,
        "gib": peak / 2**30,
        "documented": documented,
        "times": peak / 1e9 / documented if documented else None,
    }
