"""Attention without a mask: an image's patches to each other, and the resampler's queries to the patches."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from qvl_kernels.triton import checks
from qvl_kernels.triton.attention.softmax import LOG2E, attend
from qvl_kernels.triton.launch import Launch, Spec, capability
from qvl_kernels.util import cdiv

MAX_HEAD_DIM = 256


@triton.jit
def image_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr,
    queries, keys, heads, scale, q_image, k_image,
    D: tl.constexpr, BLOCK_D: tl.constexpr, Q_HEAD: tl.constexpr, K_HEAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out = softmax(q k^T / sqrt(d)) v, for one tile of queries, one head and one image.

    out [P, queries, heads, D]; the element of image p, row i, head h, channel c is at p * q_image +
    (i * heads + h) * Q_HEAD + c in q, and likewise in k and v, of `keys` rows. The strides of heads are constants:
    of 312 the compiler would not learn that it keeps 128-bit loads aligned.
    """
    q_row, k_row = heads * Q_HEAD, heads * K_HEAD
    tile, head, image = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    row, column = tile * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    columns = (column < D)[None, :]
    inside = (row < queries)[:, None] & columns
    q_ptr += image * q_image + head * Q_HEAD
    q = tl.load(q_ptr + row[:, None] * q_row + column[None, :], inside, 0.0)

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK_M], tl.float32)
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    k_ptr += image * k_image + head * K_HEAD
    v_ptr += image * k_image + head * K_HEAD
    at = tl.arange(0, BLOCK_N)[:, None] * k_row + column[None, :]  # 32 bits: half the registers of a tile
    for _ in range(keys // BLOCK_N):
        k, v = tl.load(k_ptr + at, columns, 0.0), tl.load(v_ptr + at, columns, 0.0)
        top, mass, total = attend(q, k, v, top, mass, total, scale, True, False)
        k_ptr += BLOCK_N * k_row
        v_ptr += BLOCK_N * k_row
    if keys % BLOCK_N > 0:
        present = tl.arange(0, BLOCK_N) < keys % BLOCK_N
        last_mask = present[:, None] & columns
        k, v = tl.load(k_ptr + at, last_mask, 0.0), tl.load(v_ptr + at, last_mask, 0.0)
        top, mass, total = attend(q, k, v, top, mass, total, scale, present[None, :], True)
    to = ((image * queries + row[:, None]) * heads + head) * D + column[None, :]
    tl.store(out_ptr + to, (total / mass[:, None]).to(out_ptr.dtype.element_ty), inside)


class Strides(NamedTuple):
    """Elements from one image, or head of a row, to the next."""

    image: int
    head: int


class Configuration(NamedTuple):
    """Tile sizes and resources."""

    queries: int
    keys: int
    warps: int
    stages: int


def configuration(capability: int, head_dim: int, nbytes: int, queries: int) -> Configuration:
    """104 channels are computed as 128. On sm_80 64 keys spill, and 64 queries read keys twice as often.

    With the resampler's 256 queries, Triton 3.6 and 3.7 spill there with 32 keys, and on sm_86 and sm_89 with any
    number of queries; 16 cost no time by the kernel report.
    """
    if head_dim > 128 or nbytes == 4:
        return Configuration(64, 32, 8, 2)
    if capability < 90 and (queries <= 256 or capability > 80):
        return Configuration(128, 16, 8, 2)
    return Configuration(128, 64 if capability >= 90 else 32, 8, 2)


def vision_attention(qkv: Tensor, heads: int) -> Tensor:
    """`reference.vision_attention`: qkv [P, L, 3 * W] holds q, k, v per head; returns [P, L, W]."""
    checks.device("vision_attention", qkv)
    images, patches, width = qkv.shape
    out = qkv.new_empty(images, patches, width // 3)
    _vision_plan(qkv, heads, capability(qkv.device), out).run()
    return out


def cross_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """`reference.cross_attention`: q [Q, D], the same for all images, to k and v [P, L, D]; returns [P, Q, D]."""
    checks.device("cross_attention", q, k, v)
    out = k.new_empty(len(k), *q.shape)
    _cross_plan(q, k, v, heads, capability(q.device), out).run()
    return out


def _vision_plan(qkv: Tensor, heads: int, capability: int, out: Tensor) -> Launch:
    op, (images, patches, width) = "vision_attention", out.shape
    checks.tensor(op, "qkv", qkv, (images, patches, 3 * width))
    dim = _head_dim(op, width, heads)
    flat = qkv.view(-1)
    strides = Strides(patches * 3 * width, 3 * dim)
    return _plan(flat, flat[dim:], flat[2 * dim :], heads, capability, out, patches, strides, strides)


def _cross_plan(q: Tensor, k: Tensor, v: Tensor, heads: int, capability: int, out: Tensor) -> Launch:
    op, (images, queries, width) = "cross_attention", out.shape
    checks.tensor(op, "q", q, (queries, width))
    for name, tensor in (("k", k), ("v", v)):
        checks.tensor(op, name, tensor, (images, k.shape[1], width), q.dtype)
    dim, keys = _head_dim(op, width, heads), k.shape[1]
    return _plan(q, k, v, heads, capability, out, keys, Strides(0, dim), Strides(keys * width, dim))


def _head_dim(op: str, width: int, heads: int) -> int:
    if heads < 1 or width % heads or width // heads > MAX_HEAD_DIM:
        raise ValueError(f"{op}: {width} channels in {heads} heads; expected equal heads of at most {MAX_HEAD_DIM}")
    return width // heads


def _plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    capability: int,
    out: Tensor,
    keys: int,
    q_strides: Strides,
    k_strides: Strides,
) -> Launch:
    images, queries, width = out.shape
    dim = width // heads
    choice = configuration(capability, dim, out.element_size(), queries)
    return Launch(
        image_kernel,
        (cdiv(queries, choice.queries), heads, images),
        {"q_ptr": q, "k_ptr": k, "v_ptr": v, "out_ptr": out, "queries": queries, "keys": keys, "heads": heads,
         "scale": LOG2E * dim**-0.5, "q_image": q_strides.image, "k_image": k_strides.image},
        {"D": dim, "BLOCK_D": max(16, triton.next_power_of_2(dim)), "Q_HEAD": q_strides.head,
         "K_HEAD": k_strides.head, "BLOCK_M": choice.queries, "BLOCK_N": choice.keys},
        choice.warps,
        choice.stages,
    )  # fmt: skip


def aot_specs(capability: int) -> list[Spec]:
    """1024 patches in 16 heads of 104; 256 queries to them in 32 heads of 128."""
    specs = []
    out = torch.empty(1, 1024, 1664, dtype=torch.bfloat16, device="meta")
    qkv = out.new_empty(1, 1024, 3 * 1664)
    launch = _vision_plan(qkv, 16, capability, out)
    trips = 1024 / launch.constants["BLOCK_N"]
    specs.append(
        Spec("vision attention", launch, qkv.nbytes + out.nbytes, loop_trips=trips, flops=4 * 1024 * 1024 * 1664)
    )
    q, k = out.new_empty(256, 4096), out.new_empty(1, 1024, 4096)
    launch = _cross_plan(q, k, k, 32, capability, q[None])
    moved = 2 * q.nbytes + 2 * k.nbytes
    trips = 1024 / launch.constants["BLOCK_N"]
    specs.append(Spec("cross attention", launch, moved, loop_trips=trips, flops=4 * 256 * 1024 * 4096))
    return specs
