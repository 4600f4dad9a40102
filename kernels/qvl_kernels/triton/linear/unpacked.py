"""Packed linears of many rows: dequantize a piece of the weight, and let torch multiply it while the L2 holds it.

A piece is as large as the L2 of an H100: of 16 MiB, as it was, the deepest linear's pieces filled half of the GPU, and
a layer took 52 launches, which the host could not queue as fast as they ran. Up and gate are taken together, so that
only a piece of their outputs is in memory besides the SwiGLU: a prompt of 2048 tokens takes less memory than with
smaller pieces and all outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qvl_kernels.layouts.gpu import PackedInt4, PackedInt8
from qvl_kernels.triton.activations import swiglu_into
from qvl_kernels.triton.linear.dequantize import DequantizePlan, plan_dequantize

STEP = 128  # outputs: whole programs of the kernels that dequantize
AT_ONCE = 48 << 20  # bytes of a piece


class Unpacked:
    """The products of a packed weight with many rows; launches are resolved once."""

    def __init__(self, weight: PackedInt4 | PackedInt8, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias
        self._plans: dict[tuple[torch.dtype, int, int], DequantizePlan] = {}

    def __call__(self, x: Tensor) -> Tensor:
        """x [n, in], its inputs in the packed order, to [n, out]."""
        outputs = self.weight.outputs
        step = self._step(x.dtype, outputs)
        y = x.new_empty(len(x), outputs)
        for first in range(0, outputs, step):
            columns = slice(first, min(first + step, outputs))
            self._product(x, self._dequantized(x.dtype, columns), [columns], y[:, columns])
        return y

    def gates(self) -> bool:
        """Whether up and gate can be taken piece by piece: their outputs are whole programs."""
        return self.weight.outputs % (2 * STEP) == 0

    def gated(self, x: Tensor) -> Tensor:
        """x [n, in] to the SwiGLU [n, out / 2] of its outputs up | gate."""
        width = self.weight.outputs // 2
        step = self._step(x.dtype, width, 2)
        gated = x.new_empty(len(x), width)
        piece = x.new_empty(2 * step, self.weight.inputs)
        y = x.new_empty(len(x), 2 * step)
        for first in range(0, width, step):
            count = min(step, width - first)
            parts = [slice(half + first, half + first + count) for half in (0, width)]
            for i, columns in enumerate(parts):
                self._dequantized(x.dtype, columns, piece[i * count : (i + 1) * count])
            outputs = y.view(-1)[: len(x) * 2 * count].view(len(x), 2 * count)
            self._product(x, piece[: 2 * count], parts, outputs)
            swiglu_into(outputs, gated[:, first : first + count])
        return gated

    def _step(self, dtype: torch.dtype, outputs: int, times: int = 1) -> int:
        """Outputs of a piece: equal ones but for the last."""
        most = max(STEP, AT_ONCE // (self.weight.inputs * dtype.itemsize * times) // STEP * STEP)
        pieces = -(-outputs // most)
        return -(-outputs // (pieces * STEP)) * STEP

    def _product(self, x: Tensor, weight: Tensor, columns: list[slice], out: Tensor) -> None:
        if self.bias is None:
            torch.mm(x, weight.t(), out=out)
        else:
            parts = [self.bias[part] for part in columns]
            bias = parts[0] if len(parts) == 1 else torch.cat(parts)
            torch.addmm(bias.to(x.dtype), x, weight.t(), out=out)

    def _dequantized(self, dtype: torch.dtype, outputs: slice, out: Tensor | None = None) -> Tensor:
        key = (dtype, outputs.start, outputs.stop)
        plan = self._plans.get(key)
        if plan is None:
            made = plan_dequantize(self.weight, dtype, outputs.start, outputs.stop - outputs.start)
            plan = self._plans[key] = made
        return plan(out)
