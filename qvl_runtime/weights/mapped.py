"""Tensors that are views of a mapped file: taken a piece at a time, and their memory given back afterwards."""

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

PIECE = 32 << 20  # bytes of a tensor that are in memory at once while it is copied


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


def pieces(tensor: Tensor, dtype: torch.dtype, mapped: bool = True) -> Iterator[Tensor]:
    """A tensor as `dtype`, in order, at most `PIECE` bytes at a time (a row at least); each is given back after it."""
    flat = tensor.reshape(-1)
    count = max(1, PIECE // flat.element_size())
    for start in range(0, len(flat), count):
        part = flat[start : start + count]
        yield part.to(dtype)
        if mapped:
            release(part)


@lru_cache(maxsize=1)
def _madvise() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    function = ctypes.CDLL(None, use_errno=True).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function
