"""Memory for what ops give on a CPU: places in the heap that fit the next tensor of the same size."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from qvl_kernels.cpu.library import library

LINE = 64  # bytes
LARGE = 32 << 10  # bytes from which on a tensor's place is worth 3 us of Python


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialized tensor, aligned to a cache line.

    Torch asks the C library for aligned memory, and glibc (2.36) looks for a hole of 96 bytes more than that, which a
    tensor of the same size never left: each layer of a step went on above the holes of those before. Nano's heap grew
    by 19 MiB in 2048 tokens of which 8 were in use at once. A plain request of 64 bytes more, aligned here, fits such
    a hole: 5 MiB. While a step is recorded, torch makes the tensor: its recording takes those over.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < LARGE or library().records:
        return torch.empty(shape, dtype=dtype)
    raw = torch.from_numpy(np.empty(nbytes + LINE, np.uint8))
    start = -raw.data_ptr() % LINE
    return raw[start : start + nbytes].view(dtype).view(shape)


def empty_like(x: Tensor) -> Tensor:
    """The same of the shape and dtype of x, contiguous."""
    return empty(x.shape, x.dtype)
