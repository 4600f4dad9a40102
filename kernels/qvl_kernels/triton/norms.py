"""RMSNorm and LayerNorm, alone or after adding an update to the residual stream: a program holds a row in registers."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from qvl_kernels.triton import checks
from qvl_kernels.triton.dependent import FEW_ROWS, begin, dependent
from qvl_kernels.triton.launch import Launch, Spec, capability, counted
from qvl_kernels.triton.linear.published_shapes import decode_splits
from qvl_kernels.triton.to_float32 import to_float32
from qvl_kernels.util import cdiv

MAX_WIDTH = 16384  # channels of a row that registers hold on 16 warps
LAYER_NORM_ROWS = 2  # of a program: one leaves half of a warp idle where a chunk is 128 channels


@triton.jit(do_not_specialize=["rows"])  # 1 would be a constant
def rms_norm_kernel(
    x_ptr, update_ptr, weight_ptr, total_ptr, y_ptr,
    rows, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """total = x + update; y = round(total / sqrt(mean(total^2) + eps)) * weight.

    x, total, y [rows, WIDTH]; weight [WIDTH]. SPLITS 0: no update, and total is not written; 1 and more: update
    [SPLITS, rows, WIDTH], float32 partial sums that are rounded together, or one update in x's dtype.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    at = row * WIDTH + column
    weight = tl.load(weight_ptr + column, inside, 0.0)  # that nothing writes: before the wait
    begin(PDL)
    x = tl.load(x_ptr + at, inside, 0.0).to(tl.float32)
    if SPLITS > 0:
        update = tl.load(update_ptr + at, inside, 0.0).to(tl.float32)
        for split in tl.static_range(1, SPLITS):
            update += tl.load(update_ptr + split * rows.to(tl.int64) * WIDTH + at, inside, 0.0)
        dtype = total_ptr.dtype.element_ty
        x = (x + update.to(dtype).to(tl.float32)).to(dtype)
        tl.store(total_ptr + at, x, inside)
        x = x.to(tl.float32)
    y = x * tl.rsqrt(tl.sum(x * x, 0) / WIDTH + eps)
    y = y.to(y_ptr.dtype.element_ty).to(tl.float32) * weight.to(tl.float32)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["rows"])  # 1 would be a constant
