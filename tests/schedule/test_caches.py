"""The KV pool and the image cache: what is given out comes back, and caps hold."""

from __future__ import annotations

import pytest
import torch

from qvl_runtime.config.model import ModelConfig
from qvl_runtime.engine.engine import NANO
from qvl_runtime.errors import CapacityError
from qvl_runtime.model.cache_layout import BLOCK_SIZE
from qvl_runtime.schedule.image_cache import ImageCache
from qvl_runtime.schedule.kv_cache import KVCache, layout_of

pytestmark = pytest.mark.unit


@pytest.fixture
def cache() -> KVCache:
    return KVCache(ModelConfig.from_folder(NANO), 4 * BLOCK_SIZE, torch.bfloat16, torch.device("cpu"))


def test_layout_of_two_sequences(cache: KVCache) -> None:
    with cache.sequence(1.0) as a, cache.sequence(1.0) as b:
        a.append(BLOCK_SIZE + 1)
        b.append(3)
        positions, layout = layout_of([a, b], [BLOCK_SIZE + 1, 3])
        assert positions.tolist() == [*range(BLOCK_SIZE + 1), 0, 1, 2]
        assert layout.query_starts == [0, BLOCK_SIZE + 1, BLOCK_SIZE + 4]
        assert layout.context_lens == [BLOCK_SIZE + 1, 3]
        assert layout.slots.unique().numel() == BLOCK_SIZE + 4  # type: ignore[no-untyped-call]
        assert layout.slots[BLOCK_SIZE].item() == a.blocks[1] * BLOCK_SIZE
        assert layout.slots[-1].item() == b.blocks[0] * BLOCK_SIZE + 2
        assert not set(a.blocks) & set(b.blocks)
        a.append(1)
        assert layout_of([a], [1])[0].tolist() == [BLOCK_SIZE + 1]
    assert cache.free_tokens == cache.num_slots


def test_a_full_pool_says_so_and_loses_nothing(cache: KVCache) -> None:
    with cache.sequence(1.0) as a, cache.sequence(1.0) as b:
        a.append(3 * BLOCK_SIZE)
        with pytest.raises(CapacityError, match="all 4 blocks of the KV cache are held by running requests"):
            b.append(2 * BLOCK_SIZE)
        assert b.length == 0
        b.append(BLOCK_SIZE)
        cache.check_integrity()
    assert cache.free_tokens == cache.num_slots


def test_truncated_tokens_are_written_over(cache: KVCache) -> None:
    with cache.sequence(1.0) as a:
        a.append(20)
        blocks = list(a.blocks)
        a.truncate(17)
        a.append(2)
        assert layout_of([a], [2])[0].tolist() == [17, 18]
        assert list(a.blocks) == blocks


def test_image_features_are_kept_under_the_cap() -> None:
    cache = ImageCache(max_bytes=3 * 40)
    for name in (b"a", b"b", b"c"):
        cache.put(name, torch.ones(10))
    assert cache.get(b"a") is not None  # now b is the least recently used
    cache.put(b"d", torch.ones(10))
    assert [cache.get(name) is not None for name in (b"a", b"b", b"c", b"d")] == [True, False, True, True]
    cache.put(b"huge", torch.ones(1000))
    assert (len(cache), cache.bytes, cache.hits, cache.misses) == (3, 120, 4, 1)
