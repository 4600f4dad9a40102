"""Dense linears: few rows by the package's kernel, more by torch's own product (cuBLAS)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor

from qvl_kernels import reference
from qvl_kernels.reference import BoundLinear, Precision
from qvl_kernels.triton.activations import swiglu
from qvl_kernels.triton.launch import capability
from qvl_kernels.triton.linear.configs import SMALL_M
from qvl_kernels.triton.linear.dense import dense_config, plan_dense, takes
from qvl_kernels.triton.linear.matmul_plan import MatmulPlan
from qvl_kernels.triton.linear.split_sum import sum_partials
from qvl_kernels.util import cdiv

BUCKET = 8  # rows: configurations change only at multiples of it


@dataclass(frozen=True, slots=True, eq=False)
class DenseLinear:
    """A 16-bit weight [out, in] and its bias. Checks and configurations are resolved once per 8 rows."""

    weight: Tensor
    bias: Tensor | None
    _plans: dict[tuple[object, ...], MatmulPlan] = field(default_factory=dict, init=False)

    def __call__(self, x: Tensor) -> Tensor:
        """x [.., in] to [.., out], in x's dtype."""
        if not self._few(x):
            return F.linear(x, self.weight, self.bias)
        outputs, inputs = self.weight.shape
        y = sum_partials(self._plan(x.reshape(-1, inputs).contiguous(), gated=False), x.dtype)
        return y.view(*x.shape[:-1], outputs)

    def forward_partial_sums(self, x: Tensor) -> Tensor:
        """x [n, in] to [n, out] in x's dtype, or to split-K partial sums float32 [S, n, out]."""
        return self._plan(x.contiguous(), gated=False) if self._few(x) else F.linear(x, self.weight, self.bias)

    def forward_gated(self, x: Tensor) -> Tensor:
        """x [n, in] to the SwiGLU [n, out / 2] of its outputs up | gate: one launch where the rows are few."""
        if self._few(x) and dense_config(capability(x.device), len(x), self.weight).splits == 1:
            return self._plan(x.contiguous(), gated=True)
        return swiglu(self.forward_partial_sums(x), x.dtype)

    def _few(self, x: Tensor) -> bool:
        return 0 < x.numel() <= SMALL_M[16] * self.weight.shape[1] and x.dtype == self.weight.dtype

    def _plan(self, x: Tensor, gated: bool) -> Tensor:
        # The key holds all that the checks look at, so that an x with a plan needs none.
        key = (gated, cdiv(len(x), BUCKET), x.dtype, x.device, x.shape[1:])
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = plan_dense(x, self.weight, self.bias, gated)
        return plan(x)


def prepare_linear(weight: Tensor, bias: Tensor | None = None, precision: Precision = "exact") -> BoundLinear:
    """`reference.prepare_linear`, in either precision alike: 16-bit weights meet few rows in the package's kernel."""
    torchs = reference.prepare_linear(weight, bias, precision)
    if not takes(weight) or (bias is not None and bias.dtype != weight.dtype):
        return torchs
    linear = DenseLinear(weight, bias)
    return torchs._replace(call=linear, split_k=linear.forward_partial_sums, gated=linear.forward_gated)
