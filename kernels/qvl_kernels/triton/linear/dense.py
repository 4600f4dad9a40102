"""Dense 16-bit linears with few rows: memory-bound, every weight is read once, from registers into the tensor cores.

As in `small_m`, out^T = W x^T by mma.sync with the weights as operand A, which they are in as they are loaded: a thread
has 8 neighboring inputs of a row, and the product takes inputs in that order (`mma_operands`). The warps of a program
take different tiles of K. The order of sums depends on the weight alone, so a row's result does not depend on the
others; torch's own product chooses its kernel, and with it the order, by the number of rows.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from qvl_kernels.triton import checks
from qvl_kernels.triton.dependent import announce, dependent, prefetch, wait
from qvl_kernels.triton.gluon import gl, gluon, mma
from qvl_kernels.triton.launch import Launch, Spec, capability, counted
from qvl_kernels.triton.linear.configs import DENSE_REGISTERS, FEW, SMALL_M, TILES, Config, config
from qvl_kernels.triton.linear.epilogue import PREFETCHED, gated, lanes_layout, output_of
from qvl_kernels.triton.linear.matmul_plan import MatmulPlan
from qvl_kernels.triton.linear.mma_operands import dense_layout, dense_operand, index, x_layout, x_operand
from qvl_kernels.triton.linear.published_shapes import BIASED, DECODER, SHAPES
from qvl_kernels.util import cdiv

TILE_DENSE = tl.constexpr(TILES[16])
MOST_RATIO, LEAST_WIDE = 0.5, 0.9  # bars of the kernel report
ALIGNED = 8  # inputs that a load of 128 bits takes


@gluon.jit(do_not_specialize=["rows"])  # one binary for every batch size of a tile
def dense_small_m_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr,
    rows,
    INPUTS: tl.constexpr, OUTPUTS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, W: tl.constexpr, GATED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out[s, m, n] = sum over the inputs k of split s: x[m, k] * weight[n, k], in float32.

    x [rows, INPUTS]; weight [OUTPUTS, INPUTS]; bias [OUTPUTS] or None, added by split 0; out [splits, rows, OUTPUTS].
    A program: BM rows, BN outputs, W warps. GATED as in `small_m_kernel`.
    """
    FLOAT: tl.constexpr = x_ptr.dtype.element_ty
    TILES: tl.constexpr = (INPUTS + TILE_DENSE - 1) // TILE_DENSE
    RAGGED: tl.constexpr = TILES * TILE_DENSE != INPUTS
    HALF: tl.constexpr = BN // 2 if GATED else BN
    WIDTH: tl.constexpr = OUTPUTS // 2 if GATED else OUTPUTS
    MMA: tl.constexpr = gl.NVMMADistributedLayout([2, 0], [W, 1, 1], [1, 16, 8])
    A: tl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    B: tl.constexpr = gl.DotOperandLayout(1, MMA, 2)
    L: tl.constexpr = dense_layout(W, BN)
    X: tl.constexpr = x_layout(W, BM)
    split, splits = gl.program_id(1), gl.num_programs(1)
    first, last = split * TILES // splits, (split + 1) * TILES // splits
    n0, m0 = gl.program_id(0) * HALF, gl.program_id(2) * BM
    w, w_x = index(W, 0, L), index(W, 0, X)  # [W, 1, 1]
    n_w = output_of(n0, index(BN, 1, L), OUTPUTS, BN, GATED)  # [1, BN, 1]
    if OUTPUTS % BN != 0:
        n_w = gl.minimum(n_w, OUTPUTS - 1)
    k_w, k = index(32, 2, L), index(32, 1, X)
    weight_at = weight_ptr + n0.to(gl.int64) * INPUTS + ((n_w - n0) * INPUTS + k_w)  # 32 bits: half the registers
    x_at = x_ptr + gl.minimum(m0 + index(BM, 2, X), rows - 1) * INPUTS + k  # rows past the last are the last
    announce(PDL)
    if PDL:
        ask_for_rows(weight_ptr, n0, first, INPUTS, OUTPUTS, BN, W, GATED)
    wait(PDL)
    acc = gl.zeros([W, BN, BM], gl.float32, MMA)
    for i in range(first, last, W):
        start_w, inside = (i + w) * TILE_DENSE, i + w < last
        start = gl.minimum(i + w_x, last - 1) * TILE_DENSE  # past the end the last tile once more, times zeros
        if RAGGED:
            low = gl.load(weight_at + start_w, inside & (start_w + k_w < INPUTS), 0.0)
            high = gl.load(weight_at + start_w + 32, inside & (start_w + 32 + k_w < INPUTS), 0.0)
            x_low = gl.load(x_at + start, start + k < INPUTS, 0.0)
            x_high = gl.load(x_at + start + 32, start + 32 + k < INPUTS, 0.0)
        else:
            low, high = gl.load(weight_at + start_w, inside, 0.0), gl.load(weight_at + start_w + 32, inside, 0.0)
            x_low, x_high = gl.load(x_at + start), gl.load(x_at + start + 32)
        acc = mma(dense_operand(low, A), x_operand(x_low, B), acc)
        acc = mma(dense_operand(high, A), x_operand(x_high, B), acc)
    y = gl.sum(acc, 0)  # [BN, BM]
    if bias_ptr is not None and split == 0:
        at = output_of(n0, gl.expand_dims(gl.arange(0, BN, gl.SliceLayout(1, y.type.layout)), 1), OUTPUTS, BN, GATED)
        y += gl.load(bias_ptr + at, at < OUTPUTS, 0.0).to(gl.float32)
    if GATED:
        y = gated(y, FLOAT)
    n = n0 + gl.expand_dims(gl.arange(0, HALF, gl.SliceLayout(1, y.type.layout)), 1)
    m = m0 + gl.expand_dims(gl.arange(0, BM, gl.SliceLayout(0, y.type.layout)), 0)
    out = out_ptr + (split * rows + m) * WIDTH + n
    gl.store(out, y.to(out_ptr.dtype.element_ty), (n < WIDTH) & (m < rows))


