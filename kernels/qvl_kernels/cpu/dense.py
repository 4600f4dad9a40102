"""Dense linears on a CPU: one order of sums for any number of rows, so that a row's bits depend on no other row."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from qvl_kernels.cpu.library import CODES, FLOATS, library, pointer
from qvl_kernels.cpu.memory import empty


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
