"""GPTQ for one linear (Frantar et al. 2022, arXiv:2210.17323): round inputs one by one, the rest make up for the error.

With H = sum of x xᵀ over the calibration rows and H = R Rᵀ, R upper triangular, the squared error of the outputs is

    |E R|², E = W - Ŵ:   its column j is E[:, j] R[j, j] + sum over k < j of E[:, k] R[k, j]

so once the inputs before j are rounded, input j is best w[j] + (sum over k < j of E[:, k] R[k, j]) / R[j, j].
Those are the paper's updates, which it writes with the inverse of H; this form, that of Babai's nearest plane
algorithm, needs one Cholesky factorisation and no inverse. Sums over earlier inputs go halves by halves, as matrix
products, where the paper goes in blocks of 128.

Layers before this one are rounded already, so that its inputs X are not X⁰, which the float model has. Wanted is then
W X⁰, and what is left of W X⁰ - Ŵ X in reach of the weights is |E R + W (X⁰ - X) Xᵀ R⁻ᵀ|²: the sums of each input
start at the second term in place of zero. The wish is GPTAQ's (Li et al. 2025, arXiv:2504.02692); taking a share of it
keeps a calibration of few rows from being learnt by heart.

Everything here is laid out [in, out], float32: an input's weights are one contiguous row.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from qvl_runtime.config.model import QuantizationConfig
from qvl_runtime.errors import CheckpointError
from qvl_runtime.formats.gptq import GPTQLinear, pack_linear
from qvl_runtime.formats.grid import Grid, closest_grid

_log = logging.getLogger(__name__)

Order = Literal["none", "static", "full"]
ROWS_AT_ONCE = 4096  # calibration rows made float32 together: 180 MB for the widest linear of the 9.6 B model
SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)  # of a group's range, tried for its grid
MOST_DAMPING = 1.0  # of the mean of H's diagonal; beyond, the statistics are worthless


class Factor(NamedTuple):
    """What the solver needs to know of a linear's inputs."""

    upper: Tensor  # float32 [in, in], the R of H = R Rᵀ, inputs in the order `order`
    order: Tensor  # int64 [in], in which inputs are rounded
    damping: float  # what was added to H's diagonal, as a share of its mean
    drift: Tensor | None = None  # [in, in] in the inputs' dtype, the share of X (X⁰ - X)ᵀ made up for, in that order


@dataclass(frozen=True, slots=True)
class Solver:
    """How GPTQ is done."""

    quantization: QuantizationConfig
    damping: float = 0.01  # of the mean of H's diagonal, added to it; the paper's value
    order: Order = "static"  # static, full: inputs that matter most first; full: they form the groups, too
    drift: float = 0.5  # share that is made up for of what rounding earlier layers did to the inputs; 0: the paper
    shrinks: tuple[float, ...] = SHRINKS  # (1.0,): grids reach from the least weight to the greatest, as in the paper

    def factor(self, x: Tensor, meant: Tensor | None = None) -> Factor:
        """Gather H of inputs x [n, in] of any float dtype, and factorise it; `meant`: these inputs in the float model.

        Where rounding leaves H without a factor, its damping grows tenfold, with a warning. Raises `CheckpointError`
        where nothing helps: the activations are not finite.
        """
        diagonal = torch.zeros(x.shape[1], device=x.device)
        for rows in torch.split(x, ROWS_AT_ONCE):
            diagonal += rows.float().square().sum(0)
        order = torch.arange(len(diagonal), device=x.device)
        if self.order != "none":
            order = torch.argsort(diagonal, descending=True, stable=True)
        backwards = order.flip(0)  # the lower factor of H in this order is, turned around, the upper one wanted
        hessian = _products(x, backwards)
        unused = (diagonal == 0)[backwards]  # an input that is always zero: rounded to nearest
        hessian.diagonal()[unused] = 1.0
        damping, mean = self.damping, diagonal.mean()
        while damping <= MOST_DAMPING:
            hessian.diagonal().add_(damping * mean)
            lower, fault = torch.linalg.cholesky_ex(hessian)
            if not fault:
                del hessian
                upper = lower.flip(0, 1)
                del lower
                drift = None if meant is None else _products(x, order, meant).mul_(self.drift).to(x.dtype)
                return Factor(upper, order, damping, drift)
            hessian.diagonal().sub_(damping * mean)
            _log.warning("damping %g leaves the inputs' statistics singular; trying %g", damping, 10 * damping)
            damping *= 10
        raise CheckpointError(
            f"{len(x)} calibration rows of {x.shape[1]} inputs have no usable statistics even with damping "
            f"{damping / 10:g}; expected finite activations: does the float checkpoint answer sensibly?"
        )

    def solve(self, weight: Tensor, factor: Factor, bias: Tensor | None = None) -> GPTQLinear:
        """Quantize a weight [out, in], given the factor of its inputs' statistics."""
        if not torch.isfinite(weight).all():
            raise CheckpointError(f"a weight of shape {tuple(weight.shape)} holds NaN or infinity: fetch it again")
        q = self.quantization
        inputs = weight.shape[1]
        group_size = inputs if q.group_size == -1 else q.group_size
        groups = torch.arange(inputs, dtype=torch.int32, device=weight.device) // group_size
        place = factor.order if self.order == "static" else torch.arange(inputs, device=weight.device)
        by_input = weight.t()
        work = _Pass(by_input[factor.order].float(), factor, self, group_size, groups[place])
        if self.order == "static":
            work.fix_grids(by_input)
        work.run(0, inputs)
        levels, g_idx = torch.empty_like(work.levels), torch.empty_like(groups)
        levels[factor.order], g_idx[factor.order] = work.levels, groups[place]
        in_order = torch.equal(g_idx, groups) and inputs % group_size == 0
        return pack_linear(
            levels, work.scales, work.zeros, None if in_order else g_idx, bias, q.bits, group_size, q.zero_offset
        )


