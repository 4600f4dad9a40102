"""The device of the suite: a GPU, or a CPU that stands in for one at tiny sizes; timing and the ceilings.

Times are those of CUDA graphs, which launch without Python: a norm that runs for 3 microseconds takes 33 when it is
called, and timing the calls would show the host.
"""

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
from qvl_kernels.util import cdiv

COPIED = 1 << 30  # bytes of the copy and of the read that are the ceilings
COLD = 160 << 20  # bytes that calls in turns must touch, for each to find nothing of its own in the L2: 50 MB on H100
MOST_CALLS = 24  # in turns
REPLAYS = 7


@dataclass(frozen=True)
class Place:
    """The device that benchmarks run on."""

    device: torch.device
    tiny: bool  # no GPU: kernels run in Triton's interpreter, and their times say nothing
    layers: int | None = None  # of full-size models; None: as published, or as a measurement asks

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

    def seconds(self, *calls: Callable[[], object]) -> float:
        """Seconds of one of the calls, on average: on a GPU the median replay of a graph of all, else a single run.

        A single call is repeated, as a graph of one short kernel would show the launch of the graph.
        """
        if self.tiny:
            began = time.perf_counter()
            for call in calls:
                call()
            return (time.perf_counter() - began) / len(calls)
        for call in calls:
            call()  # compiles, and uploads what is cached
        torch.cuda.synchronize()
        turns = calls if len(calls) > 1 else calls * 4
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in turns:
                call()
        graph.replay()
        return self._median_replay(graph) / len(turns)

    def _median_replay(self, graph: torch.cuda.CUDAGraph) -> float:
        event, taken = partial(torch.cuda.Event, enable_timing=True), []
        for _ in range(REPLAYS):
            start, end = event(), event()
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            taken.append(start.elapsed_time(end) / 1e3)
        return float(median(taken))

    def copies(self, nbytes: int) -> int:
        """How many copies of inputs of `nbytes` to call in turns, so that each call finds a cold L2 if it can.

        Small inputs stay in the L2, as what one kernel wrote does for the next.
        """
        return 1 if self.tiny else min(MOST_CALLS, cdiv(COLD, max(1, nbytes)))

    def copy_ceiling(self) -> float:
        """Bytes a second of a large copy, reads and writes counted."""
        source = self._large()
        target = torch.empty_like(source)
        return 2 * source.nbytes / self.seconds(lambda: target.copy_(source))

    def read_ceiling(self) -> float:
        """Bytes a second of a large read: the largest of all elements."""
        source = self._large().view(torch.float32)
        return source.nbytes / self.seconds(lambda: torch.amax(source))

    def _large(self) -> torch.Tensor:
        return torch.zeros(COPIED >> 10 if self.tiny else COPIED, dtype=torch.int8, device=self.device)

    def wait(self) -> None:
        """Wait for queued work."""
        if not self.tiny:
            torch.cuda.synchronize()

    def settle(self) -> None:
        """Wait for queued work and release unused memory."""
        if not self.tiny:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
