"""Decode attention that rotates and caches the newest token itself: the same bits as two kernels in turn."""

from __future__ import annotations

import pytest
import torch

from qvl_kernels import reference
from qvl_kernels.triton.attention.kv_tiles import by_block, by_vector
from qvl_kernels.triton.attention.paged import paged_attention
from qvl_kernels.triton.attention.rotary import rotary_to_cache
from qvl_kernels.triton.attention.rotary_attention import rotary_attention
from tests.kernels.compare import KV8_ERROR, relative

pytestmark = pytest.mark.interpreter
BLOCK_SIZE, HEADS = 16, 1
LENGTHS = [1, 49]


@pytest.mark.parametrize("cache_dtype", [torch.float16, torch.int8])
@pytest.mark.parametrize("dim, rotary, splits", [(128, 128, 0), (32, 16, 3), (20, 20, 1)])
def test_one_kernel_gives_what_two_give(
    poisoned: None, rng: torch.Generator, dim: int, rotary: int, splits: int, cache_dtype: torch.dtype
) -> None:
    rows, width = len(LENGTHS), reference.cache_width(dim, cache_dtype)
    tables = torch.randperm(rows * 4, generator=rng).view(rows, 4)
    vectors = torch.randn(2, rows * 4, HEADS, BLOCK_SIZE, dim, generator=rng)
    stored = [by_block(reference.to_cached(v.half(), cache_dtype)) for v in vectors]
    assert stored[0].shape[-1] == width
    qkv = torch.randn(max(splits, 1), rows, 3 * HEADS * dim, generator=rng)
    qkv = qkv if splits else qkv[0].half()
    angles = torch.randn(rows, rotary // 2, generator=rng).repeat(1, 2)
    logn = 1 + torch.rand(rows, generator=rng)
    lengths = torch.tensor(LENGTHS)
    at = lengths - 1
    slots = tables[torch.arange(rows), at // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE
    new = (qkv, angles.cos(), angles.sin(), logn)
    one, two, plain = ([cache.clone() for cache in stored] for _ in range(3))
    got = rotary_attention(*new, *one, slots, tables, torch.arange(rows + 1), lengths, torch.float16)
    q = rotary_to_cache(*new, *two, slots, torch.float16)
    assert torch.equal(got, paged_attention(q, *two, tables, torch.arange(rows + 1), lengths))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    vectors_of = [by_vector(cache) for cache in plain]
    starts = list(range(rows + 1))
    want = reference.rotary_attention(*new, *vectors_of, slots, tables, starts, LENGTHS, torch.float16)
    assert relative(got, want) < KV8_ERROR


def test_a_row_that_pads_a_batch_is_stored_nowhere(poisoned: None, rng: torch.Generator) -> None:
    caches = [torch.randn(4, HEADS, BLOCK_SIZE, 32, generator=rng).half() for _ in range(2)]
    before = [cache.clone() for cache in caches]
    qkv, ones = torch.randn(2, 3 * HEADS * 32, generator=rng).half(), torch.ones(2, 32)
    slots, lengths = torch.tensor([-1, -1]), torch.tensor([0, 20])
    tables, new = torch.tensor([[0, 1], [2, 3]]), (qkv, ones, ones, ones[:, 0].contiguous())
    got = rotary_attention(*new, *caches, slots, tables, [0, 1, 2], lengths)
    assert not got[0].any() and got[1].isfinite().all()
    assert all(torch.equal(a, b) for a, b in zip(caches, before, strict=True))


def test_other_steps_take_two_kernels(poisoned: None, rng: torch.Generator) -> None:
    caches = [torch.zeros(2, HEADS, BLOCK_SIZE, 32).half() for _ in range(2)]
    qkv, ones = torch.randn(3, 3 * HEADS * 32, generator=rng).half(), torch.ones(3, 32)
    new, slots = (qkv, ones, ones * 0, ones[:, 0].contiguous()), torch.arange(3)
    got = rotary_attention(*new, *caches, slots, torch.tensor([[0]]), [0, 3], [3])
    want = reference.rotary_attention(*new, *[c.clone() for c in caches], slots, torch.tensor([[0]]), [0, 3], [3])
    assert relative(got, want) < KV8_ERROR


def test_what_does_not_fit_is_refused() -> None:
    cache, ones = torch.zeros(2, HEADS, BLOCK_SIZE, 32).half(), torch.ones(1, 32)
    new = (torch.zeros(1, 3 * HEADS * 32).half(), ones, ones, ones[:, 0].contiguous())
    with pytest.raises(ValueError, match=r"rotary_attention: slots is int32 \[1\]; expected contiguous int64 \[1\]"):
        slots = torch.zeros(1, dtype=torch.int32)
        rotary_attention(*new, cache, cache, slots, torch.zeros(1, 1, dtype=torch.int64), [0, 1], torch.tensor([1]))
