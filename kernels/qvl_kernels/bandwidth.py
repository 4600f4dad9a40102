"""The measured memory bandwidth of a device: the roofline for memory-bound kernels in the same run."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from qvl_kernels.cpu.library import LibraryError, library


class Reader(NamedTuple):
    """A call that reads memory as fast as the device can."""

    call: Callable[[], object]
    nbytes: int  # bytes read by one call; on a GPU also those written
    how: str  # the method, for the report


def reader(device: torch.device, nbytes: int) -> Reader:
    """Return a reader of a new buffer of `nbytes`, which should be larger than the caches.

    On a GPU it copies, as GPU bandwidth benchmarks do, and each byte counts twice: read and written.
    """
    if device.type == "cuda":
        source, target = (torch.empty(nbytes // 2, dtype=torch.uint8, device=device) for _ in range(2))
        return Reader(lambda: target.copy_(source), 2 * len(source), "copy in device memory")
    try:
        kernels = library()
    except LibraryError:
        values = torch.ones(nbytes // 8, dtype=torch.int64)
        return Reader(values.sum, values.nbytes, "torch.sum, because the C++ kernels are not built")
    from qvl_kernels.memory import buffer

    memory, total = buffer(nbytes >> 20 << 20).random_(), torch.zeros(1, dtype=torch.int32)

    def read() -> None:
        kernels.ready().read_memory(memory.data_ptr(), len(memory), total.data_ptr())

    return Reader(read, len(memory), "read of huge pages, all threads")
