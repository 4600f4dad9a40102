"""Linears bound to their packed weights, and their fallback to the reference implementation."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from qvl_kernels.layouts.binding import bind_published
from qvl_kernels.layouts.gpu import LAYOUTS, PackedInt4, PackedInt8, kind_of
from qvl_kernels.layouts.repack import pack_gptq, unpack_to_qweight, unsupported
from qvl_kernels.reference import BoundLinear, Packed, Precision, linear
from qvl_kernels.triton.activations import swiglu
from qvl_kernels.triton.launch import capability
from qvl_kernels.triton.linear.configs import WGMMA_CAPABILITY, Regime, regime
from qvl_kernels.triton.linear.dense_linear import prepare_linear
from qvl_kernels.triton.linear.gemm import plan_gemm
from qvl_kernels.triton.linear.matmul_plan import MatmulPlan
from qvl_kernels.triton.linear.small_m import gates_in_one_split, plan_small_m
from qvl_kernels.triton.linear.split_sum import sum_partials
from qvl_kernels.triton.linear.unpacked import Unpacked
from qvl_kernels.triton.linear.wgmma import plan_wgmma, takes
from qvl_kernels.util import cdiv

__all__ = ["LAYOUTS", "bind", "linear", "pack_gptq", "prepare_gptq", "prepare_linear", "unpack_to_qweight"]

BUCKET = 8  # rows: configurations change only at multiples of it


@dataclass(frozen=True, slots=True, eq=False)
class PackedLinear:
    """A packed weight and its bias. Checks and configurations are resolved once per regime, 8 rows and dtype."""

    weight: PackedInt4 | PackedInt8
    bias: Tensor | None
    _plans: dict[tuple[object, ...], MatmulPlan] = field(default_factory=dict, init=False)
    _unpacked: Unpacked = field(init=False)

    def __post_init__(self) -> None:
        """Make the products of many rows, which share the weight."""
        object.__setattr__(self, "_unpacked", Unpacked(self.weight, self.bias))

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
        kind = self._kind(x)
        if kind == "dequantize":
            return self._unpacked(x)
        return self._plan(kind, x)(x)

    def forward_gated(self, x: Tensor) -> Tensor:
        """x [n, in] to the SwiGLU [n, out / 2] of its outputs up | gate, without all of these in memory if it can."""
        weight = self.weight
        kind = self._kind(x)
        few = kind == "small_m" and len(x) > 0 and gates_in_one_split(weight, capability(x.device))
        if not few and not (kind == "dequantize" and self._unpacked.gates()):
            return swiglu(self.forward_partial_sums(x), x.dtype)
        if weight.perm is not None:
            x = x.index_select(-1, weight.perm)
        x = x.contiguous()
        return self._plan("gated", x)(x) if few else self._unpacked.gated(x)

    def _kind(self, x: Tensor) -> Regime:
        wgmma = takes(self.weight) and capability(x.device) == WGMMA_CAPABILITY
        return regime(self.weight.BITS, len(x), x.dtype, wgmma)

    def _plan(self, kind: str, x: Tensor) -> MatmulPlan:
        # The key holds all that the checks look at, so that an x with a plan needs none.
        key = (kind, cdiv(len(x), BUCKET), x.dtype, x.device, x.shape[1:])
        plan = self._plans.get(key)
        if plan is None:
            if kind == "gemm":
                plan = plan_gemm(x, self.weight, self.bias)  # type: ignore[arg-type]  # int8 has no gemm
            elif kind == "wgmma":
                plan = plan_wgmma(x, self.weight, self.bias)
            else:
                plan = plan_small_m(x, self.weight, self.bias, gated=kind == "gated")
            self._plans[key] = plan
        return plan


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
