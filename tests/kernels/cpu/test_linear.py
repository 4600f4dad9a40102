"""Linears: packed int4 and int8 weights, exact and fast, and dense ones, at odd shapes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qvl_kernels import cpu, reference
from qvl_kernels.cpu import linears as cpu_linear
from qvl_runtime.formats.gptq import GPTQLinear, quantize_rtn
from tests.kernels.compare import EPSILON, W4A8_ERROR, W8_ERROR, as_good_as_torch, relative

pytestmark = pytest.mark.unit

ROWS = (1, 2, 3, 7, 16, 17, 255, 257)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INT8_ACCUMULATION = 1e-5  # int8 products are exact; scales and sums are float32


def gptq(
    rng: torch.Generator, outputs: int, inputs: int, group: int, sym: bool = True, bits: int = 4, bias: bool = True
) -> GPTQLinear:
    weight = torch.randn(outputs, inputs, generator=rng)
    offset = torch.randn(outputs, generator=rng) if bias else None
    return quantize_rtn(weight, bits, group, sym, bias=offset)


def shuffled(w: GPTQLinear, rng: torch.Generator) -> GPTQLinear:
    """The same linear with act-order: inputs are assigned to groups at random."""
    from dataclasses import replace

    g_idx = torch.arange(w.in_features, dtype=torch.int32) // w.group_size
    return replace(w, g_idx=g_idx[torch.randperm(w.in_features, generator=rng)])


def prepare(w: GPTQLinear, precision: reference.Precision) -> reference.BoundLinear:
    return cpu.prepare_gptq(w.qweight, w.qzeros, w.scales, w.g_idx, w.bits, w.zero_offset, w.bias, precision)


def in_float64(x: Tensor, w: GPTQLinear) -> Tensor:
    weight = reference.gptq_dequantize(w.qweight, w.qzeros, w.scales, w.g_idx, w.bits, w.zero_offset)
    y = x.double() @ weight.double().t()
    return y if w.bias is None else y + w.bias.double()


def rounded_activations(x: Tensor, group: int) -> Tensor:
    """x rounded as in the fast kernels, to int8 for each row and group, with inputs in order."""
    padded = torch.nn.functional.pad(x.float(), (0, -x.shape[1] % group)).view(len(x), -1, group)
    top = padded.abs().amax(-1, keepdim=True).clamp(min=1e-30)
    return (padded * (127 / top)).round().mul(top / 127).flatten(1)[:, : x.shape[1]]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("bits", [4, 8])
def test_fast_is_exact_on_rounded_activations(isa: str, rng: torch.Generator, rows: int, bits: int) -> None:
    """The rounding of activations is the only loss; 272 outputs are not a multiple of four blocks."""
    w = gptq(rng, 272, 384, 128, bits=bits)
    x = torch.randn(rows, 384, generator=rng)
    y = prepare(w, "fast")(x)
    assert relative(y, in_float64(rounded_activations(x, 128), w)) < INT8_ACCUMULATION
    assert relative(y, in_float64(x, w)) < W4A8_ERROR


@pytest.mark.parametrize("group", [32, 64, 128, -1])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("rows", [1, 5, 33])
def test_fast_groups_and_zero_points(isa: str, rng: torch.Generator, group: int, sym: bool, rows: int) -> None:
    w = gptq(rng, 96, 512, group, sym)
    x = torch.randn(rows, 512, generator=rng)
    kernel_group = 128 if group == -1 else group
    assert relative(prepare(w, "fast")(x), in_float64(rounded_activations(x, kernel_group), w)) < INT8_ACCUMULATION


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("inputs", [352, 384])
def test_act_order_and_a_group_tail(
    isa: str, rng: torch.Generator, precision: reference.Precision, rows: int, inputs: int
) -> None:
    """352 inputs in groups of 128: the last group is short and is padded."""
    w = shuffled(gptq(rng, 64, inputs, 128, sym=False), rng)
    x = torch.randn(rows, inputs, generator=rng)
    y = prepare(w, precision)(x)
    assert relative(y, in_float64(x, w)) < (1e-5 if precision == "exact" else W4A8_ERROR)


@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_a_group_tail_in_order(isa: str, rng: torch.Generator, precision: reference.Precision) -> None:
    w = gptq(rng, 32, 352, 128)
    for rows in (1, 4, 20):
        x = torch.randn(rows, 352, generator=rng)
        assert relative(prepare(w, precision)(x), in_float64(x, w)) < (1e-5 if precision == "exact" else W4A8_ERROR)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("bits", [4, 8])
def test_exact_is_as_good_as_torch(isa: str, rng: torch.Generator, dtype: torch.dtype, rows: int, bits: int) -> None:
    w = gptq(rng, 80 if rows < 100 else 48, 256, 64, sym=False, bits=bits, bias=False)
    x = torch.randn(rows, 256, generator=rng).to(dtype)
    plain = reference.gptq_linear(x, w.qweight, w.qzeros, w.scales, w.g_idx, w.bits, w.zero_offset)
    as_good_as_torch(prepare(w, "exact")(x), plain, in_float64(x, w))


@pytest.mark.parametrize("dtype", DTYPES)
def test_leading_axes_and_strides(isa: str, rng: torch.Generator, dtype: torch.dtype) -> None:
    """7 and 14 rows run in the same kernel, so results must be bitwise equal."""
    w = gptq(rng, 32, 64, 32)
    x = torch.randn(64, 7, 2, generator=rng).to(dtype).permute(2, 1, 0)
    for precision in ("exact", "fast"):
        bound = prepare(w, precision)
        assert torch.equal(bound(x), torch.stack([bound(part.contiguous()) for part in x]))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("outputs", "inputs"), [(50, 200), (64, 1664), (1, 32)])
def test_a_dense_weight_in_8_bits(isa: str, rng: torch.Generator, rows: int, outputs: int, inputs: int) -> None:
    weight, bias = torch.randn(outputs, inputs, generator=rng), torch.randn(outputs, generator=rng)
    x = torch.randn(rows, inputs, generator=rng)
    bound = cpu.prepare_linear(weight, bias, "fast")
    packed = bound.call.__self__  # type: ignore[attr-defined]
    dequantized = packed.unpacked(0, packed.padded_outputs, torch.float32)[:, :outputs].t()
    assert relative(dequantized, weight) < W8_ERROR
    want = rounded_activations(x, 128 if inputs >= 128 else 32).double() @ dequantized.double().t() + bias.double()
    assert relative(bound(x), want) < INT8_ACCUMULATION


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
def test_a_dense_weight_in_8_bits_with_float_activations(
    isa: str, rng: torch.Generator, dtype: torch.dtype, rows: int
) -> None:
    """W8A16: only the weight is rounded."""
    packed = cpu_linear.pack_dense(torch.randn(50, 200, generator=rng))
    dequantized = packed.unpacked(0, packed.padded_outputs, torch.float32)[:, :50].t()
    x = torch.randn(rows, 200, generator=rng).to(dtype)
    as_good_as_torch(packed.exact(x), x @ dequantized.to(dtype).t(), x.double() @ dequantized.double().t())


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_and_smallest_activations(isa: str, rng: torch.Generator, dtype: torch.dtype) -> None:
    """Kernels that split a number keep the largest and smallest ones, and infinity."""
    w = gptq(rng, 16, 32, 32, bias=False)
    dequantized = in_float64(torch.eye(32), w).t()
    limits = torch.finfo(dtype)
    x = torch.zeros(8, 32, dtype=dtype)
    x[0, 1], x[1, 1], x[2, 3] = limits.max / 64, limits.smallest_normal * 64, torch.inf
    y = prepare(w, "exact")(x).double()
    assert relative(y[0], dequantized[:, 1] * x[0, 1].double()) < 2 * EPSILON[dtype]
    assert relative(y[1], dequantized[:, 1] * x[1, 1].double()) < 2 * EPSILON[dtype] + 2**-6
    level_zero = dequantized[:, 3] == 0  # infinity times nothing is no number
    assert torch.equal(y[2][~level_zero], dequantized[:, 3][~level_zero].sign() * torch.inf)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 4, 5, 16, 17, 40, 520])
@pytest.mark.parametrize(("outputs", "inputs"), [(37, 130), (4, 16), (1, 7), (130, 256), (48, 1100)])
def test_a_dense_weight_as_it_is(
    isa: str, rng: torch.Generator, dtype: torch.dtype, rows: int, outputs: int, inputs: int
) -> None:
    weight, bias = (torch.randn(s, generator=rng).to(dtype) for s in ((outputs, inputs), (outputs,)))
    x = torch.randn(rows, inputs, generator=rng).to(dtype)
    want = x.double() @ weight.double().t() + bias.double()
    as_good_as_torch(cpu.linear(x, weight, bias), reference.linear(x, weight, bias), want)
    as_good_as_torch(cpu.prepare_linear(weight, bias)(x), reference.linear(x, weight, bias), want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 9])
def test_small_activations_next_to_a_large_one(isa: str, rng: torch.Generator, dtype: torch.dtype, rows: int) -> None:
    """One activation of a group is a thousand times the others, as they are in language models."""
    w = gptq(rng, 48, 256, 128, sym=False, bias=False)
    x = torch.randn(rows, 256, generator=rng)
    x[:, [5, 200]] *= 1000
    x = x.to(dtype)
    plain = reference.gptq_linear(x, w.qweight, w.qzeros, w.scales, w.g_idx, w.bits, w.zero_offset)
    as_good_as_torch(prepare(w, "exact")(x), plain, in_float64(x, w))


def test_rows_of_a_batch_do_not_touch_each_other(isa: str, rng: torch.Generator) -> None:
    """A row's result is the same in any batch that one kernel serves, and close across kernels."""
    w = gptq(rng, 64, 256, 128)
    x = torch.randn(40, 256, generator=rng)
    fast = prepare(w, "fast")
    alone = torch.cat([fast(row[None]) for row in x])
    assert relative(fast(x), alone) < 1e-6
    x[1:] *= 1e6
    assert relative(fast(x)[:1], alone[:1]) < 1e-6


def test_an_unsupported_linear_falls_back_with_a_warning(
    rng: torch.Generator, caplog: pytest.LogCaptureFixture
) -> None:
    if not _built():
        pytest.skip("the CPU kernels were not built")
    from dataclasses import replace

    w = gptq(rng, 32, 64, 32)
    w = replace(w, scales=w.scales.float() * 1.0001)
    bound = prepare(w, "fast")
    assert "float16" in bound.kernel and "float16" in caplog.text
    x = torch.randn(2, 64, generator=rng)
    assert relative(bound(x), in_float64(x, w)) < 1e-6


def _built() -> bool:
    from tests.kernels.conftest import AVAILABLE

    return bool(AVAILABLE)
