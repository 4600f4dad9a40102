"""One decoder block, quantized in one forward pass over all calibration tokens.

The block is the model's own; its builder makes linears that quantize themselves when they are called. Each gathers the
statistics of its inputs, rounds its weight, and computes with the rounded one. So later linears of the block are
calibrated on the outputs of quantized ones ("true sequential"), w1 and w2 share their statistics, and the block's
output is what the next block will really get. To compensate drift, the float block first runs over the residual stream
of the float model and records the inputs of its linears.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from qvl_kernels.ops import Ops
from qvl_kernels.reference import gptq_dequantize
from qvl_kernels.util import cdiv
from qvl_runtime.config.model import ModelConfig
from qvl_runtime.formats.finite import finite
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
}  # of each linear, by the name under which the block observes them
MEASURED_TOKENS = 512  # held-out tokens that errors are measured on: more change the third digit


class LinearError(NamedTuple):
    """The error of a quantized linear's outputs, on conversations that it was not calibrated on.

    Errors are |x (W - Ŵ)ᵀ| / |x Wᵀ| over up to `MEASURED_TOKENS` tokens.
    """

    layer: int
    linear: str  # "attn.c_attn"
    error: float
    rtn_error: float  # the error of rounding to nearest
    damping: float  # share of the mean diagonal; 0 for rounding to nearest
    seconds: float


class CalibrationBatch(NamedTuple):
    """The tokens of all conversations as one model call, held-out conversations last."""

    positions: Positions
    layout: Layout
    num_cache_blocks: int
    num_fitted: int  # tokens that statistics are gathered on; those after them are held out

    @classmethod
    def of(cls, config: ModelConfig, lengths: Sequence[int], held_out: int, device: torch.device) -> CalibrationBatch:
        """The batch of conversations of these lengths, the last `held_out` of which are only measured."""
        starts = list(accumulate(lengths, initial=0))
        blocks = [cdiv(length, BLOCK_SIZE) for length in lengths]
        firsts = list(accumulate(blocks, initial=0))
        tables = torch.zeros(len(lengths), max(blocks), dtype=torch.int64, device=device)
        for i, count in enumerate(blocks):
            tables[i, :count] = torch.arange(firsts[i], firsts[i] + count)
        positions = torch.cat([torch.arange(length) for length in lengths]).to(device)
        slots = torch.cat([torch.arange(n) + f * BLOCK_SIZE for n, f in zip(lengths, firsts, strict=False)]).to(device)
        frequencies = [_frequencies(config, length).expand(length, -1) for length in lengths]
        rotary = positions_of(config, positions, torch.cat(frequencies).to(device))
        return cls(rotary, Layout(slots, tables, starts, list(lengths)), firsts[-1], starts[len(lengths) - held_out])


@dataclass(slots=True, eq=False)
class BlockQuantizer:
    """Quantizes the linears of one block: its float weights, the settings, and the results so far."""

    layer: int
    state: MutableMapping[str, Tensor]
    method: Method
    solver: Solver
    num_fitted: int  # tokens that statistics are gathered on, the first ones
    progress: Callable[[int], None]  # called with the number of finished linears of this block
    packed: dict[str, Tensor] = field(default_factory=dict)  # the published tensors
    errors: list[LinearError] = field(default_factory=list)
    float_inputs: dict[str, Tensor] = field(default_factory=dict)  # in the float model, by the names of `INPUTS`
    _factor: tuple[Tensor, Factor] | None = None  # the latest inputs and their factor

    def quantize(self, name: str, x: Tensor) -> Tensor:
        """Quantize linear `name` on its inputs x [n, in]; returns its outputs [n, out] with the rounded weight."""
        start, part = time.perf_counter(), name.split(".", 3)[3]
        weight = finite(f"{name}.weight", self.state.pop(f"{name}.weight").to(x.device))
        bias = self.state.pop(f"{name}.bias", None)
        q = self.solver.quantization
        if self.method == "rtn":
            quantized = quantize_rtn(weight, q.bits, q.group_size, bool(q.sym), bias=bias, zero_offset=q.zero_offset)
            damping = 0.0
        else:
            factor = self._factor_of(x, INPUTS[part])
            quantized, damping = self.solver.solve(weight, factor, bias), factor.damping
        rounded, error, rtn_error = self._compare(weight, quantized, x)
        outputs = torch.nn.functional.linear(x, rounded, None if bias is None else bias.to(x))
        self.packed |= {key: tensor.cpu() for key, tensor in quantized.tensors(name).items()}
        seconds = time.perf_counter() - start
        self.errors.append(LinearError(self.layer, part, error, rtn_error, damping, seconds))
        self.progress(len(self.errors))
        return outputs

    def _compare(self, weight: Tensor, quantized: GPTQLinear, x: Tensor) -> tuple[Tensor, float, float]:
        """The rounded weight [out, in] in x's dtype; its error and that of rounding to nearest, on held-out tokens.

        A slice of outputs at a time: five float copies of the weight would be 1 GB at full size.
        """
        q = self.solver.quantization
        measured = x[self.num_fitted :][:: cdiv(len(x) - self.num_fitted, MEASURED_TOKENS)].float()
        rounded = torch.empty(weight.shape, dtype=x.dtype, device=x.device)
        exact, *errors = (measured.new_empty(len(measured), len(weight)) for _ in range(3))
        for first in range(0, len(weight), OUTPUTS_AT_ONCE):
            end = min(first + OUTPUTS_AT_ONCE, len(weight))
            floats, solved = weight[first:end].float(), _dequantized(quantized.outputs(first, end))
            nearest = quantize_rtn(weight[first:end], q.bits, q.group_size, bool(q.sym), zero_offset=q.zero_offset)
            rounded[first:end] = solved
            torch.mm(measured, floats.t(), out=exact[:, first:end])
            for error_outputs, approximate in zip(errors, (solved, _dequantized(nearest)), strict=True):
                torch.mm(measured, (floats - approximate).t(), out=error_outputs[:, first:end])
        size = exact.norm().clamp(min=torch.finfo(torch.float32).tiny)
        error, rtn_error = (float(error_outputs.norm() / size) for error_outputs in errors)
        return rounded, error, rtn_error

    def record_float_input(self, name: str, value: Tensor) -> None:
        """Observe a float block and keep the inputs of its linears."""
        if name in INPUTS.values():
            self.float_inputs[name] = value[: self.num_fitted]

    def _factor_of(self, x: Tensor, inputs: str) -> Factor:
        """The factor of x, computed once for linears with the same inputs, such as w1 and w2."""
        if self._factor is None or self._factor[0] is not x:
            self._factor = None  # freed before the next is computed: one of the 9.6 B model takes 0.5 GB
            self._factor = (x, self.solver.factor(x[: self.num_fitted], self.float_inputs.pop(inputs, None)))
        return self._factor[1]


@dataclass(frozen=True, slots=True, eq=False)
class UnquantizedLinear:
    """A linear that its first call quantizes."""

    quantizer: BlockQuantizer
    name: str

    def __call__(self, x: Tensor) -> Tensor:
        """x [n, in] to [n, out], in x's dtype."""
        return self.quantizer.quantize(self.name, x)

    def forward_partial_sums(self, x: Tensor) -> Tensor:
        """The same: there are no partial sums to defer."""
        return self(x)


