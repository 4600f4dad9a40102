"""Rotary with the cache write in Triton's interpreter, against its definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qvl_kernels import reference
from qvl_kernels.triton.attention.kv_tiles import by_block, by_vector, from_cached
from qvl_kernels.triton.attention.rotary import rotary_to_cache
from tests.kernels.compare import EPSILON

pytestmark = pytest.mark.interpreter
BLOCK_SIZE = 16


@pytest.mark.parametrize(
    ("rows", "heads", "dim", "rotary"),
    [
        (1, 1, 128, 128),
        (7, 3, 64, 32),
        (17, 2, 48, 48),
        (2, 5, 20, 12),
        (33, 4, 8, 8),
    ],
)
@pytest.mark.parametrize("splits", [0, 1, 3])
@pytest.mark.parametrize("cache_dtype", [torch.float16, torch.int8])
def test_rotary_to_cache(
    poisoned: None,
    rng: torch.Generator,
    rows: int,
    heads: int,
    dim: int,
    rotary: int,
    splits: int,
    cache_dtype: torch.dtype,
) -> None:
    shape = (splits, rows, 3 * heads * dim) if splits else (rows, 3 * heads * dim)
    qkv = torch.randn(shape, generator=rng)
    tables = _tables(rng, rows, rotary)
    slots = torch.randperm(3 * BLOCK_SIZE, generator=rng)[:rows]
    ours, plain = ([_cache(heads, dim, cache_dtype) for _ in range(2)] for _ in range(2))
    same = (qkv if splits else qkv.half(), *tables)
    q = rotary_to_cache(*same, *ours, slots, torch.float16)
    _one_rounding(q, reference.rotary_to_cache(*same, *plain, slots, torch.float16))
    for mine, theirs in zip(ours, plain, strict=True):
        a, b = from_cached(mine, torch.float32), reference.from_cached(theirs, torch.float32)
        if cache_dtype == torch.int8:  # a tie may fall to either side: one level of 127
            assert (a - b).abs().max() <= b.abs().max() / 127 * 1.01
        else:
            _one_rounding(a, b)


def test_a_vector_of_zeros_is_stored_in_int8(rng: torch.Generator) -> None:
    cache = by_block(_cache(1, 8, torch.int8) + 1)
    slots = torch.tensor([3])
    rotary_to_cache(torch.zeros(1, 24).half(), *_tables(rng, 1, 8), cache, cache, slots)
    cache = by_vector(cache)
    assert not cache[0, 0, 3].any() and (cache[0, 0, 4] == 1).all()


def test_rows_without_a_slot_are_turned_and_not_stored(poisoned: None, rng: torch.Generator) -> None:
    qkv, tables = torch.randn(3, 24, generator=rng).half(), _tables(rng, 3, 8)
    ours, plain = ([_cache(1, 8, torch.float16) for _ in range(2)] for _ in range(2))
    q = rotary_to_cache(qkv, *tables, *ours, torch.tensor([5, -1, -1]))
    assert torch.isfinite(q).all()
    reference.rotary_to_cache(qkv[:1], *(t[:1] for t in tables), *plain, torch.tensor([5]))
    for mine, theirs in zip(ours, plain, strict=True):
        _one_rounding(mine, theirs)


def test_what_does_not_fit_is_refused(rng: torch.Generator) -> None:
    qkv, tables, slots = torch.zeros(2, 30).half(), _tables(rng, 2, 8), torch.tensor([1, 2])
    cache = _cache(1, 10, torch.float16)
    with pytest.raises(ValueError, match=r"slots is int32 \[2\]; expected contiguous int64"):
        rotary_to_cache(qkv, *tables, cache, cache, slots.int())
    with pytest.raises(ValueError, match="multiple of 4"):
        rotary_to_cache(qkv, *tables, _cache(1, 10, torch.int8), _cache(1, 10, torch.int8), slots)
    with pytest.raises(ValueError, match="12 rotary channels; expected 2 to the 10"):
        rotary_to_cache(qkv, *_tables(rng, 2, 12), cache, cache, slots)


def _tables(rng: torch.Generator, rows: int, rotary: int) -> tuple[Tensor, Tensor, Tensor]:
    """cos and sin as of two different angles for the channels of a pair, and log-n factors."""
    angles = torch.randn(rows, rotary, generator=rng) * 5
    return angles.cos(), angles.sin(), 1 + torch.rand(rows, generator=rng)


def _cache(heads: int, dim: int, dtype: torch.dtype) -> Tensor:
    shape = (3, heads, BLOCK_SIZE, reference.cache_width(dim, dtype))
    return torch.zeros(shape, dtype=dtype) if dtype == torch.int8 else torch.full(shape, torch.nan, dtype=dtype)


def _one_rounding(got: Tensor, want: Tensor) -> None:
    """Equal but for a float16 rounding of rotation and one of log-n; NaN in the same places."""
    assert got.shape == want.shape and torch.equal(want.isnan(), got.isnan())
    got, want = got.double().nan_to_num(), want.double().nan_to_num()
    assert ((got - want).abs() <= 2 * EPSILON[torch.float16] * want.abs().clamp(min=1)).all()
