"""How fast a device reads memory at best: what memory-bound kernels are held against, in the same run."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from qvl_kernels.cpu.library import LibraryError, library


class Reader(NamedTuple):
    """A call that reads `nbytes`, and how it does."""

    call: Callable[[], object]
    nbytes: int
    how: str


def reader(device: torch.device, nbytes: int) -> Reader:
    """Something that reads a buffer of its own as fast as the device can; take one larger than the caches.

    On a GPU a copy, whose bytes count twice: it is what such devices are measured with.
    """
    if device.type == "cuda":
        source, target = (torch.empty(nbytes // 2, dtype=torch.uint8, device=device) for _ in range(2))
        return Reader(lambda: target.copy_(source), 2 * len(source), "copy in device memory")
    try:
        kernels = library()
    except LibraryError:
        words = torch.ones(nbytes // 8, dtype=torch.int64)
        return Reader(words.sum, words.nbytes, "torch.sum, since the C++ kernels are not built")
    from qvl_kernels.memory import buffer

    memory, total = buffer(nbytes >> 20 << 20).random_(), torch.zeros(1, dtype=torch.int32)
    return Reader(
        lambda: kernels.ready().read_memory(memory.data_ptr(), len(memory), total.data_ptr()), len(memory),
        "read of huge pages, all threads",
    )  # fmt: skip
