"""Merge the results of the pieces of a row's keys."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from qvl_kernels.triton.attention.decode_kv_fp16 import PIECES, share_of_keys, visible_keys
from qvl_kernels.triton.dependent import begin
from qvl_kernels.triton.launch import Launch


@triton.jit(
    do_not_specialize=["pieces", "first_query"],
    do_not_specialize_on_alignment=["queries_ptr", "lengths_ptr"],  # read a word at a time, from anywhere
)
def merge_kernel(
    partial_ptr, lse_ptr, queries_ptr, lengths_ptr, out_ptr,
    H, pieces, first_query,
    D: tl.constexpr, BLOCK_D: tl.constexpr, LISTED: tl.constexpr, UNIT: tl.constexpr, LEAST: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """out = sum of 2^(lse - max lse) * partial over the pieces with keys, normalized; zeros for a row without keys.

    partial float32 [m, H, pieces, D], lse float32 [m, H, pieces]; out [n, H, D]; the rest, UNIT and LEAST among it, as
    in `decode_kv_fp16_kernel`. One warp for a head of a row: each thread has a few channels of all partial results. The
    sum is over PIECES of them, whatever the table's width is: a row's order of sums depends on its own length.
    """
    begin(PDL)
    head, local = tl.program_id(0), tl.program_id(1)
    row, _, length = visible_keys(queries_ptr, lengths_ptr, local + first_query, LISTED)
    piece, column = tl.arange(0, PIECES), tl.arange(0, BLOCK_D)
    first, last = share_of_keys(length, piece, UNIT, LEAST)
    present = first < last
    at = (local.to(tl.int64) * H + head) * pieces + piece
    lse = tl.load(lse_ptr + at, present, float("-inf"))
    inside = present[:, None] & (column < D)[None, :]
    partial = tl.load(partial_ptr + at[:, None] * D + column[None, :], inside, 0.0)
    weights = tl.where(present, tl.exp2(lse - tl.max(lse, 0)), 0.0)
    out = tl.sum(weights[:, None] * partial, 0) / tl.maximum(tl.sum(weights, 0), 1e-30)
    to = (row.to(tl.int64) * H + head) * D + column
    tl.store(out_ptr + to, out.to(out_ptr.dtype.element_ty), column < D)


def merge(
    partial: Tensor,
    lse: Tensor,
    queries: Tensor,
    lengths: Tensor,
    out: Tensor,
    first_query: int,
    unit: tuple[int, int],
    listed: bool,
    pdl: bool,
) -> Launch:
    """The launch for partial [m, H, pieces, D]; unit: the UNIT and LEAST that the pieces were made with."""
    count, heads, pieces, head_dim = partial.shape
    return Launch(
        merge_kernel,
        (heads, count),
        {"partial_ptr": partial, "lse_ptr": lse, "queries_ptr": queries, "lengths_ptr": lengths, "out_ptr": out,
         "H": heads, "pieces": pieces, "first_query": first_query},
        {"D": head_dim, "BLOCK_D": max(32, triton.next_power_of_2(head_dim)), "LISTED": listed, "UNIT": unit[0],
         "LEAST": unit[1], "PDL": pdl},
        warps=1,
    )  # fmt: skip
