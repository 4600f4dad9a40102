"""Memory in separate mappings: returned to the OS when the tensor is freed, whatever else the heap holds."""

from __future__ import annotations

import mmap
from contextlib import suppress

import torch
from torch import Tensor

from qvl_kernels.numa import spread
from qvl_kernels.util import cdiv

HUGE_PAGE = 2 << 20  # bytes; smaller buffers gain nothing from huge pages
LINE = 64
PIECE = 32 << 10  # bytes written at a time; with pieces this large a huge page fills up soon


def buffer(nbytes: int, huge: int | None = None) -> Tensor:
    """Allocate uninitialized bytes, uint8 [nbytes], in huge pages, or aligned to a cache line if smaller than one.

    A page of the mapping becomes resident when it is first written. `huge` limits huge pages to that many bytes at the
    start; None: all. Torch's allocator would place the same bytes in the heap that held the checkpoint's tensors: up to
    2 MiB around each aligned buffer stayed resident, and the hole that one tensor left was too small for the next,
    together 0.7 GB at full size. On several NUMA nodes the pages are spread over them. Two
    cores read huge pages at 58 GB/s and pages of 4 KiB at 47 GB/s, in one stream.
    """
    if nbytes < HUGE_PAGE:
        raw = torch.empty(nbytes + LINE, dtype=torch.uint8)
        start = -raw.data_ptr() % LINE
        return raw[start : start + nbytes]
    memory = _anonymous(nbytes + HUGE_PAGE)
    raw = torch.frombuffer(memory, dtype=torch.uint8)
    start = -raw.data_ptr() % HUGE_PAGE
    huge_bytes = nbytes if huge is None else huge // HUGE_PAGE * HUGE_PAGE
    if huge_bytes and hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # an OS kernel built without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE, start, huge_bytes)
    spread(raw.data_ptr() + start, nbytes)
    return raw[start : start + nbytes]


def touched_bytes(nbytes: int, piece: int) -> int:
    """Return the bytes that become resident when the first `nbytes` of a buffer are written, `piece` at a time."""
    return cdiv(nbytes, HUGE_PAGE) * HUGE_PAGE if piece >= PIECE else nbytes


def mapping(nbytes: int) -> Tensor:
    """Allocate zeros, uint8 [nbytes], in pages of the OS's default size."""
    return torch.frombuffer(_anonymous(nbytes), dtype=torch.uint8)


def _anonymous(nbytes: int) -> mmap.mmap:
    flags = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    return mmap.mmap(-1, nbytes, **flags)
