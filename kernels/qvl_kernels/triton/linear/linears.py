"""Linears bound to their packed weights, and their fallback to the reference implementation."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from qvl_kernels.layouts.binding import bind_published
from qvl_kernels.layouts.gpu import LAYOUTS, PackedInt4, PackedInt8, kind_of
from qvl_kernels.layouts.repack import pack_gptq, unpack_to_qweight, unsupported
from qvl_kernels.reference import BoundLinear, Packed, Precision, linear
from qvl_kernels.triton.activations import swiglu
from qvl_kernels.triton.launch import capability
from qvl_kernels.triton.linear.configs import regime
from qvl_kernels.triton.linear.dense_linear import prepare_linear
from qvl_kernels.triton.linear.dequantize import DequantizePlan, plan_dequantize
from qvl_kernels.triton.linear.gemm import plan_gemm
from qvl_kernels.triton.linear.matmul_plan import MatmulPlan
from qvl_kernels.triton.linear.small_m import gates_in_one_split, plan_small_m
from qvl_kernels.triton.linear.split_sum import sum_partials
from qvl_kernels.util import cdiv

__all__ = ["LAYOUTS", "bind", "linear", "pack_gptq", "prepare_gptq", "prepare_linear", "unpack_to_qweight"]

STEP = 128  # outputs: whole programs of the kernels that dequantize
UNPACKED_AT_ONCE = 16 << 20  # bytes: the published model's up_gate would be 172 MiB on top of a prompt's activations
BUCKET = 8  # rows: configurations change only at multiples of it


@dataclass(frozen=True, slots=True, eq=False)
class PackedLinear:
    """A packed weight and its bias. Checks and configurations are resolved once per regime, 8 rows and dtype."""

    weight: PackedInt4 | PackedInt8
    bias: Tensor | None
    _plans: dict[tuple[object, ...], MatmulPlan] = field(default_factory=dict, init=False)
    _dequantize_plans: dict[tuple[torch.dtype, int, int], DequantizePlan] = field(default_factory=dict, init=False)

    def __call__(self, x: Tensor) -> Tensor:
        """x [.., in] to [.., out], in x's dtype."""
        y = sum_partials(self.forward_partial_sums(x.reshape(-1, self.weight.inputs)), x.dtype)
        return y.view(*x.shape[:-1], self.weight.outputs)

    def forward_partial_sums(self, x: Tensor) -> Tensor:
        """x [n, in] to [n, out] in x's dtype, or to split-K partial sums float32 [S, n, out]."""
        weight = self.weight
        if weight.perm is not None:
            x = x.index_select(-1, weight.perm)
        x = x.contiguous()
        if not len(x):
            return x.new_empty(0, weight.outputs)
        kind = regime(weight.BITS, len(x), x.dtype)
        if kind == "dequantize":
            return self._dequantized(x)
        return self._plan(kind, x)(x)

    def forward_gated(self, x: Tensor) -> Tensor:
        """x [n, in] to the SwiGLU [n, out / 2] of its outputs up | gate: one launch where the rows are few."""
        weight = self.weight
        few = len(x) > 0 and regime(weight.BITS, len(x), x.dtype) == "small_m"
        if not few or not gates_in_one_split(weight, capability(x.device)):
            return swiglu(self.forward_partial_sums(x), x.dtype)
        if weight.perm is not None:
            x = x.index_select(-1, weight.perm)
        return self._plan("gated", x.contiguous())(x)

    def _plan(self, kind: str, x: Tensor) -> MatmulPlan:
        # The key holds all that the checks look at, so that an x with a plan needs none.
        key = (kind, cdiv(len(x), BUCKET), x.dtype, x.device, x.shape[1:])
        plan = self._plans.get(key)
        if plan is None:
            if kind == "gemm":
                plan = plan_gemm(x, self.weight, self.bias)  # type: ignore[arg-type]  # int8 has no gemm
            else:
                plan = plan_small_m(x, self.weight, self.bias, gated=kind == "gated")
            self._plans[key] = plan
        return plan

    def _dequantized(self, x: Tensor) -> Tensor:
        """Dequantize some outputs at a time; torch multiplies them while the L2 holds them."""
        outputs = self.weight.outputs
        step = max(STEP, UNPACKED_AT_ONCE // (self.weight.inputs * x.element_size()) // STEP * STEP)
        y = x.new_empty(len(x), outputs)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        for first in range(0, outputs, step):
            weight, columns = self._dequantize(x.dtype, first, step).t(), slice(first, first + step)
            if bias is None:
                torch.mm(x, weight, out=y[:, columns])
            else:
                torch.addmm(bias[columns], x, weight, out=y[:, columns])
        return y

    def _dequantize(self, dtype: torch.dtype, first: int, count: int) -> Tensor:
        key = (dtype, first, count)
        plan = self._dequantize_plans.get(key)
        if plan is None:
            plan = self._dequantize_plans[key] = plan_dequantize(self.weight, dtype, first, count)
        return plan()


def prepare_gptq(
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor | None,
    bits: int,
    zero_offset: int,
    bias: Tensor | None = None,
    precision: Precision = "exact",
) -> BoundLinear:
    """`reference.prepare_gptq` in the kernels' layout, or a fallback to the reference ops, with a warning."""
    return bind(pack_gptq(qweight, qzeros, scales, g_idx, bits, zero_offset, bias), precision)


def bind(packed: Packed, precision: Precision = "exact") -> BoundLinear:
    """Bind a packed linear to its kernels; a published one is repacked first, or falls back with a warning."""
    if packed.layout == "gptq":
        return bind_published(packed, precision, pack_gptq, bind, unsupported)
    weight, bias = kind_of(packed).from_packed(packed), packed.tensors.get("bias")
    details = f"groups of {weight.group}{'' if weight.zeros is None else ', zero points'}"
    details += "" if weight.perm is None else ", act-order: x is gathered first"
    packed_linear = PackedLinear(weight, bias)
    return BoundLinear(
        packed_linear,
        f"int{weight.BITS}, {details}",
        weight.nbytes,
        packed_linear.forward_partial_sums,
        packed_linear.forward_gated,
    )
