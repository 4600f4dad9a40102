"""A frozen linear of packed words in the trainable network: dequantized by tile, forward and backward, nothing saved.

Forward: for each tile of outputs, y[:, tile] = x[:, perm] W[tile]^T. Backward: dx[:, perm] = sum of dy[:, tile] W[tile]
over the tiles. There is no gradient of the words, so x is not kept; a tile lives for one product.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from qvl_kernels.reference import Packed
from qvl_runtime.finetune.functions import wide
from qvl_runtime.finetune.linears import Adaptable
from qvl_runtime.finetune.packed_tiles import Tiles, tiles_of

TILE_OUTPUTS = 4096  # 32 MiB in 16 bits at 4096 inputs


class PackedProduct(torch.autograd.Function):
    """x times a packed weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tiles: Tiles, outputs_at_once: int) -> Tensor:
        """x [n, in] to [n, out], in x's dtype."""
        ctx.tiles, ctx.outputs_at_once = tiles, outputs_at_once
        if tiles.perm is not None:
            x = x.index_select(1, tiles.perm)
        y = x.new_empty(len(x), tiles.outputs)
        for first in range(0, tiles.outputs, outputs_at_once):
            weight = tiles.tile(first, outputs_at_once, x.dtype)
            y[:, first : first + len(weight)] = x @ weight.t()
        return y if tiles.bias is None else y + tiles.bias.to(y.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """The gradient with respect to x; sums over tiles are in float32."""
        tiles: Tiles = ctx.tiles
        total = grad.new_zeros(len(grad), tiles.inputs, dtype=wide(grad.dtype))
        for first in range(0, tiles.outputs, ctx.outputs_at_once):
            weight = tiles.tile(first, ctx.outputs_at_once, grad.dtype)
            total += grad[:, first : first + len(weight)] @ weight
        if tiles.perm is not None:
            total = torch.empty_like(total).index_copy_(1, tiles.perm.long(), total)
        return total.to(grad.dtype), None, None


class PackedLinear(Adaptable):
    """A frozen packed linear. Its words are no parameters: they are neither trained, nor sharded, nor saved."""

    def __init__(self, packed: Packed, outputs_at_once: int = TILE_OUTPUTS) -> None:
        self.packed, self.tiles = packed, tiles_of(packed)
        super().__init__(self.tiles.inputs, self.tiles.outputs)
        step = self.tiles.step
        self.outputs_at_once = max(step, outputs_at_once // step * step)

    def forward(self, x: Tensor) -> Tensor:
        """x [.., in] to [.., out], in x's dtype."""
        flat = x.reshape(-1, self.in_features)
        y = cast("Tensor", PackedProduct.apply(flat, self.tiles, self.outputs_at_once))  # type: ignore[no-untyped-call]
        return self.add(x, y.view(*x.shape[:-1], self.out_features))
