"""A short soak: caches fill up, are turned over, and nothing grows or leaks. The long one: benchmarks, `soak`."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator
from typing import Any

import pytest

from qvl_runtime import Engine, SamplingParams
from qvl_runtime.schedule.task import Task
from tests.schedule.drive import picture, prompt_of

pytestmark = pytest.mark.cpu


def test_what_is_held_does_not_grow() -> None:
    engine = Engine(kv_cache_bytes=2 * 2**20, image_cache_bytes=2**18, max_running=8)
    dice = random.Random(0)
    cache, images = engine.loop.runner.cache, engine.loop.runner.images

    def requests() -> Iterator[tuple[int, Any, SamplingParams]]:
        for i in range(80):
            prompt = prompt_of(engine, range(10), picture(dice.randrange(40)), [dice.randrange(256)] * 9)
            yield i, prompt, SamplingParams(max_tokens=dice.randrange(1, 9), temperature=dice.choice((0.0, 1.0)))

    done = [tag for tag, completion in engine.as_completed(requests()) if completion.token_ids]
    assert sorted(done) == list(range(80))
    cache.check_integrity()
    assert cache.pool.available == cache.pool.num_blocks
    assert cache.pool.evictions > 0, "the cache was turned over"
    assert images.bytes <= images.max_bytes and len(images) < 40
    assert cache.prefixes is not None and len(cache.prefixes.blocks) <= cache.pool.num_blocks
    del done
    gc.collect()
    assert not [o for o in gc.get_objects() if type(o) is Task]
