"""Memory given back when it is no longer needed: of tensors that are views of a mapped file, and of the heap."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

KEPT = 256 << 20  # bytes of a tensor up to which `keep_heap` has it in the heap: 4096 x 12288 floats are 192 MiB
PIECE = 32 << 20  # bytes of a tensor that are in memory at once while it is copied
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
MOST_INT = 2**31 - 1


def release(tensor: Tensor) -> None:
    """Give back the memory of a view of a mapped file; reading it again reads the file again.

    Only for such views: other memory loses its content. Without it a process that reads a 9 GB file once is 9 GB
    large until it unmaps the file. Does nothing where the system has no madvise.
    """
    advise = _madvise()
    if advise is None or not tensor.is_contiguous():
        return
    page = mmap.PAGESIZE
    start = -(-tensor.data_ptr() // page) * page
    end = (tensor.data_ptr() + tensor.nbytes) // page * page
    if end > start:
        advise(start, end - start, mmap.MADV_DONTNEED)


def release_source(tensor: Tensor) -> None:
    """`release` of a tensor that was laid out anew, where it is a view of a mapped file; others are left alone."""
    if sys.platform.startswith("linux") and _in_file(tensor.data_ptr()):
        release(tensor)


def _in_file(address: int) -> bool:
    """Whether an address is in a mapping of a file: proc(5), `maps`, where other memory has inode 0."""
    with open("/proc/self/maps") as lines:
        for line in lines:
            first, _, rest = line.partition("-")
            if int(first, 16) <= address < int(rest[: rest.index(" ")], 16):
                return line.split(maxsplit=5)[4] != "0"
    return False


def pieces(tensor: Tensor, dtype: torch.dtype, mapped: bool = True) -> Iterator[Tensor]:
    """A tensor as `dtype`, in order, at most `PIECE` bytes at a time (a row at least); each is given back after it."""
    flat = tensor.reshape(-1)
    count = max(1, PIECE // flat.element_size())
    for start in range(0, len(flat), count):
        part = flat[start : start + count]
        yield part.to(dtype)
        if mapped:
            release(part)


def trim_heap() -> None:
    """Give back the free memory inside the C library's heap: after loading, and now and then while images come.

    Tensors below 32 MiB come from the heap, and what is kept of them lies between what is not: at full size 0.2 GB that
    no later tensor fits. Does nothing where the C library is not glibc.
    """
    if sys.platform.startswith("linux"):
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(ctypes.c_size_t(0))


def keep_heap() -> None:
    """Have the C library keep what tensors of up to `KEPT` leave for the next, from now on; `trim_heap` gives it back.

    Else many are mappings of their own, whose pages are brought in anew: quantizing a layer of full width with a limit
    of 32 MiB takes 2.8 million faults and 2.0 GiB, with 256 0.8 million, an eighth less time and 3.0 GiB. Larger ones
    are mappings in either case: in the heap they leave holes, another 0.3 GiB. Does nothing without glibc.
    """
    if sys.platform.startswith("linux"):
        option = getattr(ctypes.CDLL(None), "mallopt", None)
        if option is not None:
            option(M_MMAP_THRESHOLD, KEPT)
            option(M_TRIM_THRESHOLD, MOST_INT)


@lru_cache(maxsize=1)
def _madvise() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    function = ctypes.CDLL(None, use_errno=True).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function
