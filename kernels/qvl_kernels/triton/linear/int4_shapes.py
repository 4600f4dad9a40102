"""The published model's packed linears, without data: what ahead-of-time specs are made of."""

from __future__ import annotations

import torch
from torch import Tensor

from qvl_kernels.layouts.gpu import TILE, PackedInt4
from qvl_kernels.layouts.interleave import WORDS
from qvl_kernels.triton.linear.configs import config

DECODER = {  # inputs, outputs: the four int4 linears of each of 32 layers
    "qkv": (4096, 12288),
    "out": (4096, 4096),
    "up_gate": (4096, 22016),
    "down": (11008, 4096),
}
BIASED = ("qkv",)
GROUP = 128


def example(
    name: str, rows: int, dtype: torch.dtype, symmetric: bool = True
) -> tuple[Tensor, PackedInt4, Tensor | None]:
    """x, the weight and the bias of a linear, on the meta device."""
    inputs, outputs = DECODER[name]

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    weight = PackedInt4(
        words=empty(inputs // TILE, outputs, WORDS, dtype=torch.int32),
        scales=empty(inputs // GROUP, outputs),
        zeros=None if symmetric else empty(inputs // GROUP, outputs, dtype=torch.uint8),
        order=None,
        inputs=inputs,
        outputs=outputs,
        group=GROUP,
    )
    return empty(rows, inputs), weight, empty(outputs) if name in BIASED else None


def decode_splits(capability: int, name: str) -> int:
    """In how many partial sums a linear gives its outputs in a decode step."""
    return config(capability, "small_m", 1, *DECODER[name]).splits


def weight_bytes(weight: PackedInt4, bias: Tensor | None) -> int:
    return weight.nbytes + (0 if bias is None else bias.nbytes)
