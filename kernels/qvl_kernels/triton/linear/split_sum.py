"""Add the split-K partial sums of a linear for a consumer that does not add them itself."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qvl_kernels.triton import checks
from qvl_kernels.triton.launch import Launch, Spec
from qvl_kernels.util import cdiv

BLOCK, WARPS = 1024, 4  # elements of a program: 8 a thread, two loads of 128 bits


@triton.jit
def split_sum_kernel(parts_ptr, out_ptr, size, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """out[i] = round(sum over s: parts[s, i]), in the order of s. parts float32 [SPLITS, size]; out [size]."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(parts_ptr + split * size.to(tl.int64) + at, at < size, 0.0)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), at < size)


def sum_partials(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`reference.sum_partials`: [n, out] unchanged; float32 partial sums [S, n, out] added, rounded to `dtype`."""
    if x.dim() != 3:
        return x
    checks.tensor("sum_partials", "x", x, (None, None, None), torch.float32)
    checks.device("sum_partials", x)
    out = x.new_empty(x.shape[1:], dtype=dtype)
    _plan(x, out).run()
    return out


def _plan(parts: Tensor, out: Tensor) -> Launch:
    return Launch(
        split_sum_kernel,
        (cdiv(out.numel(), BLOCK),),
        {"parts_ptr": parts, "out_ptr": out, "size": out.numel()},
        {"SPLITS": len(parts), "BLOCK": BLOCK},
        WARPS,
    )


def aot_specs(capability: int) -> list[Spec]:
    """16 rows of 4096 outputs in 8 splits."""
    parts = torch.empty(8, 16, 4096, dtype=torch.float32, device="meta")
    out = torch.empty(16, 4096, dtype=torch.float16, device="meta")
    launch = _plan(parts, out)
    return [Spec("split_sum, 16 rows, 8 splits", launch, parts.nbytes + out.nbytes, max_ratio=0.3, min_wide=0.9)]