class _Pass:
    """One weight on its way: rows before the current one are rounded and hold errors, those after it hold sums."""

    def __init__(self, weight: Tensor, factor: Factor, solver: Solver, group_size: int, group_of: Tensor) -> None:
        self.weight, self.upper = weight, factor.upper
        # [in, out], E of rounded inputs, sums of E R for those to come
        if factor.drift is None:
            self.carried = torch.zeros_like(weight)
        else:
            moved = factor.drift @ weight.to(factor.drift.dtype)
            self.carried = torch.linalg.solve_triangular(factor.upper, moved.float(), upper=True).contiguous()
        self.levels = torch.empty_like(weight, dtype=torch.uint8)
        self.group_of = group_of.tolist()
        self._diagonal: list[float] = factor.upper.diagonal().tolist()
        self._solver, self._size = solver, group_size
        shape = (-(-len(weight) // group_size), weight.shape[1])
        self.scales, self.zeros = weight.new_empty(shape), weight.new_empty(shape)
        self._fixed = False

    def fix_grids(self, weight: Tensor) -> None:
        """Choose every grid before anything is rounded, for groups of inputs in their natural order."""
        for group, rows in enumerate(torch.split(weight, self._size)):
            self._fix(group, rows.float())
        self._fixed = True

    def run(self, start: int, end: int) -> None:
        """Round inputs start to end; what is before start is rounded and counted in their sums."""
        if not self._fixed and start % self._size == 0 and end == min(start + self._size, len(self.weight)):
            self._fix(start // self._size, self._targets(start, end))
        if end - start == 1:
            self._round(start)
            return
        middle = start + (1 << (end - start - 1).bit_length() - 1)  # a power of two, so that groups are never cut
        self.run(start, middle)
        left, right = slice(start, middle), slice(middle, end)
        self.carried[right].addmm_(self.upper[left, right].t(), self.carried[left])
        self.run(middle, end)

    def _targets(self, start: int, end: int) -> Tensor:
        """What inputs start to end would best be, were they not to be rounded."""
        here = slice(start, end)
        block = self.upper[here, here].t()
        targets: Tensor = self.weight[here] + torch.linalg.solve_triangular(block, self.carried[here], upper=False)
        return targets

    def _fix(self, group: int, rows: Tensor) -> None:
        q = self._solver.quantization
        self.scales[group], self.zeros[group], _ = closest_grid(
            rows, self._solver.shrinks, q.bits, q.sym, q.zero_offset
        )

    def _round(self, row: int) -> None:
        group = self.group_of[row]
        grid = Grid(self.scales[group], self.zeros[group], 2**self._solver.quantization.bits - 1)
        levels = grid.levels(self.weight[row] + self.carried[row] / self._diagonal[row])
        self.levels[row] = levels
        self.carried[row] = self.weight[row] - grid.weights(levels)


def _products(x: Tensor, order: Tensor, meant: Tensor | None = None) -> Tensor:
    """The sum over rows of x xᵀ, or of x (meant - x)ᵀ: float32 [in, in], of tensors [n, in] with inputs in `order`.

    Rows that are bfloat16 stay exact when they are rounded to it again, and differences of such rows nearly do: oneDNN
    may then multiply them as such and add in float32, which is faster on CPUs with AMX.
    """
    total = torch.zeros(x.shape[1], x.shape[1], device=x.device)
    settings: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    if x.dtype is torch.bfloat16:
        settings.fp32_precision = "bf16"
    try:
        for start in range(0, len(x), ROWS_AT_ONCE):
            here = slice(start, start + ROWS_AT_ONCE)
            rows = x[here, order].float()
            others = rows if meant is None else meant[here, order].float() - rows
            total.addmm_(rows.t(), others)
    finally:
        settings.fp32_precision = before
    return total
