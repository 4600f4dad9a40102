"""Memory in separate mappings: returned to the OS when the tensor is freed, whatever else the heap holds."""

from __future__ import annotations

import ctypes
import mmap
import os
from contextlib import suppress

import torch
from torch import Tensor

from qvl_kernels.numa import spread
from qvl_kernels.util import cdiv

HUGE_PAGE = 2 << 20  # bytes; smaller buffers gain nothing from huge pages
LINE = 64
_MAP_FIXED = 0x10  # of mmap(2) on Linux, which Python's module does not name
PIECE = 32 << 10  # bytes written at a time; with pieces this large a huge page fills up soon


def buffer(nbytes: int, huge: int | None = None) -> Tensor:
    """Allocate uninitialized bytes, uint8 [nbytes], in huge pages, or aligned to a cache line if smaller than one.

    A page of the mapping becomes resident when it is first written. `huge` limits huge pages to that many bytes at the
    start; None: all. Torch's allocator would place the same bytes in the heap that held the checkpoint's tensors: up to
    2 MiB around each aligned buffer stayed resident, and the hole that one tensor left was too small for the next,
    together 0.7 GB at full size. Two cores read huge pages at 58 GB/s and pages of 4 KiB at 47 GB/s, in one stream. On
    several NUMA nodes the pages are spread over them.
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


def repeated(tile: Tensor, nbytes: int) -> Tensor | None:
    """Map the bytes of a tile over and over, uint8 [nbytes]: pages are resident only once they are read or written.

    Like a mapped file, whose content is in memory once. Returns None where the tile is not whole pages, and where the
    OS cannot do it.
    """
    data = tile.contiguous().view(-1).view(torch.uint8)
    if not hasattr(os, "memfd_create") or len(data) % mmap.PAGESIZE or nbytes < len(data):
        return None
    memory = _anonymous(cdiv(nbytes, len(data)) * len(data))
    raw = torch.frombuffer(memory, dtype=torch.uint8)
    try:
        file = os.memfd_create("qvl_tile")
    except OSError:  # forbidden by a sandbox
        return None
    try:
        with open(file, "wb", closefd=False) as stream:
            stream.write(data.numpy().data)
        return raw[:nbytes] if _map_over(raw, file, len(data)) else None
    except OSError:  # the tile did not fit in memory
        return None
    finally:
        os.close(file)  # the mappings hold it


def _map_over(memory: Tensor, file: int, length: int) -> bool:
    """Replace each `length` bytes of a mapping by a private one of a file's first bytes."""
    call = ctypes.CDLL(None, use_errno=True).mmap
    call.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
    call.restype = ctypes.c_void_p
    how = (mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | _MAP_FIXED, file, 0)
    return all(
        call(address, length, *how) == address
        for address in range(memory.data_ptr(), memory.data_ptr() + len(memory), length)
    )


def _anonymous(nbytes: int) -> mmap.mmap:
    flags = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    return mmap.mmap(-1, nbytes, **flags)
