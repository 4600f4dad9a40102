"""LoRA adapters in the forward pass: side paths of the decoder's linears, each for the tokens of its own requests.

A step may mix requests with different adapters and with none. The linears run once for all tokens; then each adapter
adds scale * B(A(x)) to its rows. The ops' own linear computes it, whose rows do not depend on one another, so an answer
is the same whatever else is in the step. Packed and merged weights stay as they are: of w1 and w2, merged in one
linear, the first half of the outputs is w1's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from qvl_kernels.ops import Ops
from qvl_runtime.config.model import ModelConfig
from qvl_runtime.errors import ConfigError, quoted
from qvl_runtime.formats.adapter import Adapter

_DECODER = "transformer.h."
_MERGED = {"mlp.w1": "mlp.up_gate", "mlp.w2": "mlp.up_gate"}


class SidePath(NamedTuple):
    """The update of some outputs of a linear."""

    a: Tensor  # [r, in]
    b: Tensor  # [outputs, r], times the scale
    first: int  # output that it starts at


class AdapterRows(NamedTuple):
    """The tokens of a step that use one adapter."""

    adapter: int  # its index
    rows: Tensor  # int64 [m]


@dataclass(frozen=True, slots=True, eq=False)
class LayerAdapters:
    """The side paths of one decoder block in one step."""

    ops: Ops
    layer: int
    sides: Sequence[Mapping[tuple[int, str], list[SidePath]]]  # of each adapter, by layer and linear
    rows: Sequence[AdapterRows]

    def add(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        """y [n, out], or its partial sums, of the linear `name` for x [n, in], with the updates of this step's rows."""
        y = self.ops.sum_partials(y, x.dtype)
        for index, rows in self.rows:
            paths = self.sides[index].get((self.layer, name), ())
            part = x.index_select(0, rows) if paths else x
            for a, b, first in paths:
                update = self.ops.linear(self.ops.linear(part, a), b)
                y[:, first : first + len(b)].index_add_(0, rows, update)
        return y


class Adapters:
    """The adapters of an engine, on its device and in its dtype."""

    def __init__(
        self, adapters: Mapping[str, Adapter], config: ModelConfig, ops: Ops, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Raises `ConfigError` for an adapter that changes more than linears of the decoder."""
        self.names = tuple(adapters)
        self._ops = ops
        self._sides = [_sides_of(name, own, config, dtype, device) for name, own in adapters.items()]

    def __len__(self) -> int:
        return len(self.names)

    @property
    def nbytes(self) -> int:
        """Bytes of all side paths."""
        paths = [path for sides in self._sides for each in sides.values() for path in each]
        return sum(path.a.nbytes + path.b.nbytes for path in paths)

    def index(self, name: str) -> int:
        """The index of an adapter by its name."""
        return self.names.index(name)

    def of_layer(self, layer: int, rows: Sequence[AdapterRows]) -> LayerAdapters:
        """What block `layer` adds in a step whose adapters have these rows."""
        return LayerAdapters(self._ops, layer, self._sides, rows)


def _sides_of(
    name: str, adapter: Adapter, config: ModelConfig, dtype: torch.dtype, device: torch.device
) -> dict[tuple[int, str], list[SidePath]]:
    outside = [*adapter.saved, *(module for module in adapter.sides if not module.startswith(_DECODER))]
    if outside:
        raise ConfigError(
            f"the adapter {quoted(name)} changes {', '.join(outside[:3])}, which all requests of an engine share: "
            "merge it into its base with `qvl merge`, and load the result"
        )
    sides: dict[tuple[int, str], list[SidePath]] = {}
    for module, (a, b) in adapter.sides.items():
        layer, _, linear = module.removeprefix(_DECODER).partition(".")
        first = config.ffn_width if linear == "mlp.w2" else 0
        scaled = b.to(device, torch.float32) * adapter.config.scale
        path = SidePath(a.to(device, dtype).contiguous(), scaled.to(dtype).contiguous(), first)
        sides.setdefault((int(layer), _MERGED.get(linear, linear)), []).append(path)
    return sides
