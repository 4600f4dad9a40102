"""Return unused memory to the OS: pages of mapped files, and free memory in the heap."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from qvl_kernels.util import cdiv

if TYPE_CHECKING:
    import torch
    from torch import Tensor

HEAP_LIMIT = 256 << 20  # bytes: `keep_heap` keeps smaller tensors in the heap; 4096 x 12288 floats are 192 MiB
PIECE_BYTES = 32 << 20  # of a tensor in memory at once while it is copied
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
INT_MAX = 2**31 - 1


def release(tensor: Tensor) -> None:
    """Drop the pages of a view of a mapped file; reading the view again reads the file again.

    Other tensors are left alone: they would lose their content. Without this, a process that reads a 9 GB file once
    stays 9 GB large until it unmaps the file. Does nothing if the OS has no madvise.
    """
    from qvl_runtime.host import is_file_mapping  # imports torch

    advise = _madvise()
    if advise is None or not tensor.is_contiguous():
        return
    page = mmap.PAGESIZE
    start = cdiv(tensor.data_ptr(), page) * page
    end = (tensor.data_ptr() + tensor.nbytes) // page * page
    if end > start and is_file_mapping(start):
        advise(start, end - start, mmap.MADV_DONTNEED)


def pieces(
    tensor: Tensor, dtype: torch.dtype, mapped: bool = True, check: Callable[[Tensor, Tensor], object] | None = None
) -> Iterator[Tensor]:
    """Yield a tensor as flat pieces of `dtype`, in order, at most `PIECE_BYTES` each; mapped pages are released.

    check: called with each piece as stored and in `dtype`.
    """
    flat = tensor.reshape(-1)
    count = max(1, PIECE_BYTES // flat.element_size())
    for start in range(0, len(flat), count):
        part = flat[start : start + count]
        converted = part.to(dtype)
        if check is not None:
            check(part, converted)
        yield converted
        if mapped:
            release(part)


def trim_heap() -> None:
    """Return free memory inside the C library's heap to the OS.

    Called after loading, and periodically while images are encoded. Tensors below 32 MiB come from the heap, and those
    that stay are scattered among those that are freed: at full size 0.2 GB of holes that no later tensor fits. Does
    nothing if the C library is not glibc.
    """
    if sys.platform.startswith("linux"):
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(ctypes.c_size_t(0))


def keep_heap() -> None:
    """Have the C library reuse the memory of freed tensors up to `HEAP_LIMIT`; `trim_heap` returns it to the OS.

    By default many are mappings of their own, whose pages are faulted in again each time: quantizing a layer of full
    width with a limit of 32 MiB causes 2.8 million faults and needs 2.0 GiB; with 256 MiB, 0.8 million faults, an
    eighth less time and 3.0 GiB. Larger tensors stay mappings: in the heap they leave holes, another 0.3 GiB. Does
    nothing without glibc.
    """
    if sys.platform.startswith("linux"):
        option = getattr(ctypes.CDLL(None), "mallopt", None)
        if option is not None:
            option(M_MMAP_THRESHOLD, HEAP_LIMIT)
            option(M_TRIM_THRESHOLD, INT_MAX)


@lru_cache(maxsize=1)
def _madvise() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    function = ctypes.CDLL(None, use_errno=True).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function
