"""A row's bits do not depend on the other rows of a call: any number of rows against one at a time, bit by bit."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qvl_kernels import cpu, reference
from qvl_kernels.cpu import library as cpu_library
from qvl_kernels.cpu import linears as cpu_linear
from qvl_runtime.formats.gptq import quantize_rtn
from tests.kernels.compare import as_good_as_torch
from tests.kernels.conftest import AVAILABLE

pytestmark = pytest.mark.unit

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Around the limits of every kernel: one row, few rows, a strip of 16 rows, pairs of strips.
ROWS = (*range(1, 19), 24, 31, 32, 33, 47, 48, 49, 63, 64, 65, 70)
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal bit by bit: -0 is not 0 here, and NaN equals itself."""
    as_integers = INTEGERS[one.element_size()]
    return torch.equal(one.contiguous().view(as_integers), other.contiguous().view(as_integers))


def differing(op: Callable[[Tensor], Tensor], x: Tensor) -> list[int]:
    """Return how many of the first or last rows of x, as a batch, give a row of `op` that differs from itself alone."""
    alone = torch.cat([op(row[None]) for row in x])
    return [
        n for n in ROWS if not (same_bits(op(x[:n]), alone[:n]) and same_bits(op(x[len(x) - n :]), alone[len(x) - n :]))
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("outputs", "inputs"), [(37, 130), (384, 256), (130, 1100), (1, 7)])
def test_dense(isa: str, rng: torch.Generator, dtype: torch.dtype, outputs: int, inputs: int) -> None:
    weight, bias = (torch.randn(s, generator=rng).to(dtype) for s in ((outputs, inputs), (outputs,)))
    x = torch.randn(ROWS[-1], inputs, generator=rng).to(dtype)
    assert differing(lambda rows: cpu.linear(rows, weight, bias), x) == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_more_rows_than_a_pass(isa: str, rng: torch.Generator, dtype: torch.dtype) -> None:
    """Beyond 512 (AMX) or 528 rows a call starts over: the last rows are a pass of their own, of one row or a few."""
    weight, x = (torch.randn(n, 2100, generator=rng).to(dtype) for n in (20, 541))
    alone = torch.cat([cpu.linear(row[None], weight) for row in x])
    for n in (512, 513, 529, 541):
        assert same_bits(cpu.linear(x[:n], weight), alone[:n])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_number_of_threads(isa: str, rng: torch.Generator, dtype: torch.dtype) -> None:
    weight, x = (torch.randn(n, 300, generator=rng).to(dtype) for n in (700, 70))
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append([cpu.linear(x[:n], weight) for n in (1, 4, 70)])
    finally:
        torch.set_num_threads(threads)
    assert all(same_bits(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_fast(isa: str, rng: torch.Generator, dtype: torch.dtype, bits: int, sym: bool, group: int) -> None:
    """int8 sums are exact, and so are zero points that are subtracted from them as integers."""
    w = quantize_rtn(torch.randn(144, 256, generator=rng), bits, group, sym)
    fast = cpu.prepare_gptq(w.qweight, w.qzeros, w.scales, w.g_idx, w.bits, w.zero_offset, None, "fast")
    assert differing(fast, torch.randn(ROWS[-1], 256, generator=rng).to(dtype)) == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_dense_weight_in_8_bits(isa: str, rng: torch.Generator, dtype: torch.dtype) -> None:
    packed = cpu_linear.pack_dense(torch.randn(50, 200, generator=rng), torch.randn(50, generator=rng))
    assert differing(packed.int8, torch.randn(ROWS[-1], 200, generator=rng).to(dtype)) == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, 257])
def test_norms_and_elementwise(isa: str, rng: torch.Generator, dtype: torch.dtype, width: int) -> None:
    x = torch.randn(ROWS[-1], 2 * width, generator=rng).to(dtype)
    weight, bias = (torch.randn(2 * width, generator=rng).to(dtype) for _ in range(2))
    assert differing(lambda rows: cpu.rms_norm(rows, weight, 1e-6), x) == []
    assert differing(lambda rows: cpu.add_rms_norm(rows, rows.flip(-1), weight, 1e-6)[1], x) == []
    assert differing(lambda rows: cpu.layer_norm(rows, weight, bias, 1e-6), x) == []
    assert differing(cpu.gelu, x) == []
    assert differing(cpu.swiglu, x) == []
    assert differing(lambda rows: cpu.greedy(rows).logprobs, x) == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("sym", "group"), [(True, 32), (False, 64), (True, 128), (False, 128)])
def test_exact(isa: str, rng: torch.Generator, dtype: torch.dtype, bits: int, sym: bool, group: int) -> None:
    """Float activations: 4 or 8 bits, with and without zero points, some outputs beyond whole panels."""
    w = quantize_rtn(torch.randn(176, 384, generator=rng), bits, group, sym)
    exact = cpu.prepare_gptq(w.qweight, w.qzeros, w.scales, w.g_idx, w.bits, w.zero_offset, None, "exact")
    assert differing(exact, torch.randn(ROWS[-1], 384, generator=rng).to(dtype)) == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_many_rows_of_a_packed_weight(
    isa: str, rng: torch.Generator, dtype: torch.dtype, precision: reference.Precision
) -> None:
    w = quantize_rtn(torch.randn(48, 256, generator=rng), 4, 128, False)
    packed = cpu.prepare_gptq(w.qweight, w.qzeros, w.scales, w.g_idx, w.bits, w.zero_offset, None, precision)
    x = torch.randn(530, 256, generator=rng).to(dtype)
    alone = torch.cat([packed(row[None]) for row in x])
    for n in (97, 300, 513, 530):
        assert same_bits(packed(x[:n]), alone[:n])


@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_ways_that_are_tried(isa: str, rng: torch.Generator, precision: reference.Precision) -> None:
    """On the first calls with a large weight a row takes each way of reading it: the bits are the same."""
    w = cpu_linear.PackedWeight(
        torch.randint(0, 256, (4096 * 2064 // 2,), dtype=torch.uint8, generator=rng),
        torch.rand(129, 32, 16, generator=rng).half(), None, None, None, 4, 128, 4096, 4096, 2064,
    )  # fmt: skip
    x = torch.randn(1, 4096, generator=rng).bfloat16()
    call = w.exact if precision == "exact" else w.int8
    first = call(x)
    assert all(same_bits(call(x), first) for _ in range(8 if isa == "portable" else 40))


@pytest.mark.parametrize("pairs", [0, 1])
def test_dense_bfloat16_in_pairs_and_as_floats(rng: torch.Generator, pairs: int) -> None:
    """What AVX-512 multiplies bfloat16 with depends on the CPU: both ways are right on any."""
    if "avx512" not in AVAILABLE:
        pytest.skip(f"no avx512 kernels here: the build and the CPU support {AVAILABLE or 'none'}")
    weight, x = (torch.randn(n, 300, generator=rng).bfloat16() for n in (50, ROWS[-1]))
    handle = cpu_library._load()
    handle.qvl_set_bf16_pairs.argtypes = (ctypes.c_int64,)
    with cpu_library.instruction_set("avx512"):
        try:
            handle.qvl_set_bf16_pairs(pairs)
            assert differing(lambda rows: cpu.linear(rows, weight), x) == []
            as_good_as_torch(cpu.linear(x, weight), reference.linear(x, weight), x.double() @ weight.double().t())
        finally:
            handle.qvl_set_bf16_pairs(-1)
