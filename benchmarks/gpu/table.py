"""The documented table, on the full-size model with random weights: speed, memory, and requests together.

Documented for an A100-SXM4-80G: tokens a second while generating up to 2048 and 8192 tokens after an image, and peak
memory there, of the original code in BF16 and Int4. Here the speed is that of tokens at `POINTS` places along the way,
32 after each; a step's time grows evenly with the context, so that the mean of theirs is the mean of all.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from PIL import Image

from benchmarks.gpu.bounds import full_config, token_bytes
from benchmarks.gpu.place import Place
from qvl_runtime import Engine, SamplingParams
from qvl_runtime.model.cache_layout import bytes_per_token

Row = dict[str, Any]
SPEED = {("bf16", 2048): 28.87, ("bf16", 8192): 24.32, ("int4", 2048): 37.79, ("int4", 8192): 34.34}  # tok/s
MEMORY = {("bf16", 2048): 22.60, ("bf16", 8192): 28.01, ("int4", 2048): 11.82, ("int4", 8192): 17.23}  # GB
NAMES = {"bf16": "qwen-vl-chat", "int4": "qwen-vl-chat-int4"}
IMAGE_TOKENS = 258
POINTS, DECODED = 5, 32
TINY = 3  # tokens of a prompt without a GPU, as the interpreter runs each row by itself
BATCHES = (1, 2, 4, 8, 16, 32, 64)


def table(place: Place, kind: str) -> Iterator[Row]:
    """Rows of speed, memory and throughput for `bf16` or `int4`; tiny: of nano, to see that all of it runs."""
    contexts = (12,) if place.tiny else (2048, 8192)
    engine = _engine(place, kind, contexts[-1] + 64)
    if not place.tiny:
        _answer(engine, 1, 8, 2)  # compiles kernels that the warm-up did not
    for context in contexts:
        yield _speed(place, engine, kind, context)
        yield _memory(place, engine, kind, context, contexts[-1] + 64)
    for batch in (2,) if place.tiny else BATCHES:
        yield _throughput(engine, kind, batch, place)
    del engine
    place.settle()


def _engine(place: Place, kind: str, longest: int) -> Engine:
    if place.tiny:
        return Engine(None if kind == "bf16" else _nano_int4(), device="cpu", dtype="float16", max_model_len=longest)
    torch.cuda.reset_peak_memory_stats()
    config = full_config(NAMES[kind])
    needed = max(longest, 64 * 192) * bytes_per_token(config, torch.bfloat16)
    dtype = "bfloat16" if kind == "bf16" else "float16"
    return Engine(
        synthetic=NAMES[kind], device=str(place.device), dtype=dtype, max_model_len=longest, kv_cache_bytes=needed
    )


def _nano_int4() -> str:
    from qvl_runtime.engine.engine import NANO

    return str(NANO.parent / "nano_int4")


def _answer(engine: Engine, requests: int, context: int, tokens: int, image: bool = False) -> float:
    """Tokens a second of all requests together after the first token of each."""
    marks = (engine.tokenizer.img_start, engine.tokenizer.img_end)
    ids = [*marks * image, *[7] * (context - IMAGE_TOKENS * image)]
    images = [Image.new("RGB", (448, 448), "gray")] * image
    params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
    prompts: list[Any] = [
        {"token_ids": [r + 1, *ids[1:]] if not image else ids, "images": images} for r in range(requests)
    ]
    submitted = [engine.submit(engine.encode(prompt), params) for prompt in prompts]
    while any(not request.branches or not request.branches[0].output.token_ids for request in submitted):
        engine.core.step()
    began = time.perf_counter()
    made = -sum(len(request.branches[0].output.token_ids) for request in submitted)
    while engine.core.step():
        pass
    made += sum(len(request.completion().token_ids) for request in submitted)
    return made / (time.perf_counter() - began)


def _speed(place: Place, engine: Engine, kind: str, context: int) -> Row:
    tokens = 2 if place.tiny else DECODED
    first = TINY if place.tiny else IMAGE_TOKENS + 2
    points = 1 if place.tiny else POINTS
    places = [first + (context - tokens - first) * i // max(1, points - 1) for i in range(points)]
    steps = [1 / _answer(engine, 1, at, tokens, image=not place.tiny) for at in places]
    speed = len(steps) / sum(steps)
    row: Row = {"what": "speed", "model": kind, "tokens": context, "tok_s": speed}
    if place.tiny:
        return row
    rate = speed * token_bytes(full_config(NAMES[kind]), sum(places) // len(places))
    documented = SPEED[kind, context]
    return row | {
        "documented": documented,
        "times": speed / documented,
        "gb_s": rate / 1e9,
        "of_peak": rate / place.peak if place.peak else None,
    }


def _memory(place: Place, engine: Engine, kind: str, context: int, longest: int) -> Row:
    """Peak of what was allocated, with a KV cache for `context` tokens: the rest of the cache is subtracted."""
    if place.tiny:
        return {"what": "memory", "model": kind, "tokens": context, "gb": None}
    cache = engine.core.runner.cache
    peak = torch.cuda.max_memory_allocated() - (cache.num_slots - context) * cache.bytes_per_token
    documented = MEMORY[kind, context]
    return {
        "what": "memory",
        "model": kind,
        "tokens": context,
        "gb": peak / 1e9,
        "documented": documented,
        "times": peak / 1e9 / documented,
    }


def _throughput(engine: Engine, kind: str, batch: int, place: Place) -> Row:
    context, tokens = (TINY, 2) if place.tiny else (128, 48)
    return {"what": "throughput", "model": kind, "requests": batch, "tok_s": _answer(engine, batch, context, tokens)}
