"""What the tuner tries: the kernels of linears, their configurations, and operands to run them on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.gpu.linears import random_weight
from qvl_kernels.util import cdiv

if TYPE_CHECKING:
    from qvl_kernels.triton.linear.configs import Config, Regime

Op = Callable[[Tensor, Any], Tensor]
ROWS: dict[Regime, int] = {"small_m": 1, "dense": 1, "gemm": 256, "wgmma": 512}  # that each kernel is timed with
GRID: dict[Regime, tuple[tuple[int, ...], ...]] = {  # rows, columns, warps and stages to try
    "small_m": ((8,), (32, 64), (1, 2, 4, 8), (1,)),
    "dense": ((8,), (16, 32, 64), (2, 4, 8), (1,)),
    "gemm": ((32, 64, 128), (128, 256), (4, 8), (2, 3, 4)),
    "wgmma": ((64, 128, 256), (128,), (4, 8), (3, 4)),
}
MOST_SUMS = 64  # of a thread of gemm: with 128 registers of them, others spill


def candidates(kind: Regime, capability: int, inputs: int, outputs: int) -> Iterator[Config]:
    """The built-in configuration, then the others, each with half to twice the built-in number of splits."""
    from qvl_kernels.triton.linear.configs import TILES, Config, config

    built_in = config(capability, kind, ROWS[kind], inputs, outputs, bits_of(kind))
    yield built_in
    tiles = cdiv(inputs, TILES[bits_of(kind)])
    near = {max(1, built_in.splits * quarters // 4) for quarters in (2, 3, 4, 5, 6, 8)}
    for numbers in product(*GRID[kind], [n for n in sorted(near) if n <= tiles]):
        made = Config._make(numbers)
        too_large = kind == "gemm" and made.rows * made.columns > MOST_SUMS * 32 * made.warps
        if made != built_in and outputs % made.columns == 0 and not too_large:
            yield made


def bits_of(kind: Regime) -> int:
    """Bits of the weight that a kernel multiplies by."""
    return 16 if kind == "dense" else 4


def kinds(capability: int) -> list[Regime]:
    """The kernels of a capability."""
    from qvl_kernels.triton.linear.configs import WGMMA_CAPABILITY

    return [kind for kind in ROWS if kind != "wgmma" or capability == WGMMA_CAPABILITY]


def op_of(kind: Regime) -> Op:
    """The product of x with a weight: a packed one, or for `dense` a tensor."""
    from qvl_kernels.triton.linear.dense import plan_dense
    from qvl_kernels.triton.linear.gemm import gemm
    from qvl_kernels.triton.linear.small_m import small_m
    from qvl_kernels.triton.linear.wgmma import wgmma

    ops: dict[str, Op] = {"small_m": small_m, "gemm": gemm, "wgmma": wgmma}
    return ops.get(kind, lambda x, weight: plan_dense(x, weight)(x))


def operands(kind: Regime, inputs: int, outputs: int, device: torch.device) -> tuple[Tensor, Any, Tensor]:
    """x, the weight of `op_of`, and the same weight dequantized [outputs, inputs]."""
    from qvl_kernels.layouts.repack import dequantize

    weight = random_weight(inputs, outputs, device)
    dtype = torch.bfloat16 if kind == "dense" else torch.float16
    x, dense = torch.randn(ROWS[kind], inputs, device=device, dtype=dtype), dequantize(weight)
    rounded = dense.to(dtype).contiguous()
    return x, rounded if kind == "dense" else weight, dense


def copy_of(weight: Any) -> Any:
    """Another weight with the same numbers elsewhere in memory."""
    return weight.clone() if isinstance(weight, Tensor) else replace(weight, words=weight.words.clone())
