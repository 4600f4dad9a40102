"""GPTQ for one linear (Frantar et al. 2022, arXiv:2210.17323): round inputs one by one; the rest compensate the error.

With H = sum of x xᵀ over the calibration tokens and H = R Rᵀ, R upper triangular, the squared error of the outputs is

    |E R|², E = W - Ŵ:   its column j is E[:, j] R[j, j] + sum over k < j of E[:, k] R[k, j]

so once the inputs before j are rounded, the best value for input j is
w[j] + (sum over k < j of E[:, k] R[k, j]) / R[j, j].
These are the paper's updates, which it writes with the inverse of H. This form, Babai's nearest plane algorithm, needs
one Cholesky factorization and no inverse. Sums over earlier inputs are accumulated recursively by halves, as matrix
products; the paper uses blocks of 128.

Layers before this one are already rounded, so its inputs X differ from X⁰, those of the float model. The target is then
W X⁰, and the part of W X⁰ - Ŵ X that the weights can reach is |E R + W (X⁰ - X) Xᵀ R⁻ᵀ|²: each input's sum starts at
the second term instead of zero. This target is GPTAQ's (Li et al. 2025, arXiv:2504.02692); compensating only a share of
it avoids overfitting a small calibration set.

All matrices here are [in, out], float32: the weights of one input are a contiguous row.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from qvl_kernels.util import cdiv
from qvl_runtime.config.quantization import QuantizationConfig
from qvl_runtime.errors import CheckpointError
from qvl_runtime.formats.gptq import GPTQLinear, pack_linear
from qvl_runtime.formats.grid import Grid, closest_grid

_log = logging.getLogger(__name__)

Order = Literal["none", "static", "full"]
TOKENS_AT_ONCE = 4096  # converted to float32 together: 180 MB for the widest linear of the 9.6 B model
SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)  # of a group's range, tried for its grid
MAX_DAMPING = 1.0  # of the mean of H's diagonal; beyond that the statistics are useless


class Factor(NamedTuple):
    """The statistics of a linear's inputs that the solver uses."""

    upper: Tensor  # float32 [in, in], the R of H = R Rᵀ, inputs in the order `perm`
    perm: Tensor  # int64 [in], the order in which inputs are rounded
    damping: float  # added to H's diagonal, as a share of its mean
    drift: Tensor | None = None  # [in, in] in the inputs' dtype, in that order: the share of X (X⁰ - X)ᵀ to compensate


@dataclass(frozen=True, slots=True)
class Solver:
    """The settings of GPTQ, and the two steps: `factor` the statistics of the inputs, `solve` a weight."""

    quantization: QuantizationConfig
    damping: float = 0.01  # of the mean of H's diagonal, added to it; the paper's value
    order: Order = "static"  # static, full: the most important inputs first; full: groups follow that order, too
    drift: float = 0.5  # share of the error of the inputs, from rounding earlier layers, to compensate; 0: the paper
    shrinks: tuple[float, ...] = SHRINKS  # (1.0,): grids span the smallest to the greatest weight, as in the paper

    def factor(self, x: Tensor, float_x: Tensor | None = None) -> Factor:
        """Accumulate H of inputs x [n, in] of any float dtype and factorize it; float_x: X⁰, to compensate drift.

        Where H is numerically singular, its damping grows tenfold, with a warning. Raises `CheckpointError` where that
        does not help, because the activations are not finite.
        """
        diagonal = torch.zeros(x.shape[1], device=x.device)
        for tokens in torch.split(x, TOKENS_AT_ONCE):
            diagonal += tokens.float().square().sum(0)
        perm = torch.arange(len(diagonal), device=x.device)
        if self.order != "none":
            perm = torch.argsort(diagonal, descending=True, stable=True)
        reverse = perm.flip(0)  # the lower factor of H in this order, flipped, is the upper factor in `perm` order
        hessian = _products(x, reverse)
        unused = (diagonal == 0)[reverse]  # inputs that are always zero are rounded to nearest
        hessian.diagonal()[unused] = 1.0
        damping, mean = self.damping, diagonal.mean()
        while damping <= MAX_DAMPING:
            hessian.diagonal().add_(damping * mean)
            lower, failed = torch.linalg.cholesky_ex(hessian)
            if not failed:
                del hessian
                upper = lower.flip(0, 1)
                del lower
                drift = None if float_x is None else _products(x, perm, float_x).mul_(self.drift).to(x.dtype)
                return Factor(upper, perm, damping, drift)
            hessian.diagonal().sub_(damping * mean)
            _log.warning("damping %g leaves the statistics of the inputs singular; trying %g", damping, 10 * damping)
            damping *= 10
        raise CheckpointError(
            f"{len(x)} calibration tokens of {x.shape[1]} inputs have no usable statistics even with damping "
            f"{damping / 10:g}; expected finite activations: does the float checkpoint answer sensibly?"
        )

    def solve(self, weight: Tensor, factor: Factor, bias: Tensor | None = None) -> GPTQLinear:
        """Quantize a weight [out, in] with the factored statistics of its inputs.

        Raises `CheckpointError` for NaN or infinity.
        """
        if not torch.isfinite(weight).all():
            raise CheckpointError(f"a weight of shape {tuple(weight.shape)} holds NaN or infinity: fetch it again")
        q = self.quantization
        inputs = weight.shape[1]
        group_size = inputs if q.group_size == -1 else q.group_size
        groups = torch.arange(inputs, dtype=torch.int32, device=weight.device) // group_size
        static = self.order == "static"  # groups are those of the inputs' natural order
        group_of = groups[factor.perm] if static else groups
        by_input = weight.t()
        rounding = _Rounding(by_input[factor.perm].float(), factor, self, group_size, group_of)
        if static:
            rounding.choose_grids(by_input)
        rounding.run(0, inputs)
        codes, g_idx = torch.empty_like(rounding.codes), torch.empty_like(groups)
        codes[factor.perm], g_idx[factor.perm] = rounding.codes, group_of
        in_order = torch.equal(g_idx, groups) and inputs % group_size == 0
        return pack_linear(
            codes, rounding.scales, rounding.zeros, None if in_order else g_idx, bias, q.bits, group_size, q.zero_offset
        )


