"""Norms, elementwise ops, rotary with the cache write, and paged attention, at odd shapes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from qvl_kernels import cpu, reference, report
from qvl_kernels.cpu import library as cpu_library
from tests.kernels.compare import EPSILON, KV8_ERROR, as_good_as_torch, relative

pytestmark = pytest.mark.unit

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1, 16), (2, 255), (7, 257), (3, 5, 64), (1, 1), (17, 4096), (0, 32))
BLOCK_SIZE = 16


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_norms(isa: str, rng: torch.Generator, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, update = (torch.randn(shape, generator=rng).to(dtype) * 3 for _ in range(2))
    weight, bias = (torch.randn(shape[-1], generator=rng).to(dtype) for _ in range(2))
    same = (weight, 1e-6)
    as_good_as_torch(cpu.rms_norm(x, *same), reference.rms_norm(x, *same), _rms_norm(x.double(), weight))
    total, normed = cpu.add_rms_norm(x, update, *same)
    assert torch.equal(total, x + update)
    as_good_as_torch(normed, reference.rms_norm(total, *same), _rms_norm(total.double(), weight))
    want = torch.nn.functional.layer_norm(x.double(), (shape[-1],), weight.double(), bias.double(), 1e-6)
    as_good_as_torch(cpu.layer_norm(x, weight, bias, 1e-6), reference.layer_norm(x, weight, bias, 1e-6), want)


def test_layer_norm_of_a_large_mean_does_not_cancel(isa: str, rng: torch.Generator) -> None:
    x = torch.randn(3, 1664, generator=rng) + 1e4
    one, none = torch.ones(1664), torch.zeros(1664)
    want = torch.nn.functional.layer_norm(x.double(), (1664,), eps=1e-6)
    as_good_as_torch(cpu.layer_norm(x, one, none, 1e-6), reference.layer_norm(x, one, none, 1e-6), want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_elementwise(isa: str, rng: torch.Generator, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, gate = (torch.randn(shape, generator=rng).to(dtype) * 4 for _ in range(2))
    as_good_as_torch(cpu.gelu(x), reference.gelu(x), torch.nn.functional.gelu(x.double()))
    want = x.double() * torch.nn.functional.silu(gate.double())
    both = torch.cat([x, gate], -1).flatten(0, -2)
    as_good_as_torch(cpu.swiglu(both), reference.swiglu(both), want.flatten(0, -2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 17), (7, 255), (2, 1024), (5, 1025), (1, 151936)])
def test_greedy(isa: str, rng: torch.Generator, dtype: torch.dtype, rows: int, width: int) -> None:
    """The first of the largest logits, at any position, and its log probability."""
    logits = (torch.randn(rows, width, generator=rng) * 4 - 30).to(dtype)
    logits[-1, width // 2 :] = logits[-1].max()
    tokens, logprobs = cpu.greedy(logits)
    want, want_logprobs = reference.greedy(logits)
    assert torch.equal(tokens, want)
    as_good_as_torch(logprobs, want_logprobs, logits.double().log_softmax(-1).gather(1, want[:, None])[:, 0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "left", "right"), [(1, 16, 16), (7, 255, 3), (2, 4096, 11008)])
def test_concat_outputs_and_embedding(
    rng: torch.Generator, dtype: torch.dtype, rows: int, left: int, right: int
) -> None:
    first, second = (torch.randn(rows, width, generator=rng).to(dtype) for width in (left, right))
    assert torch.equal(cpu.concat_outputs(first, second), reference.concat_outputs(first, second))
    ids = torch.randint(rows, (40,), generator=rng)
    assert torch.equal(cpu.embedding(ids, second), reference.embedding(ids, second))
    assert cpu.embedding(ids[:0], second).shape == (0, right)


@pytest.mark.parametrize("logn_from", [None, 512])
@pytest.mark.parametrize("rows", [1, 7, 257])
def test_rotary_tables(rng: torch.Generator, logn_from: int | None, rows: int) -> None:
    """Angles are rounded as in torch at any position; cos, sin and log-n are at least as accurate."""
    positions = torch.randint(32768, (rows,), generator=rng)
    frequencies = 1e4 ** -torch.rand(rows, 32, generator=rng)
    ours = cpu.rotary_tables(positions, frequencies, logn_from)
    plain = reference.rotary_tables(positions, frequencies, logn_from)
    angles = (positions.float()[:, None] * frequencies).double().repeat(1, 2)
    logn = (positions.double() + 1).log() / torch.tensor(logn_from or 2.0).double().log()
    logn = logn.clamp(min=1) if logn_from else torch.ones(rows).double()
    for got, torchs, want in zip(ours, plain, (angles.cos(), angles.sin(), logn), strict=True):
        as_good_as_torch(got, torchs, want)
    whole = cpu.rotary_tables(positions, frequencies[0], logn_from)
    assert torch.equal(whole[0], cpu.rotary_tables(positions, frequencies[:1].expand(rows, 32), logn_from)[0])


def test_far_from_zero(isa: str) -> None:
    """Inputs for which exp overflows or underflows."""
    x = torch.tensor([-1e4, -100.0, -88.0, -30.0, 0.0, 30.0, 100.0, 1e4])
    as_good_as_torch(cpu.gelu(x), reference.gelu(x), torch.nn.functional.gelu(x.double()))
    both = torch.cat([torch.ones_like(x), x])[None]
    as_good_as_torch(cpu.swiglu(both)[0], reference.swiglu(both)[0], torch.nn.functional.silu(x.double()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cache_dtype", [None, torch.int8])
@pytest.mark.parametrize(("rows", "heads", "dim", "rotary"), [(1, 1, 128, 128), (7, 3, 64, 32), (17, 2, 48, 48)])
def test_rotary_to_cache(
    isa: str,
    rng: torch.Generator,
    dtype: torch.dtype,
    cache_dtype: torch.dtype | None,
    rows: int,
    heads: int,
    dim: int,
    rotary: int,
) -> None:
    qkv = torch.randn(rows, 3 * heads * dim, generator=rng).to(dtype)
    angles = torch.randn(rows, rotary, generator=rng) * 5
    logn = 1 + torch.rand(rows, generator=rng)
    slots = torch.randperm(3 * BLOCK_SIZE, generator=rng)[:rows]
    ours, plain = ([empty_cache(3, heads, dim, cache_dtype or dtype) for _ in range(2)] for _ in range(2))
    q = cpu.rotary_to_cache(qkv, angles.cos(), angles.sin(), logn, *ours, slots)
    want_q = reference.rotary_to_cache(qkv, angles.cos(), angles.sin(), logn, *plain, slots)
    _one_rounding(q, want_q, dtype)
    for mine, theirs in zip(ours, plain, strict=True):
        a, b = (reference.from_cached(c, torch.float32) for c in (mine, theirs))
        if cache_dtype is None:
            _one_rounding(a, b, dtype)
        else:  # a tie may round either way: one step of 127
            assert (a - b).abs().max() <= b.abs().max() / 127 * 1.01


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cache_dtype", [None, torch.int8])
@pytest.mark.parametrize(("heads", "dim"), [(1, 128), (3, 64), (2, 16), (2, 256)])
def test_decode_attention(
    isa: str, rng: torch.Generator, dtype: torch.dtype, cache_dtype: torch.dtype | None, heads: int, dim: int
) -> None:
    """Requests of 1, 2, 15, 16, 17 and 257 tokens in one step: the last block has one, some or all slots filled."""
    _attention(rng, dtype, cache_dtype, heads, dim, rows=[1] * 6, lengths=[1, 2, 15, 16, 17, 257])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cache_dtype", [None, torch.int8])
def test_prefill_together_with_decode(
    isa: str, rng: torch.Generator, dtype: torch.dtype, cache_dtype: torch.dtype | None
) -> None:
    """Whole prompts, chunks of prompts, a few rows and single rows in one step."""
    _attention(rng, dtype, cache_dtype, 2, 64, rows=[33, 1, 20, 3, 4], lengths=[33, 40, 100, 3, 50])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cache_dtype", [None, torch.int8])
@pytest.mark.parametrize("dim", [8, 24, 104])
def test_head_sizes_below_a_cache_line(
    isa: str, rng: torch.Generator, dtype: torch.dtype, cache_dtype: torch.dtype | None, dim: int
) -> None:
    _attention(rng, dtype, cache_dtype, 2, dim, rows=[1, 5, 17], lengths=[20, 5, 33])


@pytest.mark.parametrize("dtype", DTYPES)
def test_prefill_over_several_passes(isa: str, rng: torch.Generator, dtype: torch.dtype) -> None:
    """More keys than one pass reads (256), more rows than one job (512), and chunks that cross both limits."""
    _attention(rng, dtype, None, 1, 32, rows=[530, 31, 2], lengths=[530, 300, 257])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("images", "patches", "heads", "dim"), [(1, 257, 2, 104), (3, 16, 1, 64), (2, 1, 3, 8)])
def test_vision_attention(
    isa: str, rng: torch.Generator, dtype: torch.dtype, images: int, patches: int, heads: int, dim: int
) -> None:
    qkv = torch.randn(images, patches, 3 * heads * dim, generator=rng).to(dtype)
    want = reference.vision_attention(qkv.double(), heads)
    as_good_as_torch(cpu.vision_attention(qkv, heads), reference.vision_attention(qkv, heads), want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("images", [1, 3])
def test_cross_attention(isa: str, rng: torch.Generator, dtype: torch.dtype, images: int) -> None:
    q, k, v = (torch.randn(*n, 2 * 48, generator=rng).to(dtype) for n in ((33,), (images, 70), (images, 70)))
    want = reference.cross_attention(q.double(), k.double(), v.double(), 2)
    as_good_as_torch(cpu.cross_attention(q, k, v, 2), reference.cross_attention(q, k, v, 2), want)


def test_a_fallback_to_plain_torch_warns_once(
    rng: torch.Generator, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_library, "FALLBACKS", {})
    wide = torch.randn(1, 3, 3 * 320, generator=rng)
    for _ in range(2):
        assert torch.equal(cpu.vision_attention(wide, 1), reference.vision_attention(wide, 1))
        cpu.gelu(wide.double())
    assert [r.message.split()[0] for r in caplog.records] == ["vision_attention", "gelu"]
    assert "320 channels" in caplog.text and "float64" in caplog.text
    assert "320 channels" in report(torch.device("cpu"))["in plain torch"]


def _attention(
    rng: torch.Generator,
    dtype: torch.dtype,
    cache_dtype: torch.dtype | None,
    heads: int,
    dim: int,
    rows: Sequence[int],
    lengths: Sequence[int],
) -> None:
    """Compare with float64 over the same cache, with shuffled blocks and garbage in unused slots."""
    widest = max(-(-n // BLOCK_SIZE) for n in lengths)
    blocks = torch.randperm(widest * len(lengths), generator=rng).view(len(lengths), widest)
    caches = [empty_cache(blocks.numel(), heads, dim, cache_dtype or dtype) for _ in range(2)]
    for r, length in enumerate(lengths):
        positions = torch.arange(length)
        for cache in caches:
            vectors = torch.randn(length, heads, dim, generator=rng).to(dtype)
            cache[blocks[r, positions // BLOCK_SIZE], :, positions % BLOCK_SIZE] = reference.to_cached(
                vectors, cache.dtype
            )
    q = torch.randn(sum(rows), heads, dim, generator=rng).to(dtype) * 2
    starts = [0, *torch.tensor(rows).cumsum(0).tolist()]
    got = cpu.paged_attention(q, *caches, blocks, starts, lengths)
    plain = reference.paged_attention(q, *caches, blocks, starts, lengths)
    floats = [reference.from_cached(cache, torch.float32) for cache in caches]
    want = reference.paged_attention(q.double(), *(c.double() for c in floats), blocks, starts, lengths)
    as_good_as_torch(got, plain, want)
    if cache_dtype is not None:
        assert relative(got, want) < KV8_ERROR


def empty_cache(blocks: int, heads: int, dim: int, dtype: torch.dtype) -> Tensor:
    """A cache whose unwritten slots hold NaN, or 0 in int8, so that a kernel that reads one fails."""
    shape = (blocks, heads, BLOCK_SIZE, reference.cache_width(dim, dtype))
    return torch.zeros(shape, dtype=dtype) if dtype == torch.int8 else torch.full(shape, torch.nan, dtype=dtype)


def _rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight.double()


def _one_rounding(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    both = ~want.isnan()
    assert torch.equal(both, ~got.isnan())
    got, want = got[both].double(), want[both].double()
    assert ((got - want).abs() <= 2 * EPSILON[dtype] * want.abs().clamp(min=1)).all()
