"""Packed int4 and int8 weights as dense tiles of outputs, whatever the layout of the device's kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from qvl_kernels.layouts.gpu import PackedInt4, PackedInt8, kind_of
from qvl_kernels.reference import Packed, gptq_dequantize
from qvl_kernels.util import cdiv


class Tiles(Protocol):
    """A frozen weight [outputs, inputs] that is dequantized some outputs at a time."""

    @property
    def inputs(self) -> int:
        """Number of inputs."""
        ...

    @property
    def outputs(self) -> int:
        """Number of outputs."""
        ...

    @property
    def step(self) -> int:
        """A tile starts at a multiple of it."""
        ...

    @property
    def bias(self) -> Tensor | None:
        """[outputs]."""
        ...

    @property
    def perm(self) -> Tensor | None:
        """int32 [inputs], the input at each position of a tile; None: in order."""
        ...

    def tile(self, first: int, count: int, dtype: torch.dtype) -> Tensor:
        """Outputs `first` to `first + count`, [count, inputs], each weight rounded once to `dtype`."""
        ...


def tiles_of(packed: Packed) -> Tiles:
    """The tiles of a packed linear. Raises `ValueError` for a layout that nothing here reads."""
    if packed.layout == "gptq":
        return PublishedTiles.of(packed)
    if packed.layout.startswith("cpu-"):
        return CpuTiles.of(packed)
    return GpuTiles.of(packed)


@dataclass(frozen=True, slots=True, eq=False)
class PublishedTiles:
    """As published: plain torch, on any device."""

    packed: Packed
    inputs: int
    outputs: int
    bias: Tensor | None
    step: int = 32
    perm: Tensor | None = None

    @classmethod
    def of(cls, packed: Packed) -> PublishedTiles:
        """Wrap a linear of the layout "gptq"."""
        words, bits = packed.tensors["qweight"], packed.fields["bits"]
        return cls(packed, words.shape[0] * (32 // bits), words.shape[1], packed.tensors.get("bias"))

    def tile(self, first: int, count: int, dtype: torch.dtype) -> Tensor:
        """`Tiles.tile`."""
        tensors, bits = self.packed.tensors, self.packed.fields["bits"]
        end, per_word = min(first + count, self.outputs), 32 // bits
        if tensors["qweight"].is_meta:  # memory is planned: what a kernel allocates
            return torch.empty(end - first, self.inputs, dtype=dtype, device="meta")
        weight = gptq_dequantize(
            tensors["qweight"][:, first:end],
            tensors["qzeros"][:, first // per_word : cdiv(end, per_word)],
            tensors["scales"][:, first:end],
            tensors.get("g_idx"),
            bits,
            self.packed.fields["zero_offset"],
        )
        return weight.to(dtype)


@dataclass(frozen=True, slots=True, eq=False)
class CpuTiles:
    """In the layout of the CPU kernels, by their own routine."""

    weight: object  # qvl_kernels.cpu.linears.PackedWeight
    inputs: int
    outputs: int
    bias: Tensor | None
    step: int = 16
    perm: Tensor | None = None  # the routine puts the inputs in order

    @classmethod
    def of(cls, packed: Packed) -> CpuTiles:
        """Wrap a linear of the layout "cpu-1"."""
        from qvl_kernels.cpu.linears import PackedWeight

        weight = PackedWeight.from_packed(packed)
        return cls(weight, weight.inputs, weight.outputs, weight.bias)

    def tile(self, first: int, count: int, dtype: torch.dtype) -> Tensor:
        """`Tiles.tile`."""
        from qvl_kernels.cpu.linears import PackedWeight

        weight = self.weight
        if not isinstance(weight, PackedWeight):
            raise TypeError(f"the weight is of type {type(weight).__name__}; expected PackedWeight")
        end = min(first + count, self.outputs)
        padded = cdiv(end - first, self.step) * self.step
        columns = weight.unpacked(first, padded, torch.float32 if dtype == torch.float64 else dtype)
        return columns.t()[: end - first].to(dtype)


@dataclass(frozen=True, slots=True, eq=False)
class GpuTiles:
    """In the layout of the GPU kernels, by the kernel that dequantizes for long prompts."""

    weight: PackedInt4 | PackedInt8
    inputs: int
    outputs: int
    bias: Tensor | None
    perm: Tensor | None
    step: int = 128

    @classmethod
    def of(cls, packed: Packed) -> GpuTiles:
        """Wrap a linear of a GPU layout; raises `ValueError` for another."""
        weight = kind_of(packed).from_packed(packed)
        return cls(weight, weight.inputs, weight.outputs, packed.tensors.get("bias"), weight.perm)

    def tile(self, first: int, count: int, dtype: torch.dtype) -> Tensor:
        """`Tiles.tile`."""
        from qvl_kernels.triton.linear.dequantize import dequantize

        computed = torch.float32 if dtype == torch.float64 else dtype
        return dequantize(self.weight, computed, first, count).to(dtype)