@dataclass(frozen=True, slots=True, eq=False)
class QuantizingBuilder(LinearBuilder):
    """Builds blocks whose linears quantize themselves."""

    quantizer: BlockQuantizer = field(kw_only=True)

    def decoder(self, name: str) -> Linear:
        """An unquantized linear."""
        return UnquantizedLinear(self.quantizer, name)

    def merged(self, name: str, parts: Sequence[str]) -> Linear:
        """Two unquantized linears, each quantized alone."""
        first, second = (UnquantizedLinear(self.quantizer, part) for part in parts)
        return ConcatLinear(self.ops, first, second)


@torch.inference_mode()
def quantize_block(
    config: ModelConfig, ops: Ops, quantizer: BlockQuantizer, streams: Tensor, batch: CalibrationBatch
) -> Tensor:
    """Quantize a block: the residual streams [1 or 2, n, D] before it to those after it.

    The first stream is that of the model as quantized so far. The second, if any, is that of the float model, to
    compensate the drift of the first. `quantizer.state` must hold the block's tensors; the results are in
    `quantizer.packed` and `quantizer.errors`.
    """
    after, layer = torch.empty_like(streams), quantizer.layer
    if len(streams) > 1:
        float_linears = _float_builder(ops, quantizer.state, streams)
        after[1] = _run_block(config, float_linears, layer, streams[1], batch, quantizer.record_float_input)
    linears = QuantizingBuilder(ops, quantizer.state, "exact", quantizer=quantizer)
    after[0] = _run_block(config, linears, layer, streams[0], batch, unobserved)
    return after


def _float_builder(ops: Ops, state: Mapping[str, Tensor], like: Tensor) -> LinearBuilder:
    """A builder of the float block, with weights on the device and in the dtype of `like`."""
    return LinearBuilder(ops, {name: tensor.to(like) for name, tensor in state.items()}, "exact")


def _run_block(
    config: ModelConfig, linears: LinearBuilder, layer: int, x: Tensor, batch: CalibrationBatch, observe: Observer
) -> Tensor:
    """The residual stream x [n, D] after a block."""
    block = make_block(config, linears, f"transformer.h.{layer}")
    shape = (batch.num_cache_blocks, config.num_attention_heads, BLOCK_SIZE, config.kv_channels)
    cache = LayerCache(x.new_empty(shape), x.new_empty(shape))
    x, update = block(x, linears.ops.rms_norm(x, block.ln_1, block.eps), batch.positions, batch.layout, cache, observe)
    return x + update


def _frequencies(config: ModelConfig, length: int) -> Tensor:
    """The rotary frequencies of a conversation of `length` tokens."""
    return inverse_frequencies(config.rotary_emb_base, config.rotary_dim, ntk_alpha(config, length))


def _dequantized(linear: GPTQLinear) -> Tensor:
    return gptq_dequantize(linear.qweight, linear.qzeros, linear.scales, linear.g_idx, linear.bits, linear.zero_offset)