@gluon.jit
def ask_for_rows(
    weight_ptr, n0, first,
    INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, BN: tl.constexpr, W: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """Ask for the first tiles of each of a program's rows, one run of bytes a row: a lane asks for a row."""
    RUN: tl.constexpr = min(PREFETCHED.value * W * TILE_DENSE.value, INPUTS // 8 * 8)
    LANES: tl.constexpr = lanes_layout(W)
    w = gl.expand_dims(gl.arange(0, W, gl.SliceLayout(1, LANES)), 1)
    lane = gl.expand_dims(gl.arange(0, 32, gl.SliceLayout(0, LANES)), 0)
    row = gl.minimum(output_of(n0, gl.minimum(lane, BN - 1), OUTPUTS, BN, GATED), OUTPUTS - 1)
    start = gl.minimum(first * TILE_DENSE, INPUTS - RUN)
    prefetch(weight_ptr + row.to(gl.int64) * INPUTS + start + w * 0, (w == 0) & (lane < BN), RUN * 2)


def takes(weight: Tensor) -> bool:
    """Whether the kernel multiplies few rows by a weight [outputs, inputs]: 16-bit, with rows at 128-bit addresses."""
    return weight.dtype in (torch.float16, torch.bfloat16) and weight.shape[1] % ALIGNED == 0 and weight.is_contiguous()


def dense_config(capability: int, rows: int, weight: Tensor) -> Config:
    """The configuration for a weight [outputs, inputs]; its splits depend on the weight alone."""
    return config(capability, "dense", rows, weight.shape[1], weight.shape[0], 16)


def plan_dense(x: Tensor, weight: Tensor, bias: Tensor | None = None, gated: bool = False) -> MatmulPlan:
    """Check the tensors and resolve the launch for x and every other x of its dtype and number of 8-row blocks.

    gated: the outputs are up | gate, and what is returned is their SwiGLU [rows, N / 2], always of one split.
    """
    op, (outputs, inputs) = "dense_small_m", weight.shape
    checks.tensor(op, "x", x, (None, inputs), weight.dtype)
    checks.tensor(op, "weight", weight, (outputs, inputs), torch.float16, torch.bfloat16)
    checks.device(op, x, weight, bias)
    if bias is not None:
        checks.tensor(op, "bias", bias, (outputs,))
    if not 0 < len(x) <= SMALL_M[16]:
        raise ValueError(f"{op}: x has {len(x)} rows; expected 1 to {SMALL_M[16]}")
    if inputs % ALIGNED or (gated and outputs % 2):
        raise ValueError(f"{op}: a weight of {outputs} x {inputs}; expected inputs in eights, and even outputs to gate")
    here = capability(x.device)
    chosen = dense_config(here, len(x), weight)
    chosen = chosen._replace(splits=1) if gated else chosen
    return _plan(len(x), weight, bias, chosen, gated, dependent(here, len(x)))


def _plan(rows: int, weight: Tensor, bias: Tensor | None, chosen: Config, gated: bool, pdl: bool) -> MatmulPlan:
    outputs, inputs = weight.shape
    launch = Launch(
        dense_small_m_kernel,
        (cdiv(outputs, chosen.columns), chosen.splits, cdiv(rows, chosen.rows)),
        {"weight_ptr": weight, "bias_ptr": bias},
        {"INPUTS": inputs, "OUTPUTS": outputs, "BM": chosen.rows, "BN": chosen.columns, "W": chosen.warps,
         "GATED": gated, "PDL": pdl},
        chosen.warps,
        chosen.stages,
        DENSE_REGISTERS.get(chosen.rows) if chosen[1:3] == FEW["dense"] else None,
    )  # fmt: skip
    return MatmulPlan(launch, chosen.splits, outputs // 2 if gated else outputs)


def aot_specs(capability: int) -> list[Spec]:
    """A decoder layer and the head in bfloat16, 1 and 16 rows."""
    return [_spec(capability, name, rows) for name in (*DECODER, "head") for rows in (1, 16)]


def _spec(capability: int, name: str, rows: int) -> Spec:
    inputs, outputs = SHAPES[name]
    x = torch.empty(rows, inputs, dtype=torch.bfloat16, device="meta")
    weight, bias = x.new_empty(outputs, inputs), x.new_empty(outputs) if name in BIASED else None
    chosen = dense_config(capability, rows, weight)
    gate = name == "up_gate" and chosen.splits == 1
    launch, out = _plan(rows, weight, bias, chosen, gate, capability >= 90).prepare(x)
    return Spec(
        f"dense_small_m {name}{' swiglu' if gate else ''}, {counted(rows, 'row')}, bf16",
        launch,
        x.nbytes + weight.nbytes + out.nbytes,
        max_ratio=MOST_RATIO,
        min_wide=LEAST_WIDE,
        from_registers=True,
        loop_trips=cdiv(inputs, TILES[16]) / chosen.splits / chosen.warps,
        flops=2 * rows * inputs * outputs,
        least_bytes=weight.nbytes,
    )
