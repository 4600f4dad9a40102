"""SwiGLU of the decoder's fused up | gate projection and GELU of the vision encoder."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qvl_kernels.triton import checks
from qvl_kernels.triton.launch import Launch, Spec, counted
from qvl_kernels.triton.partial_sums import load_sum
from qvl_kernels.triton.to_float32 import to_float32
from qvl_kernels.util import cdiv

MINUS_LOG2E = tl.constexpr(-1.4426950408889634)
LOWEST = tl.constexpr(-40.0)  # silu(-40) is -2e-16; (1 + exp(40))^2 is still a float32
BLOCK = 256  # of SwiGLU, of one warp: 8 values a lane, and 11008 is a whole number of blocks


@triton.jit(do_not_specialize=["rows"])  # 1 would be a constant
def swiglu_kernel(x_ptr, y_ptr, rows, F, y_stride, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """y = up * round(gate / (1 + exp(-gate))); x [SPLITS or 1, rows, 2F] holds up | gate; y [rows, F], y_stride.

    A program takes two tiles of a row and one reciprocal for both, 1/a = b * 1/(a * b): exp and 1/a each at 16 lanes a
    clock would be a third of the time that H100's memory takes. It is the square of 1/sqrt(a * b), whose argument lies
    in 1 .. 2^116: a division also looks for arguments out of range, and 0.31 of memory time became 0.25 without it.
    """
    dtype = y_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    split_stride = rows.to(tl.int64) * 2 * F
    first = tl.program_id(1) * 2 * BLOCK + tl.arange(0, BLOCK)
    second = first + BLOCK
    gate_1 = load_sum(x_ptr, row * 2 * F + F + first, split_stride, first < F, dtype, SPLITS)
    gate_2 = load_sum(x_ptr, row * 2 * F + F + second, split_stride, second < F, dtype, SPLITS)
    up_1 = load_sum(x_ptr, row * 2 * F + first, split_stride, first < F, dtype, SPLITS)
    up_2 = load_sum(x_ptr, row * 2 * F + second, split_stride, second < F, dtype, SPLITS)
    below_1 = 1.0 + tl.exp2(tl.maximum(gate_1, LOWEST) * MINUS_LOG2E)
    below_2 = 1.0 + tl.exp2(tl.maximum(gate_2, LOWEST) * MINUS_LOG2E)
    root = tl.rsqrt(below_1 * below_2)
    both = root * root
    # rounded in between, as the reference has it: then the compiler multiplies 16-bit pairs
    silu_1 = (gate_1 * below_2 * both).to(dtype).to(tl.float32)
    silu_2 = (gate_2 * below_1 * both).to(dtype).to(tl.float32)
    tl.store(y_ptr + row * y_stride + first, (up_1 * silu_1).to(dtype), first < F)
    tl.store(y_ptr + row * y_stride + second, (up_2 * silu_2).to(dtype), second < F)


@triton.jit
def gelu_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    """y = x * (1 + erf(x / sqrt(2))) / 2 = max(x, 0) - a * Phi(-a) with a = |x|; x and y [n].

    log2 Phi(-a) is nearly a parabola. The polynomial is the one of degree 8 whose largest error in a * Phi(-a) over 0
    to 6 is least, 7e-9, and nowhere above 4e-7 * a; beyond 6 it falls on. With a call of erf the instructions took as
    long as memory, now they take half of that.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = to_float32(tl.load(x_ptr + at, at < n, 0.0))
    a = tl.minimum(tl.abs(x), 64.0)  # Phi(-64) is 0, and infinity times 0 is not
    log = -1.6904018e-06 * a + 2.5083309e-05
    log = log * a - 1.1446269e-04
    log = log * a - 3.2334204e-04
    log = log * a + 7.3333839e-03
    log = log * a - 5.2714199e-02
    log = log * a - 4.5911545e-01
    log = log * a - 1.1511233
    log = log * a - 0.99999887
    y = tl.maximum(x, 0.0, tl.PropagateNan.ALL) - a * tl.exp2(log)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), at < n)


def swiglu(up_gate: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """`reference.swiglu`: up_gate [n, 2F], or float32 partial sums [S, n, 2F] that are rounded to `dtype`."""
    checks.device("swiglu", up_gate)
    y = up_gate.new_empty((*up_gate.shape[up_gate.dim() == 3 : -1], up_gate.shape[-1] // 2), dtype=dtype)
    _swiglu_plan(up_gate, y).run()
    return y


def swiglu_into(up_gate: Tensor, y: Tensor) -> None:
    """`swiglu` of up_gate [n, 2F] into y [n, F], some columns of a wider tensor."""
    _swiglu_plan(up_gate, y).run()


def gelu(x: Tensor) -> Tensor:
    """`reference.gelu`: x of any shape. The bias before it is the GEMM's, whose epilogue adds it for nothing."""
    checks.device("gelu", x)
    y = torch.empty_like(x)
    _gelu_plan(x, y).run()
    return y


def _swiglu_plan(up_gate: Tensor, y: Tensor) -> Launch:
    splits = len(up_gate) if up_gate.dim() == 3 else 0
    whole = up_gate.dim() == 2
    shape = (None, 2 * y.shape[-1]) if whole else (None, None, 2 * y.shape[-1])
    checks.tensor("swiglu", "up_gate", up_gate, shape, y.dtype if whole else torch.float32)
    rows, width = y.shape
    grid = (rows, cdiv(width, 2 * BLOCK))
    return Launch(
        swiglu_kernel,
        grid,
        {"x_ptr": up_gate, "y_ptr": y, "rows": rows, "F": width, "y_stride": y.stride(0)},
        {"SPLITS": splits, "BLOCK": BLOCK},
        warps=1,
    )


def _gelu_plan(x: Tensor, y: Tensor) -> Launch:
    checks.tensor("gelu", "x", x, tuple(x.shape))
    return Launch(gelu_kernel, (cdiv(x.numel(), 1024),), {"x_ptr": x, "y_ptr": y, "n": x.numel()}, {"BLOCK": 1024})


def aot_specs(capability: int) -> list[Spec]:
    """1 and 16 rows, whole and of partial sums; prefill of 2048 rows; an image's GELU.

    No part of a decode step of the published model: there the linear before it takes the SwiGLU of its outputs.
    """
    specs = []
    for rows, splits in ((1, 0), (1, 2), (16, 0), (16, 2), (2048, 0)):
        shape = (splits, rows, 2 * 11008) if splits else (rows, 2 * 11008)
        x = torch.empty(shape, dtype=torch.float32 if splits else torch.bfloat16, device="meta")
        y = x.new_empty(rows, 11008, dtype=torch.bfloat16)
        name = ", ".join(["swiglu", counted(rows, "row"), *[counted(splits, "split")] * bool(splits)])
        launch, moved = _swiglu_plan(x, y), x.nbytes + y.nbytes
        specs.append(Spec(name, launch, moved, max_ratio=0.3, min_wide=0.9))
    x = torch.empty(1024, 8192, dtype=torch.bfloat16, device="meta")
    specs.append(Spec("gelu, an image", _gelu_plan(x, x), 2 * x.nbytes))
    return specs
