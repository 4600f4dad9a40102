"""The grid that a group of weights is rounded to: for each output channel a float16 scale and a whole zero point."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class Grid(NamedTuple):
    """Weights are scales * (level - zeros), for whole levels from 0 to `top`; any shape, the same for both tensors."""

    scales: Tensor  # float32, of float16 values: rounded before they are used
    zeros: Tensor  # float32, whole numbers
    top: int  # the highest level, 2^bits - 1

    def levels(self, weights: Tensor, out: Tensor | None = None) -> Tensor:
        """The nearest level of each weight, float32, in `out` if it is given; grids and weights broadcast."""
        import torch

        return torch.div(weights, self.scales, out=out).round_().add_(self.zeros).clamp_(0, self.top)

    def weights(self, levels: Tensor) -> Tensor:
        """What the levels stand for, float32."""
        return self.scales * (levels - self.zeros)


def grid_between(low: Tensor, high: Tensor, bits: int, sym: bool, zero_offset: int) -> Grid:
    """The grid for groups whose weights run from `low` to `high`, float32 of any one shape.

    Symmetric: the zero point is the middle of the range; otherwise it is where zero falls. With a zero offset of 1 zero
    points are stored minus one and 0 cannot be said, so that there the range reaches a step below zero.
    """
    import torch

    top = 2**bits - 1
    high = torch.maximum(high, -low) if sym else high.clamp(min=0)
    low = -high if sym else low.clamp(max=0)
    if zero_offset:
        low = torch.minimum(low, -high / (top - 1))
    scales = ((high - low) / top).to(torch.float16).float()
    scales = torch.where(scales == 0, 1.0, scales)  # a group of zeros, or one below float16's range
    if sym:
        return Grid(scales, torch.full_like(scales, (top + 1) // 2), top)
    return Grid(scales, (-low / scales).round().clamp(zero_offset, top), top)


def closest_grid(rows: Tensor, shrinks: Sequence[float], bits: int, sym: bool, zero_offset: int) -> Grid:
    """Of the grids for the range of `rows`, float32 [n, ...], shrunk by each factor, that with the least squared error.

    Chosen for each column. What a smaller range leaves outside is off by more, and all the rest by less: groups of 128
    normal weights lose least at some 0.9 of their range.
    """
    import torch

    low, high = rows.amin(dim=0), rows.amax(dim=0)
    best, least = grid_between(low, high, bits, sym, zero_offset), torch.full_like(low, torch.inf)
    for shrink in shrinks:
        grid = grid_between(shrink * low, shrink * high, bits, sym, zero_offset)
        error = (rows - grid.weights(grid.levels(rows))).square_().sum(dim=0)
        closer = error < least
        scales, zeros = torch.where(closer, grid.scales, best.scales), torch.where(closer, grid.zeros, best.zeros)
        best, least = Grid(scales, zeros, grid.top), torch.where(closer, error, least)
    return best
