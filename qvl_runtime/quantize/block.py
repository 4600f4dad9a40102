"""One decoder block, quantized in one forward pass over all calibration rows.

The block is the model's own. Its linears come from a maker whose linears quantize themselves when they are called: each
gathers the statistics of the inputs it is given, rounds its weight, and answers with the rounded one. So what comes
later in the block is calibrated on what is quantized before it ("true sequential"), w1 and w2 share their statistics,
and the block's output is what the next block will really get. Where rounding is to make up for what earlier rounding
did, a pass of the float block over the float model's rows comes first, and keeps what its linears are given.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from types import ModuleType
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from qvl_kernels.reference import gptq_dequantize
from qvl_runtime.config.model import ModelConfig
from qvl_runtime.formats.gptq import OUTPUTS_AT_ONCE, GPTQLinear, quantize_rtn
from qvl_runtime.model.cache_layout import BLOCK_SIZE
from qvl_runtime.model.language import LayerCache, Layout, Observer, make_block, unobserved
from qvl_runtime.model.linear import ConcatLinear, Linear, LinearBuilder
from qvl_runtime.model.rotary import Positions, inverse_frequencies, ntk_alpha, positions_of
from qvl_runtime.quantize.solver import Factor, Solver

Method = Literal["gptq", "rtn"]
INPUTS = {
    "attn.c_attn": "ln_1",
    "attn.c_proj": "attn_context",
    "mlp.w1": "ln_2",
    "mlp.w2": "ln_2",
    "mlp.c_proj": "gated",
}  # of each linear, by the name that the block has for them
MEASURED_ROWS = 512  # held-out rows that errors are measured on: more change the third digit


class LinearError(NamedTuple):
    """What quantizing a linear does to its outputs, on conversations that it was not calibrated on.

    Errors are |x (W - Ŵ)ᵀ| / |x Wᵀ| over up to `MEASURED_ROWS` rows.
    """

    layer: int
    linear: str  # "attn.c_attn"
    error: float
    rtn_error: float  # the same for rounding to nearest
    damping: float  # share of the mean diagonal; 0 for round to nearest
    seconds: float


class Rows(NamedTuple):
    """Where the calibration rows of all conversations stand, those held out last: one model call."""

    at: Positions
    layout: Layout
    cache_blocks: int
    fitted: int  # rows that statistics are gathered on; those after it are held out

    @classmethod
    def of(cls, config: ModelConfig, lengths: Sequence[int], held_out: int, device: torch.device) -> Rows:
        """Rows of conversations of these lengths, the last `held_out` of which are only measured."""
        starts = list(accumulate(lengths, initial=0))
        blocks = [-(-length // BLOCK_SIZE) for length in lengths]
        firsts = list(accumulate(blocks, initial=0))
        tables = torch.zeros(len(lengths), max(blocks), dtype=torch.int64, device=device)
        for r, count in enumerate(blocks):
            tables[r, :count] = torch.arange(firsts[r], firsts[r] + count)
        positions = torch.cat([torch.arange(length) for length in lengths]).to(device)
        slots = torch.cat([torch.arange(n) + f * BLOCK_SIZE for n, f in zip(lengths, firsts, strict=False)]).to(device)
        tables_of = [_frequencies(config, length).expand(length, -1) for length in lengths]
        at = positions_of(config, positions, torch.cat(tables_of).to(device))
        return cls(at, Layout(slots, tables, starts, list(lengths)), firsts[-1], starts[len(lengths) - held_out])


@dataclass(slots=True, eq=False)
class Bench:
    """Where the linears of one block are quantized: its float weights, how it is done, and what has been."""

    layer: int
    state: MutableMapping[str, Tensor]
    method: Method
    solver: Solver
    fitted: int
    progress: Callable[[int], None]  # hears how many linears of this block are done
    packed: dict[str, Tensor] = field(default_factory=dict)  # the published tensors
    errors: list[LinearError] = field(default_factory=list)
    meant: dict[str, Tensor] = field(default_factory=dict)  # inputs in the float model, by the names of `INPUTS`
    _factor: tuple[Tensor, Factor] | None = None  # of the inputs that were seen last

    def quantize(self, name: str, x: Tensor) -> Tensor:
        """Quantize linear `name` on its inputs x [n, in]; its outputs [n, out] with the rounded weight."""
        began, part = time.perf_counter(), name.split(".", 3)[3]
        weight = self.state.pop(f"{name}.weight").to(x.device)
        bias = self.state.pop(f"{name}.bias", None)
        q = self.solver.quantization
        if self.method == "rtn":
            chosen = quantize_rtn(weight, q.bits, q.group_size, q.sym, bias=bias, zero_offset=q.zero_offset)
            damping = 0.0
        else:
            factor = self._factor_of(x, INPUTS[part])
            chosen, damping = self.solver.solve(weight, factor, bias), factor.damping
        rounded, error, rtn_error = self._compare(weight, chosen, x)
        outputs = torch.nn.functional.linear(x, rounded, None if bias is None else bias.to(x))
        self.packed |= {key: tensor.cpu() for key, tensor in chosen.tensors(name).items()}
        seconds = time.perf_counter() - began
        self.errors.append(LinearError(self.layer, part, error, rtn_error, damping, seconds))
        self.progress(len(self.errors))
        return outputs

    def _compare(self, weight: Tensor, chosen: GPTQLinear, x: Tensor) -> tuple[Tensor, float, float]:
        """The rounded weight [out, in] in x's dtype; its error, and that of rounding to nearest, on held-out rows.

        Some outputs at a time: as many floats as the weight has, five times over, would be 1 GB at full size.
        """
        q = self.solver.quantization
        measured = x[self.fitted :][:: -(-(len(x) - self.fitted) // MEASURED_ROWS)].float()
        rounded = torch.empty(weight.shape, dtype=x.dtype, device=x.device)
        exact, *errors = (measured.new_empty(len(measured), len(weight)) for _ in range(3))
        for first in range(0, len(weight), OUTPUTS_AT_ONCE):
            end = min(first + OUTPUTS_AT_ONCE, len(weight))
            floats, ours = weight[first:end].float(), _dequantized(chosen.outputs(first, end))
            nearest = quantize_rtn(weight[first:end], q.bits, q.group_size, q.sym, zero_offset=q.zero_offset)
            rounded[first:end] = ours
            torch.mm(measured, floats.t(), out=exact[:, first:end])
            for off, other in zip(errors, (ours, _dequantized(nearest)), strict=True):
                torch.mm(measured, (floats - other).t(), out=off[:, first:end])
        size = exact.norm().clamp(min=torch.finfo(torch.float32).tiny)
        error, rtn_error = (float(off.norm() / size) for off in errors)
        return rounded, error, rtn_error

    def keep(self, name: str, value: Tensor) -> None:
        """Observe a float block: what its linears are given."""
        if name in INPUTS.values():
            self.meant[name] = value[: self.fitted]

    def _factor_of(self, x: Tensor, inputs: str) -> Factor:
        """Of the same inputs, as of w1 and w2, once."""
        if self._factor is None or self._factor[0] is not x:
            self._factor = None  # gone before the next is made: one of the 9.6 B model takes 0.5 GB
            self._factor = (x, self.solver.factor(x[: self.fitted], self.meant.pop(inputs, None)))
        return self._factor[1]


@dataclass(frozen=True, slots=True, eq=False)
class Unquantized:
    """A linear that the first call quantizes."""

    bench: Bench
    name: str

    def __call__(self, x: Tensor) -> Tensor:
        return self.bench.quantize(self.name, x)

    def partial(self, x: Tensor) -> Tensor:
        return self(x)


@dataclass(frozen=True, slots=True, eq=False)
class QuantizingBuilder(LinearBuilder):
    """Makes blocks whose linears quantize themselves."""

    bench: Bench = field(kw_only=True)

    def decoder(self, name: str) -> Linear:
        return Unquantized(self.bench, name)

    def merged(self, name: str, parts: Sequence[str]) -> Linear:
        first, second = (Unquantized(self.bench, part) for part in parts)
        return ConcatLinear(self.ops, first, second)


@torch.inference_mode()
def quantize_block(config: ModelConfig, ops: ModuleType, bench: Bench, streams: Tensor, rows: Rows) -> Tensor:
    """Quantize the block of `bench`: the residual streams [1 or 2, n, D] before it to those after it.

    The first is that of the model as it is quantized so far. The second is that of the float model: there to make up
    for the drift of the first. What was made is in `bench.packed` and `bench.errors`; `bench.state` must hold the
    block's tensors.
    """
    after = torch.empty_like(streams)
    if len(streams) > 1:
        after[1] = _through(config, _floats(ops, bench.state, streams), bench.layer, streams[1], rows, bench.keep)
    linears = QuantizingBuilder(ops, bench.state, "exact", bench=bench)
    after[0] = _through(config, linears, bench.layer, streams[0], rows, unobserved)
    return after


def _floats(ops: ModuleType, state: Mapping[str, Tensor], like: Tensor) -> LinearBuilder:
    """Makes the float block, with weights on the device and in the dtype of `like`; nobody keeps it."""
    return LinearBuilder(ops, {name: tensor.to(like) for name, tensor in state.items()}, "exact")


def _through(
    config: ModelConfig, linears: LinearBuilder, layer: int, x: Tensor, rows: Rows, observe: Observer
) -> Tensor:
    """The residual stream x [n, D] after a block."""
    block = make_block(config, linears, f"transformer.h.{layer}")
    shape = (rows.cache_blocks, config.num_attention_heads, BLOCK_SIZE, config.kv_channels)
    cache = LayerCache(x.new_empty(shape), x.new_empty(shape))
    x, update = block(x, linears.ops.rms_norm(x, block.ln_1, block.eps), rows.at, rows.layout, cache, observe)
    return x + update


def _frequencies(config: ModelConfig, length: int) -> Tensor:
    """Those of a conversation of so many tokens."""
    return inverse_frequencies(config.rotary_emb_base, config.rotary_dim, ntk_alpha(config, length))


def _dequantized(linear: GPTQLinear) -> Tensor:
    return gptq_dequantize(linear.qweight, linear.qzeros, linear.scales, linear.g_idx, linear.bits, linear.zero_offset)
