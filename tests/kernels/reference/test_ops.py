"""The reference ops, which define all others, against their formulas in float64 and in loops, at odd shapes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from qvl_kernels import reference

pytestmark = pytest.mark.unit
FLOAT32 = 2e-5  # the error of a few hundred additions of numbers near one, each rounded at 6e-8


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("rows", [1, 2, 7, 255, 257])
def test_rms_norm_rounds_before_the_weight(rows: int) -> None:
    x, weight = torch.randn(rows, 96).bfloat16() * 3, torch.randn(96).bfloat16()
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    got = reference.rms_norm(x, weight, 1e-6)
    assert got.dtype == torch.bfloat16
    # float32 and float64 round differently close to a tie: a few values in a million. Rounding once, after the weight,
    # would change a third of all values.
    differing = (got != exact.float().bfloat16() * weight).float().mean().item()
    assert differing < 1e-3


def test_gelu_is_the_exact_one() -> None:
    x = torch.linspace(-6, 6, 1001)
    exact = 0.5 * x.double() * (1 + torch.erf(x.double() / math.sqrt(2)))
    assert (reference.gelu(x) - exact).abs().max() < 1e-6


def test_swiglu_gates_with_its_second_half() -> None:
    up, gate = torch.randn(7, 33), torch.randn(7, 33)
    assert torch.allclose(reference.swiglu(torch.cat([up, gate], -1)), up * gate / (1 + (-gate).exp()), atol=1e-6)


@pytest.mark.parametrize(("dim", "rotated"), [(8, 8), (16, 8)])
def test_rotate_half_rotates_pairs_and_keeps_the_rest(dim: int, rotated: int) -> None:
    x, half = torch.randn(5, 3, dim), rotated // 2
    angles = torch.randn(5, half)
    both = torch.cat([angles, angles], 1)
    got = reference.rotate_half(x, both.cos(), both.sin())
    pairs = torch.complex(x[..., :half], x[..., half:rotated]) * torch.polar(torch.ones(5, 1, half), angles[:, None])
    assert torch.allclose(got[..., :rotated], torch.cat([pairs.real, pairs.imag], -1), atol=1e-6)
    assert torch.equal(got[..., rotated:], x[..., rotated:])


@pytest.mark.parametrize("bits", [4, 8])
def test_unpack_rows_reads_int32_as_unsigned(bits: int) -> None:
    per_word, top = 32 // bits, 2**bits - 1
    values = torch.randint(0, top + 1, (3 * per_word, 5))
    values[per_word - 1] = top  # sets the sign bit of the int32
    packed = sum(values.view(3, per_word, 5)[:, i].long() << (bits * i) for i in range(per_word))
    assert isinstance(packed, Tensor)
    packed = torch.where(packed >= 2**31, packed - 2**32, packed).int()
    assert torch.equal(reference.unpack_rows(packed, bits).long(), values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [[1], [17], [1, 1, 1], [3, 1, 16], [16, 33]])
@pytest.mark.parametrize("cached", [0, 1, 15, 16, 40])
def test_paged_attention_is_attention(rows: list[int], cached: int, dtype: torch.dtype) -> None:
    """Prefill, chunks and decoding through scattered blocks, against a softmax over the visible keys of each row."""
    heads, dim, block = 2, 8, 16
    lengths = [cached + n + i for i, n in enumerate(rows)]
    tables, pool = _scattered(lengths, block)
    caches = torch.full((2, pool, heads, block, dim), torch.nan, dtype=dtype)
    keys, values, queries = (
        [torch.randn(n, heads, dim).to(dtype) for n in sizes] for sizes in (lengths, lengths, rows)
    )
    for table, k, v in zip(tables, keys, values, strict=True):
        slots = torch.arange(len(k))
        for cache, new in zip(caches, (k, v), strict=True):
            cache[table[slots // block], :, slots % block] = new
    starts = [0, *torch.tensor(rows).cumsum(0).tolist()]
    got = reference.paged_attention(torch.cat(queries), caches[0], caches[1], tables, starts, lengths)

    want = []
    for q, k, v in zip(queries, keys, values, strict=True):
        scores = torch.einsum("qhd,khd->hqk", q.double(), k.double()) / math.sqrt(dim)
        hidden = torch.ones(len(q), len(k), dtype=torch.bool).triu(len(k) - len(q) + 1)
        probs = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        want.append(torch.einsum("hqk,khd->qhd", probs, v.double()).flatten(1))
    assert got.shape == (sum(rows), heads * dim)
    bound = FLOAT32 if dtype == torch.float32 else 2**-6  # bfloat16 keeps 8 bits of values up to about 4
    assert (got.double() - torch.cat(want)).abs().max() < bound


def _scattered(lengths: list[int], block: int) -> tuple[Tensor, int]:
    """Shuffled block tables, and the size of the pool."""
    counts = [-(-n // block) for n in lengths]
    free = torch.randperm(sum(counts) + 3).tolist()
    tables = torch.zeros(len(lengths), max(counts), dtype=torch.long)
    for row, count in zip(tables, counts, strict=True):
        row[:count] = torch.tensor([free.pop() for _ in range(count)])
    return tables, sum(counts) + 3


def test_rotary_to_cache_writes_only_its_slots() -> None:
    heads, dim, rows = 2, 8, 3
    caches = torch.full((2, 4, heads, 16, dim), 7.0)
    qkv, angles = torch.randn(rows, 3 * heads * dim), torch.randn(rows, dim)
    cos, sin, logn = angles.cos(), angles.sin(), torch.tensor([1.0, 1.5, 2.0])
    slots = torch.tensor([5, 63, 16])
    q = reference.rotary_to_cache(qkv, cos, sin, logn, caches[0], caches[1], slots)
    parts = qkv.view(rows, 3, heads, dim)
    assert torch.allclose(q, reference.rotate_half(parts[:, 0], cos, sin) * logn.view(-1, 1, 1))
    flat = caches.transpose(2, 3).reshape(2, 64, heads, dim)
    assert torch.equal(flat[0, slots], reference.rotate_half(parts[:, 1], cos, sin))
    assert torch.equal(flat[1, slots], parts[:, 2])
    untouched = torch.ones(64, dtype=torch.bool)
    untouched[slots] = False
    assert (flat[:, untouched] == 7).all()


@pytest.mark.parametrize("heads", [1, 3])
def test_vision_attention_reads_q_k_v_per_head(heads: int) -> None:
    images, patches, dim = 2, 17, 6
    qkv = torch.randn(images, patches, 3 * heads * dim)
    got = reference.vision_attention(qkv, heads)
    for h in range(heads):
        q, k, v = (qkv[..., (3 * h + i) * dim : (3 * h + i + 1) * dim] for i in range(3))
        want = (q @ k.mT / math.sqrt(dim)).softmax(-1) @ v
        assert (got[..., h * dim : (h + 1) * dim] - want).abs().max() < FLOAT32


def test_cross_attention_uses_the_same_queries_for_each_image() -> None:
    q, k, v = torch.randn(5, 12), torch.randn(3, 9, 12), torch.randn(3, 9, 12)
    got = reference.cross_attention(q, k, v, heads=2)
    for p in range(3):
        for h in range(2):
            part = slice(6 * h, 6 * h + 6)
            want = (q[:, part] @ k[p, :, part].mT / math.sqrt(6)).softmax(-1) @ v[p, :, part]
            assert (got[p, :, part] - want).abs().max() < FLOAT32


def test_partial_sums_are_added_by_the_next_op() -> None:
    """A kernel that splits the inputs of a linear leaves the addition to the next op."""
    parts, norm = torch.randn(3, 7, 48), torch.rand(48).half()
    whole, x = parts.sum(0).half(), torch.randn(7, 48).half()
    cos, sin, logn, slots = torch.rand(7, 8), torch.rand(7, 8), torch.ones(7), torch.arange(7)
    caches = [torch.zeros(1, 2, 16, 8, dtype=torch.float16) for _ in range(4)]
    for got, want in (
        (reference.swiglu(parts, torch.float16), reference.swiglu(whole)),
        (reference.add_rms_norm(x, parts, norm, 1e-6)[1], reference.add_rms_norm(x, whole, norm, 1e-6)[1]),
        (
            reference.rotary_to_cache(parts, cos, sin, logn, *caches[:2], slots, torch.float16),
            reference.rotary_to_cache(whole, cos, sin, logn, *caches[2:], slots),
        ),
    ):
        assert got.dtype == torch.float16 and torch.equal(got, want)
