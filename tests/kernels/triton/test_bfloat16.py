"""Every kernel in bfloat16, which Triton's interpreter gets wrong: for `make ttsem`, which runs what is compiled."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qvl_kernels import reference
from qvl_kernels import triton as ops
from qvl_kernels.layouts import gpu as gpu_layout
from qvl_kernels.layouts import repack
from qvl_kernels.triton.attention.kv_tiles import from_cached, to_cached
from qvl_kernels.triton.launch import interpreted
from qvl_kernels.triton.linear.dequantize import dequantize
from tests.kernels.compare import EPSILON, as_good_as_torch
from tests.kernels.gptq import checkpoint
from tests.kernels.triton import test_attention as attention

pytestmark = pytest.mark.interpreter
if interpreted():
    pytest.skip("Triton's interpreter computes bfloat16 wrongly: `make ttsem`", allow_module_level=True)
B16 = torch.bfloat16
EPS = 1e-6


@pytest.fixture
def normal(rng: torch.Generator) -> object:
    return lambda *shape: torch.randn(shape, generator=rng).to(B16)


@pytest.mark.parametrize("width", [257, 1664])
def test_norms(poisoned: None, normal, rng: torch.Generator, width: int) -> None:  # type: ignore[no-untyped-def]
    x, more, weight, bias = normal(5, width), normal(5, width), normal(width), normal(width)
    exact = [t.double() for t in (x, weight, bias)]
    as_good_as_torch(
        ops.rms_norm(x, weight, EPS), reference.rms_norm(x, weight, EPS), reference.rms_norm(exact[0], exact[1], EPS)
    )
    as_good_as_torch(
        ops.layer_norm(x, weight, bias, EPS),
        reference.layer_norm(x, weight, bias, EPS),
        reference.layer_norm(*exact, EPS),
    )
    total, _ = ops.add_layer_norm(x, more, weight, bias, EPS)
    assert torch.equal(total, x + more)
    parts = torch.randn(3, 5, width, generator=rng)
    total, y = ops.add_rms_norm(x, parts, weight, EPS)
    assert torch.equal(total, x + ops.sum_partials(parts, B16))
    want = reference.rms_norm(total.double(), weight.double(), EPS)
    as_good_as_torch(y, reference.rms_norm(total, weight, EPS), want)


@pytest.mark.parametrize("splits", [0, 3])
def test_activations(poisoned: None, normal, rng: torch.Generator, splits: int) -> None:  # type: ignore[no-untyped-def]
    x = torch.randn(splits, 3, 514, generator=rng) * 4 if splits else normal(3, 514) * 4
    whole = reference.sum_partials(x, B16).double()
    want = whole[:, :257] * torch.nn.functional.silu(whole[:, 257:])
    as_good_as_torch(ops.swiglu(x, B16), reference.swiglu(x, B16), want)
    y = normal(1025)
    as_good_as_torch(ops.gelu(y), reference.gelu(y), reference.gelu(y.double()))


@pytest.mark.parametrize("cache_dtype", [B16, torch.int8])
def test_rotary(poisoned: None, normal, rng: torch.Generator, cache_dtype: torch.dtype) -> None:  # type: ignore[no-untyped-def]
    rows, heads, dim, blocks = 3, 5, 32, 2
    angles = torch.randn(rows, dim, generator=rng)
    given = (normal(rows, 3 * heads * dim), angles.cos(), angles.sin(), torch.ones(rows))
    slots = torch.tensor([3, 17, 30])
    empty = torch.zeros(blocks, heads, 16, dim)
    ours, plain = ([make(empty, cache_dtype) for _ in "kv"] for make in (to_cached, reference.to_cached))
    q = ops.rotary_to_cache(*given, *ours, slots)
    close(q, reference.rotary_to_cache(*given, *plain, slots), 2 * EPSILON[B16])
    for mine, theirs in zip(ours, plain, strict=True):
        allowed = 1.01 / 127 if cache_dtype == torch.int8 else 2 * EPSILON[B16]
        close(from_cached(mine, torch.float32), reference.from_cached(theirs, torch.float32), allowed)


def close(got: Tensor, want: Tensor, allowed: float) -> None:
    assert (got.double() - want.double()).abs().max() <= allowed * want.double().abs().max()


@pytest.mark.parametrize("cache_dtype", [None, torch.int8])
@pytest.mark.parametrize(("rows", "lengths"), [([1, 1], [17, 145]), ([7, 33], [7, 100])])
def test_attention(
    poisoned: None, rng: torch.Generator, rows: list[int], lengths: list[int], cache_dtype: torch.dtype | None
) -> None:
    c = attention.case(rng, rows, lengths, heads=1, dim=64, cache_dtype=cache_dtype, dtype=B16)
    attention.check(c, ops.paged_attention(*c))


def test_images(poisoned: None, normal) -> None:  # type: ignore[no-untyped-def]
    qkv, q, k, v = normal(1, 40, 3 * 104), normal(7, 64), normal(2, 33, 64), normal(2, 33, 64)
    want = reference.vision_attention(qkv.double(), 1)
    as_good_as_torch(ops.vision_attention(qkv, 1), reference.vision_attention(qkv, 1), want)
    want = reference.cross_attention(q.double(), k.double(), v.double(), 2)
    as_good_as_torch(ops.cross_attention(q, k, v, 2), reference.cross_attention(q, k, v, 2), want)


@pytest.mark.parametrize("bits, rows", [(4, 1024), (8, 65)])  # fewer: kernels in Gluon, which ttsem does not run
@pytest.mark.parametrize("symmetric, group", [(True, 64), (False, 64), (True, 128)])
def test_packed_linears(poisoned: None, normal, rows: int, symmetric: bool, group: int, bits: int) -> None:  # type: ignore[no-untyped-def]
    tensors, x = checkpoint(256, 136, group, bits=bits, symmetric=symmetric), normal(rows, 256)
    exact = reference.gptq_dequantize(*tensors, bits, 1)
    plain = torch.nn.functional.linear(x, exact.to(B16))
    as_good_as_torch(ops.prepare_gptq(*tensors, bits, 1)(x), plain, x.double() @ exact.double().t())
    weight = repack.packed(gpu_layout.KINDS[bits], *tensors, 1)
    assert torch.equal(dequantize(weight, B16), repack.dequantize(weight).to(B16))


def test_the_likeliest(poisoned: None, normal) -> None:  # type: ignore[no-untyped-def]
    logits = normal(2, 4100)
    got = ops.sample(logits, None)
    assert torch.equal(got.token_ids, logits.float().argmax(-1))
