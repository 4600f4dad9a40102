"""Prefill and decode attention over the paged cache in Triton's interpreter, against their definition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from qvl_kernels import reference
from qvl_kernels.triton.attention import decode
from qvl_kernels.triton.attention.decode import pieces_for
from qvl_kernels.triton.attention.kv_tiles import by_block, by_vector
from qvl_kernels.triton.attention.paged import paged_attention
from tests.kernels.compare import KV8_ERROR, as_good_as_torch, relative

pytestmark = pytest.mark.interpreter
BLOCK_SIZE = 16


class Case(NamedTuple):
    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    block_tables: Tensor
    query_starts: list[int]
    context_lens: list[int]


def case(
    rng: torch.Generator,
    rows: Sequence[int],
    lengths: Sequence[int],
    heads: int = 2,
    dim: int = 32,
    cache_dtype: torch.dtype | None = None,
    dtype: torch.dtype = torch.float16,
) -> Case:
    """Requests over blocks in no order; garbage (NaN, or the largest scales) where no token is.

    The caches lie as the kernels read them.
    """
    widest = max(-(-n // BLOCK_SIZE) for n in lengths) + 1
    blocks = torch.randperm(widest * len(lengths), generator=rng).view(len(lengths), widest)
    stored = cache_dtype or dtype
    shape = (blocks.numel(), heads, BLOCK_SIZE, reference.cache_width(dim, stored))
    garbage = 127 if stored == torch.int8 else torch.nan  # bytes 127 make a scale of 3e38
    caches = [torch.full(shape, garbage, dtype=stored) for _ in range(2)]
    for r, length in enumerate(lengths):
        at = torch.arange(length)
        for cache in caches:
            vectors = torch.randn(length, heads, dim, generator=rng).to(dtype)
            cache[blocks[r, at // BLOCK_SIZE], :, at % BLOCK_SIZE] = reference.to_cached(vectors, stored)
    q = torch.randn(sum(rows), heads, dim, generator=rng).to(dtype) * 2
    starts = [0, *torch.tensor(rows).cumsum(0).tolist()]
    return Case(q, by_block(caches[0]), by_block(caches[1]), blocks, starts, list(lengths))


def check(c: Case, got: Tensor) -> None:
    stored = [by_vector(cache) for cache in (c.k_cache, c.v_cache)]
    plain = reference.paged_attention(c.q, *stored, *c[3:])
    exact = [reference.from_cached(cache, torch.float32).double() for cache in stored]
    want = reference.paged_attention(c.q.double(), *exact, *c[3:])
    as_good_as_torch(got, plain, want)
    if c.k_cache.dtype == torch.int8:
        assert relative(got, want) < KV8_ERROR


@pytest.mark.parametrize("cache_dtype", [None, torch.int8])
@pytest.mark.parametrize(("heads", "dim"), [(1, 128), (3, 20), (2, 256)])
def test_decode(poisoned: None, rng: torch.Generator, cache_dtype: torch.dtype | None, heads: int, dim: int) -> None:
    """1 to 145 tokens in one step: last blocks with one, some and all slots, and empty splits."""
    lengths = [1, 2, 15, 16, 17, 145]
    c = case(rng, [1] * 6, lengths, heads, dim, cache_dtype)
    assert pieces_for(c.block_tables.shape[1]) == 6
    check(c, paged_attention(*c))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_lengths_on_the_device_as_a_captured_graph_has_them(
    poisoned: None, rng: torch.Generator, dtype: torch.dtype
) -> None:
    c = case(rng, [1, 1, 1], [3, 113, 32], heads=1)
    check(c, paged_attention(*c[:4], torch.empty(0), torch.tensor(c.context_lens, dtype=dtype)))


def test_a_row_that_pads_a_batch_gives_zeros(poisoned: None, rng: torch.Generator) -> None:
    c = case(rng, [1, 1], [20, 33])
    got = paged_attention(*c[:4], torch.empty(0), torch.tensor([0, 33]))
    assert not got[0].any()
    one = Case(c.q[1:], c.k_cache, c.v_cache, c.block_tables[1:], [0, 1], [33])
    check(one, got[1:])


def test_keys_are_split_by_the_length_alone(
    monkeypatch: pytest.MonkeyPatch, poisoned: None, rng: torch.Generator
) -> None:
    """A row's bits are those that it has alone, under a table of its own width, and among rows computed in parts."""
    assert pieces_for(512) == 32 and pieces_for(3) == 2 and pieces_for(1) == 1
    lengths = [5, 140, 17, 3, 16]
    c = case(rng, [1] * 5, lengths, heads=2)
    check(c, together := paged_attention(*c))
    for r in (1, 3):
        table = c.block_tables[r : r + 1, : -(-lengths[r] // BLOCK_SIZE)].contiguous()
        alone = paged_attention(c.q[r : r + 1], c.k_cache, c.v_cache, table, [0, 1], [lengths[r]])
        assert torch.equal(alone[0], together[r])
    monkeypatch.setattr(decode, "ROWS_AT_ONCE", 2)
    assert torch.equal(paged_attention(*c[:4], torch.empty(0), torch.tensor(lengths)), together)


@pytest.mark.parametrize("cache_dtype", [None, torch.int8])
@pytest.mark.parametrize(("heads", "dim"), [(1, 128), (2, 12), (1, 160)])
def test_prefill(poisoned: None, rng: torch.Generator, cache_dtype: torch.dtype | None, heads: int, dim: int) -> None:
    """Whole prompts and chunks of prompts, on both sides of tile sizes."""
    rows, lengths = [7, 16, 17, 65, 5], [7, 100, 17, 130, 129]
    check(c := case(rng, rows, lengths, heads, dim, cache_dtype), paged_attention(*c))


@pytest.mark.parametrize("rows", [255, 257])
def test_long_prefill(poisoned: None, rng: torch.Generator, rows: int) -> None:
    check(c := case(rng, [rows], [rows], heads=1), paged_attention(*c))


def test_prefill_decode_and_drafts_in_one_batch(poisoned: None, rng: torch.Generator) -> None:
    rows, lengths = [33, 1, 20, 3, 4, 1], [33, 40, 100, 3, 50, 1]
    check(c := case(rng, rows, lengths), paged_attention(*c))


def test_float32_is_exact_enough(poisoned: None, rng: torch.Generator) -> None:
    check(c := case(rng, [20, 1], [36, 50], dtype=torch.float32), paged_attention(*c))


def test_what_does_not_fit_is_refused(rng: torch.Generator) -> None:
    c = case(rng, [1, 2], [20, 33])
    with pytest.raises(ValueError, match=r"expected 3 from 0 to 3, and 2"):
        paged_attention(*c[:4], [0, 1], [20])
    with pytest.raises(ValueError, match=r"request 1 has 2 rows and 65 tokens; .* the 64 of its blocks"):
        paged_attention(*c[:4], [0, 1, 3], [20, 65])
    lengths = torch.tensor([20, 33], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"context_lens is int32 \[1\]; expected contiguous int32 or int64 \[2\]"):
        paged_attention(*c[:4], torch.tensor([0, 1, 3]), lengths[:1])
    with pytest.raises(ValueError, match=r"query_starts is float32 \[0\]; expected contiguous int32 or int64 \[3\]"):
        paged_attention(*c[:4], torch.empty(0), lengths)
    with pytest.raises(ValueError, match="query_starts is on the host and context_lens is not"):
        paged_attention(*c[:4], [0, 1, 3], lengths)
    with pytest.raises(ValueError, match="k_cache is float16"):
        paged_attention(c.q.float(), *c[1:])
    wide = torch.zeros(1, 1, 264).half()
    with pytest.raises(ValueError, match="expected at most 256"):
        paged_attention(wide, *c[1:])


@pytest.mark.parametrize("cache_dtype", [None, torch.int8])
@pytest.mark.parametrize(
    "rows, lengths", [([21], [21]), ([9, 5, 0], [40, 5, 0]), ([17, 150], [17, 163])], ids=["one", "padded", "two tiles"]
)
def test_a_prefill_whose_lengths_are_on_the_device(
    rows: list[int], lengths: list[int], cache_dtype: torch.dtype | None
) -> None:
    """As in a captured graph: starts and lengths are tensors, and rows of no request follow."""
    c = case(torch.Generator().manual_seed(5), rows, lengths, cache_dtype=cache_dtype)
    used = c.query_starts[-1]
    q = torch.cat([c.q, c.q.new_full((11, *c.q.shape[1:]), 3.0)])
    starts, seen = torch.tensor(c.query_starts), torch.tensor(c.context_lens)
    got = paged_attention(q, c.k_cache, c.v_cache, c.block_tables, starts, seen)
    check(c, got[:used])


def test_starts_on_the_host_with_lengths_on_the_device_are_refused() -> None:
    c = case(torch.Generator().manual_seed(6), [9], [9])
    with pytest.raises(ValueError, match="query_starts is on the host and context_lens is not"):
        paged_attention(c.q, c.k_cache, c.v_cache, c.block_tables, c.query_starts, torch.tensor(c.context_lens))
