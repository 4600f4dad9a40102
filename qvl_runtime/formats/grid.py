"""The grid that a group of weights is rounded to: for each output channel a float16 scale and an integer zero point."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class Grid(NamedTuple):
    """Weights are scales * (code - zeros), for integer codes from 0 to `max_code`; both tensors have the same shape."""

    scales: Tensor  # float32, of float16 values: rounded before they are used
    zeros: Tensor  # float32, of integer values
    max_code: int  # 2^bits - 1

    def quantize(self, weights: Tensor, out: Tensor | None = None) -> Tensor:
        """Return the nearest code of each weight, float32, in `out` if passed; grid and weights broadcast."""
        import torch

        return torch.div(weights, self.scales, out=out).round_().add_(self.zeros).clamp_(0, self.max_code)

    def dequantize(self, codes: Tensor) -> Tensor:
        """Return the weights of codes, float32."""
        return self.scales * (codes - self.zeros)


def grid_between(low: Tensor, high: Tensor, bits: int, sym: bool, zero_offset: int) -> Grid:
    """Return the grid for groups whose weights run from `low` to `high`, float32 of any one shape.

    Symmetric: the zero point is the middle of the range; otherwise it is the code nearest to zero. With a zero offset
    of 1, zero points are stored minus one and 0 cannot be stored, so the range extends at least one step below zero.
    """
    import torch

    max_code = 2**bits - 1
    high = torch.maximum(high, -low) if sym else high.clamp(min=0)
    low = -high if sym else low.clamp(max=0)
    if zero_offset:
        low = torch.minimum(low, -high / (max_code - 1))
    scales = ((high - low) / max_code).to(torch.float16).float()
    scales = torch.where(scales == 0, 1.0, scales)  # a group of zeros, or one below float16's range
    if sym:
        return Grid(scales, torch.full_like(scales, (max_code + 1) // 2), max_code)
    return Grid(scales, (-low / scales).round().clamp(zero_offset, max_code), max_code)


def closest_grid(rows: Tensor, shrinks: Sequence[float], bits: int, sym: bool, zero_offset: int) -> Grid:
    """For each column, choose the grid with the least squared error among ranges shrunk by each factor.

    rows: float32 [n, ...], one group's weights. With a smaller range, weights outside it are off by more and all others
    by less: groups of 128 normal weights lose least at about 0.9 of their range.
    """
    import torch

    low, high = rows.amin(dim=0), rows.amax(dim=0)
    best, least_error = grid_between(low, high, bits, sym, zero_offset), torch.full_like(low, torch.inf)
    for shrink in shrinks:
        grid = grid_between(shrink * low, shrink * high, bits, sym, zero_offset)
        error = (rows - grid.dequantize(grid.quantize(rows))).square_().sum(dim=0)
        closer = error < least_error
        scales, zeros = torch.where(closer, grid.scales, best.scales), torch.where(closer, grid.zeros, best.zeros)
        best, least_error = Grid(scales, zeros, grid.max_code), torch.where(closer, error, least_error)
    return best
