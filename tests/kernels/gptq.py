"""Random GPTQ linears to try kernels on."""

from __future__ import annotations

import torch
from torch import Tensor


def checkpoint(
    inputs: int, outputs: int, group: int, *, symmetric: bool = False, act_order: bool = False, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """qweight, qzeros, scales and g_idx of a GPTQ linear with random levels, every zero point among them."""
    rng = torch.Generator().manual_seed(seed)

    def words(rows: int, columns: int) -> Tensor:
        return torch.randint(-(2**31), 2**31, (rows, columns), generator=rng).to(torch.int32)

    groups = -(-inputs // group)
    qzeros = words(groups, outputs // 8)
    if symmetric:
        qzeros.fill_(0x77777777)
    scales = (torch.rand(groups, outputs, generator=rng) * 0.02 + 0.001).half()
    g_idx = torch.arange(inputs, dtype=torch.int32) // group
    if act_order:
        g_idx = g_idx[torch.randperm(inputs, generator=rng)]
    return words(inputs // 8, outputs), qzeros, scales, g_idx if act_order or inputs % group else None
