"""Random GPTQ linears for the tests of kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from qvl_kernels import reference
from tests.kernels.compare import as_good_as_torch


def checkpoint(
    inputs: int,
    outputs: int,
    group: int,
    *,
    bits: int = 4,
    symmetric: bool = False,
    act_order: bool = False,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return qweight, qzeros, scales and g_idx of a GPTQ linear with random codes and zero points.

    At 4 bits every zero point occurs; at 8 bits only those stored as even numbers: 255 stored is 256, which few kernels
    support.
    """
    rng = torch.Generator().manual_seed(seed)

    def random_int32(rows: int, columns: int) -> Tensor:
        return torch.randint(-(2**31), 2**31, (rows, columns), generator=rng).to(torch.int32)

    groups = -(-inputs // group)
    qzeros = random_int32(groups, outputs * bits // 32)
    if bits == 8:
        qzeros &= ~0x01010101
    if symmetric:
        qzeros.fill_(0x77777777 if bits == 4 else 0x7F7F7F7F)
    scales = ((torch.rand(groups, outputs, generator=rng) * 0.02 + 0.001) * 2.0 ** (4 - bits)).half()
    g_idx = torch.arange(inputs, dtype=torch.int32) // group
    if act_order:
        g_idx = g_idx[torch.randperm(inputs, generator=rng)]
    return random_int32(inputs * bits // 32, outputs), qzeros, scales, g_idx if act_order or inputs % group else None


def activations(rows: int, inputs: int, dtype: torch.dtype = torch.float16) -> Tensor:
    """Random x [rows, inputs]."""
    return torch.randn(rows, inputs, generator=torch.Generator().manual_seed(rows)).to(dtype)


def check_product(
    got: Tensor, x: Tensor, tensors: tuple[Tensor, ...], bias: Tensor | None = None, bits: int = 4
) -> None:
    """As near to float64 as torch's own product with the weight rounded to x's dtype, twice over."""
    exact = reference.gptq_dequantize(*tensors, bits, 1)
    want = x.double() @ exact.double().t() + (0 if bias is None else bias.double())
    plain = torch.nn.functional.linear(x, exact.to(x.dtype), None if bias is None else bias.to(x.dtype))
    as_good_as_torch(got, plain, want)
