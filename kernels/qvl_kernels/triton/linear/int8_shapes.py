"""The published model's linears that may be rounded to 8 bits, without data: what ahead-of-time specs are made of."""

from __future__ import annotations

import torch
from torch import Tensor

from qvl_kernels.layouts.gpu import OUTPUTS, TILE_INT8, PackedInt8
from qvl_kernels.layouts.interleave import WORDS

LINEARS = {  # inputs, outputs: the head; a decoder block's deepest; the visual tower's widest
    "head": (4096, 151936),
    "down": (11008, 4096),
    "fc": (1664, 8192),
}
GROUP = 128


def example(name: str, rows: int, dtype: torch.dtype, symmetric: bool = True) -> tuple[Tensor, PackedInt8]:
    """x and the weight of a linear, on the meta device."""
    inputs, outputs = LINEARS[name]

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    padded = -(-outputs // OUTPUTS) * OUTPUTS
    weight = PackedInt8(
        words=empty(inputs // TILE_INT8, padded, WORDS, dtype=torch.int32),
        scales=empty(inputs // GROUP, padded),
        zeros=None if symmetric else empty(inputs // GROUP, padded, dtype=torch.uint8),
        order=None,
        inputs=inputs,
        outputs=outputs,
        group=GROUP,
    )
    return empty(rows, inputs), weight
