"""Memory for the outputs of ops on a CPU: aligned allocations that reuse holes of the same size."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from qvl_kernels.cpu.library import library

LINE = 64  # bytes
LARGE = 32 << 10  # bytes; for smaller tensors the 3 us of Python are not worth it


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Allocate an uninitialized tensor, aligned to a cache line.

    Torch requests aligned memory from the C library, and glibc (2.36) searches for a hole 96 bytes larger, which a
    freed tensor of the same size never leaves: each layer of a step allocated above the holes of the previous ones.
    Nano's heap grew by 19 MiB over 2048 tokens while 8 MiB were in use at once. A plain request for 64 bytes more,
    aligned here, fits such a hole: 5 MiB. While a step is recorded, torch allocates the tensor, and the recording moves
    it to its arena.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < LARGE or library().records:
        return torch.empty(shape, dtype=dtype)
    raw = torch.from_numpy(np.empty(nbytes + LINE, np.uint8))
    start = -raw.data_ptr() % LINE
    return raw[start : start + nbytes].view(dtype).view(shape)


def empty_like(x: Tensor) -> Tensor:
    """Allocate `empty` memory of the shape and dtype of x, contiguous."""
    return empty(x.shape, x.dtype)
