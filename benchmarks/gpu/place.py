"""The device of the suite: a GPU, or a CPU that stands in for one at tiny sizes; timing and the copy ceiling."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch

from qvl_kernels.gpus import find_gpu
from qvl_kernels.ops import Ops

COPIED = 1 << 30  # bytes of the copy that is the ceiling


@dataclass(frozen=True)
class Place:
    """The device that benchmarks run on."""

    device: torch.device
    tiny: bool  # no GPU: kernels run in Triton's interpreter, and their times say nothing

    @classmethod
    def find(cls) -> Place:
        """The first GPU, or this CPU; then sets the interpreter's variables, before triton is imported."""
        if torch.cuda.is_available():
            return cls(torch.device("cuda", 0), False)
        os.environ["TRITON_INTERPRET"], os.environ["QVL_KERNELS"] = "1", "triton"
        return cls(torch.device("cpu"), True)

    @property
    def ops(self) -> Ops:
        """The module of ops for this device."""
        from qvl_kernels import ops_for

        return ops_for(self.device)

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """The dtypes to test; not bfloat16 in the interpreter, which computes it wrongly."""
        return (torch.float16,) if self.tiny else (torch.float16, torch.bfloat16)

    @property
    def peak(self) -> int | None:
        """Bytes a second by the data sheet, or None for an unknown GPU."""
        name = "" if self.tiny else torch.cuda.get_device_name(self.device)
        gpu = find_gpu(name)
        return gpu.bandwidth if gpu else None

    def seconds(self, call: Callable[[], object]) -> float:
        """Seconds of a call: on a GPU the median of 20 with a cold cache, else a single run."""
        if self.tiny:
            began = time.perf_counter()
            call()
            return time.perf_counter() - began
        call()
        flushed = torch.empty(256 << 20, dtype=torch.int8, device=self.device)
        event = partial(torch.cuda.Event, enable_timing=True)
        events = [(event(), event()) for _ in range(20)]
        for start, end in events:
            flushed.zero_()  # larger than any L2
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return float(median(start.elapsed_time(end) for start, end in events)) / 1e3

    def copy_ceiling(self) -> float:
        """Bytes a second of a large copy, reads and writes counted."""
        size = COPIED >> 10 if self.tiny else COPIED
        source = torch.zeros(size, dtype=torch.int8, device=self.device)
        target = torch.empty_like(source)
        return 2 * size / self.seconds(lambda: target.copy_(source))

    def settle(self) -> None:
        """Wait for queued work and release unused memory."""
        if not self.tiny:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
