"""Memory in mappings of its own: given back to the system when a tensor goes, whatever else the heap holds."""

from __future__ import annotations

import mmap
from contextlib import suppress

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20  # bytes; the smallest buffer that gains from them
LINE = 64
PIECE = 32 << 10  # bytes of what is written at once, from which on a huge page is soon full


def buffer(nbytes: int, huge: int | None = None) -> Tensor:
    """Uninitialized bytes, uint8 [nbytes]: in huge pages where they fill one, aligned to a cache line else.

    Of the mapping only what is written becomes memory, a page at a time; huge: so many bytes in huge pages, those at
    the start, where not all are to be. From torch's allocator the same bytes came out of a heap that the checkpoint's
    tensors had been in before: the up to 2 MiB beside each aligned buffer were resident, and what a tensor left behind
    was too small for the next. Both together were 0.7 GB at full size. Two cores read huge pages at 58 GB/s where pages
    of 4 KiB give 47, in one stream.
    """
    if nbytes < HUGE_PAGE:
        raw = torch.empty(nbytes + LINE, dtype=torch.uint8)
        start = -raw.data_ptr() % LINE
        return raw[start : start + nbytes]
    memory = _anonymous(nbytes + HUGE_PAGE)
    raw = torch.frombuffer(memory, dtype=torch.uint8)
    start = -raw.data_ptr() % HUGE_PAGE
    wanted = nbytes if huge is None else huge // HUGE_PAGE * HUGE_PAGE
    if wanted and hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE, start, wanted)
    return raw[start : start + nbytes]


def touched_bytes(nbytes: int, piece: int) -> int:
    """Bytes that become memory when so many at the start of a buffer are written, `piece` at a time: whole pages."""
    return -(-nbytes // HUGE_PAGE) * HUGE_PAGE if piece >= PIECE else nbytes


def mapping(nbytes: int) -> Tensor:
    """Bytes of zeros, uint8 [nbytes], in pages of the system's usual size."""
    return torch.frombuffer(_anonymous(nbytes), dtype=torch.uint8)


def _anonymous(nbytes: int) -> mmap.mmap:
    own = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    return mmap.mmap(-1, nbytes, **own)
