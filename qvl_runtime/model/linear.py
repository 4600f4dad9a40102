"""A linear layer, dense or packed: what the model calls, whatever the checkpoint holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Protocol

from torch import Tensor

from qvl_runtime.config import QuantizationConfig
from qvl_runtime.weights.gptq import GPTQLinear


class Linear(Protocol):
    def __call__(self, x: Tensor) -> Tensor:
        """x [.., in] to [.., out], in x's dtype."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Dense:
    ops: ModuleType
    weight: Tensor  # [out, in]
    bias: Tensor | None = None  # [out]

    def __call__(self, x: Tensor) -> Tensor:
        result: Tensor = self.ops.linear(x, self.weight, self.bias)
        return result


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """A GPTQ linear that stays packed in memory."""

    ops: ModuleType
    gptq: GPTQLinear

    def __call__(self, x: Tensor) -> Tensor:
        w = self.gptq
        result: Tensor = self.ops.gptq_linear(x, w.qweight, w.qzeros, w.scales, w.g_idx, w.bits, w.zero_offset, w.bias)
        return result


def dense(ops: ModuleType, state: Mapping[str, Tensor], name: str) -> Dense:
    return Dense(ops, state[f"{name}.weight"], state.get(f"{name}.bias"))


def decoder_linear(
    ops: ModuleType, state: Mapping[str, Tensor], name: str, quantization: QuantizationConfig | None
) -> Linear:
    """One of the five linears of a decoder block, which are those that a checkpoint may hold packed."""
    if quantization is None:
        return dense(ops, state, name)
    return Packed(ops, GPTQLinear.from_state(state, name, quantization))
