"""Memory in mappings of its own: given back to the system when a tensor goes, whatever else the heap holds."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

from qvl_kernels.cpu_library import library

HUGE_PAGE = 2 << 20  # bytes; the smallest buffer that gains from them
LINE = 64


def buffer(nbytes: int) -> Tensor:
    """Uninitialised bytes, uint8 [nbytes]: in huge pages where they fill one, aligned to a cache line else.

    Of the mapping only what is written becomes memory. From torch's allocator the same bytes came out of a heap that
    the checkpoint's tensors had been in before: the up to 2 MiB beside each aligned buffer were resident, and what a
    tensor left behind was too small for the next. Both together were 0.7 GB at full size.
    """
    if nbytes < HUGE_PAGE:
        return _aligned(torch.empty(nbytes + LINE, dtype=torch.uint8), nbytes, LINE)
    memory = _aligned(mapping(nbytes + HUGE_PAGE), nbytes, HUGE_PAGE)
    library().ready().advise_huge(memory.data_ptr(), nbytes)
    return memory


def mapping(nbytes: int) -> Tensor:
    """Bytes of zeros, uint8 [nbytes], in pages of the system's usual size."""
    own = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    return torch.frombuffer(mmap.mmap(-1, nbytes, **own), dtype=torch.uint8)


def _aligned(raw: Tensor, nbytes: int, to: int) -> Tensor:
    start = -raw.data_ptr() % to
    return raw[start : start + nbytes]
