"""A short soak: caches fill up, are turned over, and nothing grows or leaks. The long one: benchmarks, `soak`."""

from __future__ import annotations

import ctypes
import gc
import random
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks.serving.workload import image, prompt_of
from qvl_runtime import Engine, SamplingParams
from qvl_runtime.schedule.request import Branch
from tests.leaks import instances, left_behind

pytestmark = pytest.mark.cpu


def test_what_is_held_does_not_grow() -> None:
    kept = left_behind(lambda: instances(Branch))
    engine = Engine(kv_cache_bytes=2 * 2**20, image_cache_bytes=2**18, max_running=8)
    dice = random.Random(0)
    cache, images = engine.core.runner.cache, engine.core.runner.images

    def requests() -> Iterator[tuple[int, Any, SamplingParams]]:
        for i in range(80):
            prompt = prompt_of(engine, range(10), image(dice.randrange(40)), [dice.randrange(256)] * 9)
            yield i, prompt, SamplingParams(max_tokens=dice.randrange(1, 9), temperature=dice.choice((0.0, 1.0)))

    done = [tag for tag, completion in engine.as_completed(requests()) if completion.token_ids]  # type: ignore[union-attr]
    assert sorted(done) == list(range(80))
    cache.check_integrity()
    assert cache.pool.available == cache.pool.num_blocks
    assert cache.pool.evictions > 0, "the cache was turned over"
    assert images.bytes <= images.max_bytes and len(images) < 40
    assert cache.prefixes is not None and len(cache.prefixes.blocks) <= cache.pool.num_blocks
    del done
    assert not kept()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the heap of glibc")
def test_the_heap_stays_as_it_is_after_the_first_prompts() -> None:
    """What torch compiles for each number of rows stays in the heap: prompts of new lengths must not add to it."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        pytest.skip("the C library has no mallinfo2")
    libc.mallinfo2.restype = Heap
    engine = Engine(dtype="bfloat16", kv_cache_bytes=8 * 2**20, prefix_caching=False)
    dice, marks = random.Random(0), list[int]()
    for _ in range(3):
        for length in dice.sample(range(5, 1000), 30):
            prompt = {"token_ids": [dice.randrange(256) for _ in range(length)]}
            engine.generate([prompt], SamplingParams(max_tokens=2, temperature=0.0))
        gc.collect()
        marks.append(libc.mallinfo2().in_use)
    # measured: 14 KiB; with code for 32 numbers of rows 6.5 MiB
    assert marks[2] - marks[1] < 2**20, marks


class Heap(ctypes.Structure):
    """`struct mallinfo2`, mallinfo(3): bytes and counts of the main heap."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "in_use", "free", "top")
    ]