def layer_norm_kernel(
    x_ptr, update_ptr, weight_ptr, bias_ptr, total_ptr, y_ptr,
    rows, eps,
    WIDTH: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, ROWS: tl.constexpr, UPDATE: tl.constexpr,
):  # fmt: skip
    """total = x + update; y = (total - mean) / sqrt(variance + eps) * weight + bias, for ROWS rows.

    All [rows, WIDTH] of one dtype. The variance is that of the differences, in a second pass over registers:
    E[x^2] - E[x]^2 cancels. Of 1664 channels, 13 chunks of 128 waste nothing, where a power of two wastes a fifth.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, CHUNK)[None, :]
    RAGGED: tl.constexpr = WIDTH % CHUNK > 0
    total = tl.zeros([ROWS, CHUNK], tl.float32)
    chunks = ()
    for i in tl.static_range(CHUNKS):
        inside = (row < rows) & (column + i * CHUNK < WIDTH)
        at = row * WIDTH + i * CHUNK + column
        x = tl.load(x_ptr + at, inside, 0.0)
        if UPDATE:
            x = (x.to(tl.float32) + tl.load(update_ptr + at, inside, 0.0).to(tl.float32)).to(x.dtype)
            tl.store(total_ptr + at, x, inside)
        x = to_float32(x)
        total += x
        chunks = chunks + (x,)  # type: ignore[assignment]  # noqa: RUF005 - a star is not in the language
    mean = (tl.sum(total, 1) / WIDTH)[:, None]
    total = tl.zeros([ROWS, CHUNK], tl.float32)
    for i in tl.static_range(CHUNKS):
        centered = chunks[i] - mean
        if RAGGED:
            centered = tl.where(column + i * CHUNK < WIDTH, centered, 0.0)
        total += centered * centered
    factor = tl.rsqrt(tl.sum(total, 1) / WIDTH + eps)[:, None]
    for i in tl.static_range(CHUNKS):
        at = tl.broadcast_to(i * CHUNK + column, [ROWS, CHUNK])
        weight = to_float32(tl.load(weight_ptr + at, at < WIDTH, 0.0))
        bias = to_float32(tl.load(bias_ptr + at, at < WIDTH, 0.0))
        y = (chunks[i] - mean) * factor * weight + bias
        tl.store(y_ptr + row * WIDTH + at, y.to(y_ptr.dtype.element_ty), (row < rows) & (at < WIDTH))


class Configuration(NamedTuple):
    """The launch configuration of a norm."""

    block: int  # the power of two that holds a row
    warps: int


def configuration(rows: int, width: int) -> Configuration:
    """RMSNorm's. With few rows the GPU is mostly idle, so a row gets many warps; many rows fill it with few each."""
    block = triton.next_power_of_2(width)
    per_lane = 8 if rows < 128 else 16  # values: one or two loads of 128 bits
    return Configuration(block, max(1, min(16, block // (32 * per_lane))))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`reference.rms_norm`: x [.., D], weight [D]."""
    checks.device("rms_norm", x, weight)
    y = torch.empty_like(x)
    _rms_plan("rms_norm", x, None, weight, eps, None, y).run()
    return y


def add_rms_norm(x: Tensor, update: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`reference.add_rms_norm`: x [n, D]; update [n, D] in x's dtype, or float32 partial sums [S, n, D]."""
    checks.device("add_rms_norm", x, update, weight)
    total, y = torch.empty_like(x), torch.empty_like(x)
    _rms_plan("add_rms_norm", x, update, weight, eps, total, y).run()
    return total, y


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`reference.layer_norm`: x [.., D], weight and bias [D]."""
    checks.device("layer_norm", x, weight, bias)
    y = torch.empty_like(x)
    _layer_plan("layer_norm", x, None, weight, bias, eps, None, y).run()
    return y


def add_layer_norm(x: Tensor, update: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`reference.add_layer_norm`: x and update [.., D], weight and bias [D]."""
    checks.device("add_layer_norm", x, update, weight, bias)
    total, y = torch.empty_like(x), torch.empty_like(x)
    _layer_plan("add_layer_norm", x, update, weight, bias, eps, total, y).run()
    return total, y


def _rms_plan(
    op: str, x: Tensor, update: Tensor | None, weight: Tensor, eps: float, total: Tensor | None, y: Tensor
) -> Launch:
    rows, width = _check(op, x, weight)
    splits = 0
    if update is not None and update.dim() == x.dim() + 1:
        splits = len(update)
        checks.tensor(op, "update", update, (None, *x.shape), torch.float32)
    elif update is not None:
        splits = 1
        checks.tensor(op, "update", update, tuple(x.shape), x.dtype)
    block, warps = configuration(rows, width)
    return Launch(
        rms_norm_kernel,
        (rows,),
        {"x_ptr": x, "update_ptr": x if update is None else update, "weight_ptr": weight,
         "total_ptr": y if total is None else total, "y_ptr": y, "rows": rows, "eps": eps},
        {"WIDTH": width, "BLOCK": block, "SPLITS": splits, "PDL": dependent(capability(x.device), rows)},
        warps,
    )  # fmt: skip


def _layer_plan(
    op: str,
    x: Tensor,
    update: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    total: Tensor | None,
    y: Tensor,
) -> Launch:
    rows, width = _check(op, x, weight, bias)
    if update is not None:
        checks.tensor(op, "update", update, tuple(x.shape), x.dtype)
    warps = triton.next_power_of_2(cdiv(width, 2048))
    chunk = 128 * warps  # of two rows: 8 values a lane
    return Launch(
        layer_norm_kernel,
        (cdiv(rows, LAYER_NORM_ROWS),),
        {"x_ptr": x, "update_ptr": x if update is None else update, "weight_ptr": weight, "bias_ptr": bias,
         "total_ptr": y if total is None else total, "y_ptr": y, "rows": rows, "eps": eps},
        {"WIDTH": width, "CHUNK": chunk, "CHUNKS": cdiv(width, chunk), "ROWS": LAYER_NORM_ROWS,
         "UPDATE": update is not None},
        warps,
    )  # fmt: skip


def _check(op: str, x: Tensor, *vectors: Tensor) -> tuple[int, int]:
    """Validate x [.., D] and its vectors [D]; returns rows and channels."""
    checks.tensor(op, "x", x, tuple(x.shape))
    width = x.shape[-1]
    if not 0 < width <= MAX_WIDTH:
        raise ValueError(f"{op}: x has {width} channels; a program holds rows of 1 to {MAX_WIDTH} in registers")
    for name, vector in zip(("weight", "bias"), vectors, strict=False):
        checks.tensor(op, name, vector, (width,), x.dtype)
    return x.numel() // width, width


def aot_specs(capability: int) -> list[Spec]:
    """Decode (1 and 16 rows, updates in packed linears' partial sums and whole), prefill of 2048 rows, an image."""

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    specs = []
    after = {name: decode_splits(capability, name) for name in ("out", "down")}
    for rows, splits, linear in (
        (1, 0, ""),
        (1, after["out"], "out"),
        (1, after["down"], "down"),
        (16, after["out"], "out"),
        (16, after["down"], "down"),
        (2048, 0, ""),
    ):
        x, weight = empty(rows, 4096), empty(4096)
        update = empty(splits, rows, 4096, dtype=torch.float32) if splits else empty(rows, 4096)
        moved = 3 * x.nbytes + update.nbytes + weight.nbytes
        launch = _rms_plan("add_rms_norm", x, update, weight, 1e-6, x, x)
        launch = launch.with_constants(PDL=capability >= 90 and rows < FEW_ROWS)
        label = f"add_rms_norm{f' after {linear}' if linear else ''}, {counted(rows, 'row')}"
        label += f", {counted(splits, 'split')}" if splits else ""
        specs.append(Spec(label, launch, moved, max_ratio=0.3, min_wide=0.9, per_layer=int(splits > 0)))
    x, weight = empty(1, 4096), empty(4096)
    launch = _rms_plan("rms_norm", x, None, weight, 1e-6, None, x)
    specs.append(Spec("rms_norm, 1 row", launch, 2 * x.nbytes + weight.nbytes, max_ratio=0.3, min_wide=0.9))
    x, weight = empty(1024, 1664), empty(1664)
    for name, more, tensors in (("layer_norm", None, 2), ("add_layer_norm", x, 4)):
        launch = _layer_plan(name, x, more, weight, weight, 1e-6, x, x)
        specs.append(Spec(f"{name}, an image", launch, tensors * x.nbytes + 2 * weight.nbytes, max_ratio=0.3))
    return specs
