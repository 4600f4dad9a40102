"""Workloads of random requests, answered one at a time or together, with the state checked between steps."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from qvl_runtime import Engine, SamplingParams
from qvl_runtime.schedule.request import Request


def image(seed: int, size: int = 32) -> Image.Image:
    """Colored noise, the same for the same seed."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8))


class WorkloadRequest(NamedTuple):
    """A request of the workload: token ids with images, the tokens to generate, and when to cancel it."""

    prompt: dict[str, Any]
    max_tokens: int
    cancelled_after: int | None = None  # tokens of the answer


def prompt_of(engine: Engine, *parts: Sequence[int] | Image.Image) -> dict[str, Any]:
    """Token ids and images in this order, as the engine expects them."""
    ids: list[int] = []
    images = [part for part in parts if isinstance(part, Image.Image)]
    for part in parts:
        ids += [engine.tokenizer.img_start, engine.tokenizer.img_end] if isinstance(part, Image.Image) else part
    return {"token_ids": ids, "images": images}


def random_requests(engine: Engine, count: int, longest: int, seed: int = 0) -> list[WorkloadRequest]:
    """0 to 3 images of a few, 5 to `longest` tokens, some beginnings shared; one in ten is cancelled."""
    rng = random.Random(seed)
    images = [image(i) for i in range(4)]

    def text(length: int) -> list[int]:
        return [rng.randrange(256) for _ in range(length)]

    openings: list[list[Any]] = [
        [],
        [text(5)],
        [text(40)],
        [text(9), images[0]],
        [images[1], text(20), images[2]],
    ]
    requests = []
    for _ in range(count):
        parts = list(rng.choice(openings))
        for _ in range(rng.choice((0, 0, 0, 1)) if len(parts) > 1 else rng.choice((0, 0, 1, 2, 3))):
            parts += [rng.choice(images), text(rng.randrange(1, 8))]
        length = rng.choice((rng.randrange(5, 40), rng.randrange(5, 40), rng.randrange(40, 300), 0))
        parts.append(text(length or (longest if rng.random() < 0.2 else 17)))
        cancelled = rng.randrange(0, 5) if rng.random() < 0.1 else None
        requests.append(WorkloadRequest(prompt_of(engine, *parts), rng.randrange(1, 12), cancelled))
    return requests


def greedy(max_tokens: int, **others: Any) -> SamplingParams:
    """Sampling parameters for exactly `max_tokens` greedy tokens."""
    return SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True, **others)


def one_at_a_time(engine: Engine, requests: Sequence[WorkloadRequest]) -> list[tuple[int, ...]]:
    """Return the answer to each request when it runs alone and nothing is cached."""
    return [engine.generate([w.prompt], greedy(w.max_tokens))[0].token_ids for w in requests]


def all_together(
    engine: Engine, requests: Sequence[WorkloadRequest], preempt: bool = False, seed: int = 0
) -> list[tuple[int, ...] | None]:
    """Answers to requests that arrive at random while others run; None for cancelled ones. Checks the cache as it runs.

    preempt: at random steps some running requests lose their blocks, as if the cache were full.
    """
    rng, core = random.Random(seed), engine.core
    arriving, running = list(enumerate(requests)), dict[int, Request]()
    answers: list[tuple[int, ...] | None] = [None] * len(requests)
    while arriving or running:
        for _ in range(rng.choice((0, 0, 1, 2, 8))):
            if arriving:
                index, want = arriving.pop(0)
                running[index] = engine.submit(engine.encode(want.prompt), greedy(want.max_tokens))
        if preempt and rng.random() < 0.2:
            core.scheduler.make_room(core.runner.cache.pool.available + rng.randrange(1, 40))
        core.step()
        if core.steps % 7 == 0:
            core.runner.cache.check_integrity()
        for index, request in list(running.items()):
            limit, made = requests[index].cancelled_after, len(request.branches[0].output.token_ids)
            if request.done:
                answers[index] = request.completion().token_ids
            elif limit is not None and made >= limit:
                core.cancel(request)
            else:
                continue
            del running[index]
    cache = core.runner.cache
    cache.check_integrity()
    assert cache.pool.available == cache.pool.num_blocks, "a block is still held"
    return answers
