"""The published model's linears without data, as int4 or int8: the inputs of the ahead-of-time specs."""

from __future__ import annotations

import torch
from torch import Tensor

from qvl_kernels.layouts.gpu import KINDS, OUTPUTS, PackedInt4, PackedInt8
from qvl_kernels.layouts.interleave import WORDS
from qvl_kernels.triton.linear.configs import config
from qvl_kernels.util import cdiv

SHAPES = {  # inputs, outputs
    "qkv": (4096, 12288),
    "out": (4096, 4096),
    "up_gate": (4096, 22016),
    "down": (11008, 4096),
    "head": (4096, 151936),
    "fc": (1664, 8192),  # the vision encoder's widest
}
DECODER = ("qkv", "out", "up_gate", "down")  # the packed linears of each of 32 layers
BIASED = ("qkv",)
GROUP = 128


def example(
    bits: int, name: str, rows: int, dtype: torch.dtype, symmetric: bool = True
) -> tuple[Tensor, PackedInt4 | PackedInt8, Tensor | None]:
    """x, the weight of 4 or 8 bits and the bias of a linear, on the meta device."""
    inputs, outputs = SHAPES[name]

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    kind, padded, groups = KINDS[bits], cdiv(outputs, OUTPUTS) * OUTPUTS, inputs // GROUP
    weight = kind(
        words=empty(inputs // kind.TILE, padded, WORDS, dtype=torch.int32),
        scales=empty(groups, padded),
        zeros=None if symmetric else empty(groups, padded, dtype=torch.uint8),
        perm=None,
        inputs=inputs,
        outputs=outputs,
        group=GROUP,
    )
    return empty(rows, inputs), weight, empty(outputs) if name in BIASED else None


def decode_splits(capability: int, name: str) -> int:
    """The number of split-K partial sums that an int4 linear returns in a decode step."""
    return config(capability, "small_m", 1, *SHAPES[name]).splits


def weight_bytes(weight: PackedInt4 | PackedInt8, bias: Tensor | None) -> int:
    """Bytes of a packed weight and its bias."""
    return weight.nbytes + (0 if bias is None else bias.nbytes)
