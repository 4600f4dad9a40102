"""A linear layer, dense or packed: what the model calls, whatever the checkpoint holds.

The ops module lays weights out as its kernels want them. Each is taken out of the state first, so that the tensor that
was loaded can go when it is prepared: memory never holds both for more than one linear.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass
from types import ModuleType
from typing import Protocol

from torch import Tensor

from qvl_kernels.reference import Bound, Precision
from qvl_runtime.config import QuantizationConfig
from qvl_runtime.weights.gptq import GPTQLinear


class Linear(Protocol):
    def __call__(self, x: Tensor) -> Tensor:
        """x [.., in] to [.., out], in x's dtype."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Maker:
    """Makes the linears of a model from its state, which it empties, and knows what it made."""

    ops: ModuleType
    state: MutableMapping[str, Tensor]
    precision: Precision
    made: dict[str, Bound]  # by published name

    def bind(self, name: str, weight: Tensor, bias: Tensor | None = None) -> Linear:
        """A dense linear, said to be `name`, of tensors at hand."""
        self.made[name] = self.ops.prepare_linear(weight, bias, self.precision)
        return self.made[name]

    def dense(self, name: str) -> Linear:
        return self.bind(name, self.state.pop(f"{name}.weight"), self.state.pop(f"{name}.bias", None))

    def decoder(self, name: str, quantization: QuantizationConfig | None) -> Linear:
        """One of the five linears of a decoder block, which are those that a checkpoint may hold packed.

        Dense ones stay so in fast mode too: who wants a smaller decoder has the Int4 checkpoint.
        """
        if quantization is None:
            weight, bias = self.state.pop(f"{name}.weight"), self.state.pop(f"{name}.bias", None)
            self.made[name] = self.ops.prepare_linear(weight, bias, "exact")
            return self.made[name]
        w = GPTQLinear.from_state(self.state, name, quantization)
        for part in ("qweight", "qzeros", "scales", "g_idx", "bias"):
            self.state.pop(f"{name}.{part}", None)
        self.made[name] = self.ops.prepare_gptq(
            w.qweight, w.qzeros, w.scales, w.g_idx, w.bits, w.zero_offset, w.bias, self.precision
        )
        return self.made[name]
