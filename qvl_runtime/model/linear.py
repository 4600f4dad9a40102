"""Linear layers of the model, dense or packed, bound to the kernels of the device.

`weights.loader` returns packed linears; here each is bound to its kernel. A dense weight is removed from the state
before the ops prepare it, so that at most one linear is in memory twice.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from qvl_kernels.ops import Ops
from qvl_kernels.reference import BoundLinear, Packed, Precision, sum_partials
from qvl_runtime.formats.host_memory import release


class Linear(Protocol):
    """A linear layer bound to its kernel."""

    def __call__(self, x: Tensor) -> Tensor:
        """Map x [.., in] to [.., out], in x's dtype."""
        ...

    def forward_partial_sums(self, x: Tensor) -> Tensor:
        """Map x [n, in] to [n, out], or to float32 partial sums [S, n, out] that the next op adds up as it reads."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class ConcatLinear:
    """Two linears of the same input with concatenated outputs, for linears that cannot be merged."""

    ops: Ops
    first: Linear
    second: Linear

    def __call__(self, x: Tensor) -> Tensor:
        """Map x [.., in] to [.., out of both], in x's dtype."""
        return self.ops.concat_outputs(self.first(x), self.second(x))

    def forward_partial_sums(self, x: Tensor) -> Tensor:
        """Map x [n, in] to [n, out of both]; there are no partial sums to defer."""
        return self(x)


class Ranks(Protocol):
    """The processes that a model's linears are split among."""

    def gather(self, x: Tensor) -> Tensor:
        """Return x [n, out] of every rank, [ranks, n, out] in order; all ranks call it together."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class SummedLinear:
    """A linear whose inputs are split among ranks: the sum of what each computes of its own, on every rank.

    Summands are added as float32 in the order of the ranks, so that a row's sum does not depend on the other rows.
    """

    share: Linear
    ranks: Ranks

    def __call__(self, x: Tensor) -> Tensor:
        """Map this rank's inputs x [n, in] to [n, out], in x's dtype."""
        return self.forward_partial_sums(x)

    def forward_partial_sums(self, x: Tensor) -> Tensor:
        """Map this rank's inputs x [n, in] to [n, out], in x's dtype; there are no partial sums to defer."""
        own = sum_partials(self.share.forward_partial_sums(x), torch.float32).float()
        total, *others = self.ranks.gather(own)
        for other in others:
            total += other
        rounded: Tensor = total.to(x.dtype)
        return rounded


@dataclass(frozen=True, slots=True, eq=False)
class LinearBuilder:
    """Binds the linears of a model to their kernels, and records what it bound."""

    ops: Ops
    state: MutableMapping[str, Tensor]  # dense weights by published name; the builder empties it
    precision: Precision
    packed: Mapping[str, Packed] = field(default_factory=dict)  # by the model's name
    bound: dict[str, BoundLinear] = field(default_factory=dict)  # what was built, by the model's name
    ranks: Ranks | None = None  # the weights are one rank's share

    def dense(self, name: str) -> Linear:
        """Build the linear `name`, which is dense in a published checkpoint."""
        if name in self.packed:
            return self._packed(name)
        return self.of_tensors(name, self.state.pop(f"{name}.weight"), self.state.pop(f"{name}.bias", None))

    def of_tensors(self, name: str, weight: Tensor, bias: Tensor | None = None) -> Linear:
        """Build a linear of weight [out, in] and bias [out], or the packed `name` of a converted checkpoint."""
        if name in self.packed:
            return self._packed(name)
        self.bound[name] = self.ops.prepare_linear(weight, bias, self.precision)
        if self.precision == "fast":
            release(weight)  # at full size 5 GB of a published checkpoint's pages, which are not needed any more
        return self.bound[name]

    def decoder(self, name: str) -> Linear:
        """Build a linear of a decoder block, packed or dense.

        Dense ones stay dense with precision "fast": use the Int4 checkpoint for a smaller decoder.
        """
        if name in self.packed:
            return self._packed(name)
        weight, bias = self.state.pop(f"{name}.weight"), self.state.pop(f"{name}.bias", None)
        self.bound[name] = self.ops.prepare_linear(weight, bias, "exact")
        return self.bound[name]

    def summed(self, name: str) -> Linear:
        """Build a linear of a decoder block whose inputs are split where a model is."""
        linear = self.decoder(name)
        return linear if self.ranks is None else SummedLinear(linear, self.ranks)

    def merged(self, name: str, parts: Sequence[str]) -> Linear:
        """Build two linears of a decoder block with the same input, as one if the loader merged them as `name`."""
        if name in self.packed or f"{name}.weight" in self.state:
            return self.decoder(name)
        first, second = (self.decoder(part) for part in parts)
        return ConcatLinear(self.ops, first, second)

    def _packed(self, name: str) -> Linear:
        self.bound[name] = self.ops.bind(self.packed[name], self.precision)
        return self.bound[name]
