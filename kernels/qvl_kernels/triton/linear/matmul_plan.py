"""A product with a packed weight, resolved once: grid, constants and the weight's tensors are bound to its kernel."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qvl_kernels.triton.launch import Launch


class MatmulPlan(NamedTuple):
    """A call allocates the output and launches; checks and configuration happened when the plan was made."""

    launch: Launch  # without x, its rows and the output
    splits: int  # of K
    outputs: int

    def prepare(self, x: Tensor) -> tuple[Launch, Tensor]:
        """The launch for x [rows, K], and its output: [splits, rows, N] in float32, or in x's dtype with one split."""
        dtype = x.dtype if self.splits == 1 else torch.float32
        out = x.new_empty((self.splits, len(x), self.outputs), dtype=dtype)
        return self.launch.with_arguments(x_ptr=x, out_ptr=out, rows=len(x)), out

    def __call__(self, x: Tensor) -> Tensor:
        """x [rows, K] to split-K partial sums float32 [S, rows, N], or with one split to [rows, N] in x's dtype."""
        launch, out = self.prepare(x)
        launch.run()
        return out[0] if self.splits == 1 else out
