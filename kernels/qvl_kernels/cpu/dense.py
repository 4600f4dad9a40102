"""Dense linears on a CPU: one order of sums for any number of rows, so that a row's bits depend on no other row.

Also torch's GEMM with few different numbers of rows, for packed weights that are dequantized first.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from qvl_kernels.cpu.library import CODES, FLOATS, library, pointer
from qvl_kernels.cpu.memory import empty


def gemm_in_steps(x: Tensor, outputs: int, gemm: Callable[[Tensor, Tensor], object]) -> Tensor:
    """Map x [.., in] to [.., outputs] by calls of gemm(rows, into); in 16-bit floats with padded numbers of rows.

    For 16-bit floats torch's GEMMs (oneDNN) compile code for each new number of rows and keep it, 0.5 MiB for each
    shape of weight, between the activations in the heap, and each prompt of a new length would wait for it. So they are
    called once or twice with the numbers of rows of `step_sizes`, padded with zeros. Float32 uses another library,
    which does not compile.
    """
    flat = x.reshape(-1, x.shape[-1])
    rows = len(flat)
    sizes = [rows] if x.dtype == torch.float32 else step_sizes(rows)
    y = empty((sum(sizes), outputs), x.dtype)
    padded = F.pad(flat, (0, 0, 0, len(y) - rows)) if len(y) > rows else flat
    for part, into in zip(torch.split(padded, sizes), torch.split(y, sizes), strict=True):
        gemm(part, into)
    return y[:rows].view(*x.shape[:-1], outputs)


def step_sizes(rows: int) -> list[int]:
    """Return the largest power of two in `rows`, and for the remainder the next of 16, 32, 48, 64, 96, 128, 192, ...

    Up to 1024 rows these are 11 sizes, and padding is 6 % of the rows on average (65 to 1024, uniformly). A single GEMM
    rounded up to an eighth of a power of two would have 5 % padding but 32 sizes: on nano 39 MiB more in the heap after
    150 prompts of 5 to 1000 tokens, and still growing.
    """
    if rows <= 32:
        return [16 if rows <= 16 else 32]
    whole = 1 << rows.bit_length() - 1
    rest = rows - whole
    if rest == 0:
        return [whole]
    up = max(16, 1 << (rest - 1).bit_length())
    padded = up * 3 // 4 if up >= 64 and rest <= up * 3 // 4 else up
    return [2 * whole] if padded == whole else [whole, padded]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`reference.linear`; weights are read in place, by torch only if dtypes or strides differ."""
    rows = x.numel() // max(1, x.shape[-1])
    dense = x.dtype == weight.dtype and x.dtype in FLOATS and weight.is_contiguous() and x.shape[-1] == weight.shape[-1]
    dense = dense and (bias is None or (bias.dtype == x.dtype and bias.shape == weight.shape[:1]))
    if not dense or rows == 0:
        return F.linear(x, weight, bias)
    x = x.contiguous()
    y = empty((*x.shape[:-1], len(weight)), x.dtype)
    library().ready().linear_dense(
        x.data_ptr(), CODES[x.dtype], rows, x.shape[-1], weight.data_ptr(), len(weight), pointer(bias), y.data_ptr()
    )
    return y