class _Rounding:
    """One weight while it is rounded: inputs before the current one hold errors, those after it hold sums."""

    def __init__(self, weight: Tensor, factor: Factor, solver: Solver, group_size: int, group_of: Tensor) -> None:
        self.weight, self.upper = weight, factor.upper
        # [in, out], E of rounded inputs, sums of E R for those to come
        if factor.drift is None:
            self.carried = torch.zeros_like(weight)
        else:
            drifted = factor.drift @ weight.to(factor.drift.dtype)
            self.carried = torch.linalg.solve_triangular(factor.upper, drifted.float(), upper=True).contiguous()
        self.codes = torch.empty_like(weight, dtype=torch.uint8)
        self.group_of = group_of.tolist()
        self._diagonal: list[float] = factor.upper.diagonal().tolist()
        self._solver, self._size = solver, group_size
        shape = (cdiv(len(weight), group_size), weight.shape[1])
        self.scales, self.zeros = weight.new_empty(shape), weight.new_empty(shape)
        self._grids_chosen = False

    def choose_grids(self, weight: Tensor) -> None:
        """Choose every grid before anything is rounded, for groups of inputs in their natural order."""
        for group, rows in enumerate(torch.split(weight, self._size)):
            self._choose_grid(group, rows.float())
        self._grids_chosen = True

    def run(self, start: int, end: int) -> None:
        """Round inputs start to end; those before start are rounded, and their errors are in the sums."""
        if not self._grids_chosen and start % self._size == 0 and end == min(start + self._size, len(self.weight)):
            self._choose_grid(start // self._size, self._targets(start, end))
        if end - start == 1:
            self._round(start)
            return
        middle = start + (1 << (end - start - 1).bit_length() - 1)  # a power of two, so that groups are never cut
        self.run(start, middle)
        left, right = slice(start, middle), slice(middle, end)
        self.carried[right].addmm_(self.upper[left, right].t(), self.carried[left])
        self.run(middle, end)

    def _targets(self, start: int, end: int) -> Tensor:
        """The best values of inputs start to end if they were not rounded."""
        inputs = slice(start, end)
        block = self.upper[inputs, inputs].t()
        targets: Tensor = self.weight[inputs] + torch.linalg.solve_triangular(block, self.carried[inputs], upper=False)
        return targets

    def _choose_grid(self, group: int, rows: Tensor) -> None:
        q = self._solver.quantization
        self.scales[group], self.zeros[group], _ = closest_grid(
            rows, self._solver.shrinks, q.bits, bool(q.sym), q.zero_offset
        )

    def _round(self, row: int) -> None:
        group = self.group_of[row]
        grid = Grid(self.scales[group], self.zeros[group], 2**self._solver.quantization.bits - 1)
        codes = grid.quantize(self.weight[row] + self.carried[row] / self._diagonal[row])
        self.codes[row] = codes
        self.carried[row] = self.weight[row] - grid.dequantize(codes)


def _products(x: Tensor, perm: Tensor, float_x: Tensor | None = None) -> Tensor:
    """The sum over tokens of x xᵀ, or of x (float_x - x)ᵀ: float32 [in, in], of tensors [n, in], in `perm` order.

    bfloat16 values stay exact when rounded to bfloat16 again, and their differences nearly do: oneDNN may then multiply
    them as bfloat16 and accumulate in float32, which is faster on CPUs with AMX.
    """
    total = torch.zeros(x.shape[1], x.shape[1], device=x.device)
    settings: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    if x.dtype is torch.bfloat16:
        settings.fp32_precision = "bf16"
    try:
        for start in range(0, len(x), TOKENS_AT_ONCE):
            part = slice(start, start + TOKENS_AT_ONCE)
            tokens = x[part, perm].float()
            others = tokens if float_x is None else float_x[part, perm].float() - tokens
            total.addmm_(tokens.t(), others)
    finally:
        settings.fp32_precision = before
    return total
