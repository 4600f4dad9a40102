"""A linear layer, dense or packed: what the model calls, whatever the checkpoint holds.

The ops module lays weights out as its kernels want them. Each is taken out of the state first, so that the tensor that
was loaded can go when it is prepared: memory never holds both for more than one linear.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor

from qvl_kernels.reference import Bound, Packed, Precision
from qvl_runtime.config.model import QuantizationConfig
from qvl_runtime.formats.gptq import GPTQLinear
from qvl_runtime.formats.host_memory import release_source


class Linear(Protocol):
    def __call__(self, x: Tensor) -> Tensor:
        """x [.., in] to [.., out], in x's dtype."""
        ...

    def partial(self, x: Tensor) -> Tensor:
        """x [n, in] to [n, out], or to float32 partial sums [S, n, out] for an op that adds them as it reads."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class SideBySide:
    """Two linears of the same input whose outputs lie side by side."""

    ops: ModuleType
    first: Linear
    second: Linear

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = self.ops.side_by_side(self.first(x), self.second(x))
        return y

    def partial(self, x: Tensor) -> Tensor:
        return self(x)


@dataclass(frozen=True, slots=True, eq=False)
class Maker:
    """Makes the linears of a model from its state, which it empties, and knows what it made."""

    ops: ModuleType
    state: MutableMapping[str, Tensor]
    precision: Precision
    made: dict[str, Bound]  # by published name
    laid_out: Mapping[str, Packed] = field(default_factory=dict)  # of a converted checkpoint: these need no making

    def bind(self, name: str, weight: Tensor, bias: Tensor | None = None) -> Linear:
        """A dense linear, said to be `name`, of tensors at hand."""
        if name in self.laid_out:
            return self._as_it_lies(name)
        self.made[name] = self.ops.prepare_linear(weight, bias, self.precision)
        if self.precision == "fast":
            release_source(weight)  # at full size 5 GB of a published checkpoint's pages, which nobody reads again
        return self.made[name]

    def dense(self, name: str) -> Linear:
        if name in self.laid_out:
            return self._as_it_lies(name)
        return self.bind(name, self.state.pop(f"{name}.weight"), self.state.pop(f"{name}.bias", None))

    def decoder(self, name: str, quantization: QuantizationConfig | None) -> Linear:
        """One of the linears of a decoder block, which are those that a checkpoint may hold packed.

        Dense ones stay so in fast mode too: who wants a smaller decoder has the Int4 checkpoint.
        """
        if name in self.laid_out:
            return self._as_it_lies(name)
        if quantization is None:
            weight, bias = self.state.pop(f"{name}.weight"), self.state.pop(f"{name}.bias", None)
            self.made[name] = self.ops.prepare_linear(weight, bias, "exact")
            return self.made[name]
        return self._packed(name, self._gptq(name, quantization))

    def side_by_side(self, name: str, parts: Sequence[str], quantization: QuantizationConfig | None) -> Linear:
        """Two linears of a decoder block that have the same input, as one called `name` where that is free.

        Dense weights on a CPU stay apart: they are pages of the mapped file, which a joint copy would make resident. So
        do packed ones that order their inputs differently, which a quantizer gives that takes one after the other.
        """
        first, second = parts
        if name in self.laid_out:
            return self._as_it_lies(name)
        if first in self.laid_out:
            return SideBySide(self.ops, self._as_it_lies(first), self._as_it_lies(second))
        if quantization is None:
            if self.state[f"{first}.weight"].device.type == "cpu":
                return SideBySide(self.ops, self.decoder(first, None), self.decoder(second, None))
            for kind in ("weight", "bias"):
                both = [self.state.pop(f"{part}.{kind}", None) for part in parts]
                found = [tensor for tensor in both if tensor is not None]
                if found:
                    self.state[f"{name}.{kind}"] = torch.cat(found)
            return self.decoder(name, None)
        one, other = (self._gptq(part, quantization) for part in parts)
        joint = one.beside(other)
        if joint is None:
            return SideBySide(self.ops, self._packed(first, one), self._packed(second, other))
        return self._packed(name, joint)

    def _as_it_lies(self, name: str) -> Linear:
        self.made[name] = self.ops.bind(self.laid_out[name], self.precision)
        return self.made[name]

    def _gptq(self, name: str, quantization: QuantizationConfig) -> GPTQLinear:
        w = GPTQLinear.from_state(self.state, name, quantization)
        for part in ("qweight", "qzeros", "scales", "g_idx", "bias"):
            self.state.pop(f"{name}.{part}", None)
        return w

    def _packed(self, name: str, w: GPTQLinear) -> Linear:
        self.made[name] = self.ops.prepare_gptq(
            w.qweight, w.qzeros, w.scales, w.g_idx, w.bits, w.zero_offset, w.bias, self.precision
        )
        return self.made[name]
