"""Around the loops of `gemm` and `wgmma`: where x and words lie, how sums are stored, launches and report entries."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from qvl_kernels.layouts.gpu import PackedInt4, PackedInt8
from qvl_kernels.triton.gluon import gl, gluon
from qvl_kernels.triton.launch import Launch, Spec
from qvl_kernels.triton.linear.configs import Config, Regime, config
from qvl_kernels.triton.linear.matmul_plan import MatmulPlan
from qvl_kernels.triton.linear.published_shapes import example, weight_bytes
from qvl_kernels.util import cdiv


@gluon.jit
def tile_pointers(
    x_ptr, words_ptr, m0, n0, rows,
    INPUTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Of rows m0 on, x [BM, 128] and its columns [1, 128]; of outputs n0 on, words [BN, 16]; all of the first tile."""
    X: tl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [W, 1], [1, 0])
    COPY: tl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [W, 1], [1, 0])
    m = gl.expand_dims(gl.minimum(m0 + gl.arange(0, BM, gl.SliceLayout(1, X)), rows - 1), 1)  # past the last: the last
    k = gl.expand_dims(gl.arange(0, 128, gl.SliceLayout(0, X)), 0)
    n = gl.expand_dims(n0 + gl.arange(0, BN, gl.SliceLayout(1, COPY)), 1)
    word = gl.expand_dims(gl.arange(0, 16, gl.SliceLayout(0, COPY)), 0)
    return x_ptr + (m * INPUTS + k), k, words_ptr + (n * 16 + word)


@gluon.jit
def store_sums(
    acc, bias_ptr, out_ptr, split, m0, n0, rows,
    OUTPUTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, W: tl.constexpr, MMA: tl.constexpr,
):  # fmt: skip
    """out[split] [rows, OUTPUTS] from m0, n0 on = acc^T, acc [BN, BM] in layout MMA; split 0 adds the bias if any."""
    if bias_ptr is not None and split == 0:
        at = n0 + gl.expand_dims(gl.arange(0, BN, gl.SliceLayout(1, MMA)), 1)
        acc += gl.load(bias_ptr + at, at < OUTPUTS, 0.0).to(gl.float32)
    OUT: tl.constexpr = gl.BlockedLayout([8, 1], [16, 2], [1, W], [0, 1])  # turned in shared memory, 128 bits at a time
    y = gl.convert_layout(acc.to(out_ptr.dtype.element_ty), OUT)
    n = n0 + gl.expand_dims(gl.arange(0, BN, gl.SliceLayout(1, OUT)), 1)
    m = m0 + gl.expand_dims(gl.arange(0, BM, gl.SliceLayout(0, OUT)), 0)
    gl.store(out_ptr + ((split * rows + m) * OUTPUTS + n), y, (n < OUTPUTS) & (m < rows))


def tiled_plan(
    kernel: object, rows: int, weight: PackedInt4 | PackedInt8, bias: Tensor | None, chosen: Config
) -> MatmulPlan:
    """The launch of either kernel for a weight; nothing is checked and no data is touched."""
    padded = weight.words.shape[1]
    launch = Launch(
        kernel,
        (cdiv(rows, chosen.rows), cdiv(padded, chosen.columns), chosen.splits),
        {"words_ptr": weight.words, "scales_ptr": weight.scales, "zeros_ptr": weight.zeros, "bias_ptr": bias},
        {"INPUTS": weight.inputs, "OUTPUTS": weight.outputs, "PADDED": padded, "GROUP": weight.group,
         "BM": chosen.rows, "BN": chosen.columns, "W": chosen.warps, "S": chosen.stages},
        chosen.warps,
        1,
    )  # fmt: skip
    return MatmulPlan(launch, chosen.splits, weight.outputs)


def tiled_spec(
    kernel: object, regime: Regime, capability: int, name: str, rows: int, dtype: torch.dtype, symmetric: bool
) -> Spec:
    """The report's entry for a linear of the decoder, in the configuration of its regime, "gemm" or "wgmma"."""
    x, weight, bias = example(4, name, rows, dtype, symmetric)
    chosen = config(capability, regime, rows, weight.inputs, weight.words.shape[1])
    launch, out = tiled_plan(kernel, rows, weight, bias, chosen).prepare(x)
    label = f"int4_{regime} {name}, {rows} rows{'' if dtype == torch.float16 else ', bf16'}"
    return Spec(
        label + ("" if symmetric else ", zero points"),
        launch,
        x.nbytes + weight_bytes(weight, bias) + out.nbytes,
        from_registers=True,
        loop_trips=cdiv(weight.inputs, weight.TILE) / chosen.splits,
        flops=2 * rows * weight.inputs * weight.outputs,
    )
