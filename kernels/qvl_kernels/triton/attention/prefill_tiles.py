"""The tiles of a prefill, computed on the device from starts and lengths: what a captured prefill cannot upload."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qvl_kernels.triton.launch import Launch, Spec
from qvl_kernels.util import cdiv


@triton.jit
def prefill_tiles_kernel(
    starts_ptr, lengths_ptr, tiles_ptr,
    REQUESTS: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """tiles[t] = request, first row, rows, position of the first row; a tile that no request needs has no rows.

    starts int32 or int64 [REQUESTS + 1]; lengths [REQUESTS], of the keys; tiles int32 [TILES, 4], of ROWS rows each,
    one request after another. BLOCK: the power of two that holds TILES.
    """
    tile = tl.arange(0, BLOCK)
    request, first = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32)
    rows, position = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32)
    before = 0
    for r in tl.static_range(REQUESTS):
        start, end = tl.load(starts_ptr + r).to(tl.int32), tl.load(starts_ptr + r + 1).to(tl.int32)
        length = tl.load(lengths_ptr + r).to(tl.int32)
        offset = (tile - before) * ROWS
        mine = (offset >= 0) & (offset < end - start)
        request = tl.where(mine, r, request)
        first = tl.where(mine, start + offset, first)
        rows = tl.where(mine, tl.minimum(ROWS, end - start - offset), rows)
        position = tl.where(mine, length - (end - start) + offset, position)
        before += (end - start + ROWS - 1) // ROWS
    out, inside = tiles_ptr + 4 * tile, tile < TILES
    tl.store(out, request, inside)
    tl.store(out + 1, first, inside)
    tl.store(out + 2, rows, inside)
    tl.store(out + 3, position, inside)


def tiles_on_device(query_starts: Tensor, context_lens: Tensor, rows: int, block: int) -> Tensor:
    """The tiles of `block` rows, int32 [T, 4], of requests with `rows` rows at most in all: enough for any division.

    query_starts [R + 1] and context_lens [R], int32 or int64 on the device, checked by the caller.
    """
    requests = len(context_lens)
    tiles = query_starts.new_empty(cdiv(rows, block) + requests - 1, 4, dtype=torch.int32)
    _plan(query_starts, context_lens, tiles, block).run()
    return tiles


def _plan(query_starts: Tensor, context_lens: Tensor, tiles: Tensor, block: int) -> Launch:
    count = len(tiles)
    return Launch(
        prefill_tiles_kernel,
        (1,),
        {"starts_ptr": query_starts, "lengths_ptr": context_lens, "tiles_ptr": tiles},
        {"REQUESTS": len(context_lens), "ROWS": block, "TILES": count, "BLOCK": triton.next_power_of_2(count)},
        warps=1,
    )


def aot_specs(capability: int) -> list[Spec]:
    """512 rows of at most 8 requests."""
    starts, lengths = (torch.empty(n, dtype=torch.int64, device="meta") for n in (9, 8))
    tiles = torch.empty(11, 4, dtype=torch.int32, device="meta")
    return [Spec("prefill tiles, 512 rows", _plan(starts, lengths, tiles, 128), starts.nbytes + tiles.nbytes)]
