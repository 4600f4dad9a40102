"""CUDA graphs for `decode_graphs`, and the memory meter of a CUDA device for `engine.warm_up`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qvl_runtime.schedule.decode_graphs import Captured


class CudaCapture:
    """Captures CUDA graphs on a side stream. All graphs share one memory pool, as they never run at the same time."""

    def __init__(self, device: torch.device) -> None:
        self._stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()
        self.nbytes = None  # not counted separately by torch's allocator

    def __call__(self, function: Callable[[], Tensor]) -> Captured:
        """Run `function` once to warm up, then capture it."""
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            function()  # warm-up: compiling kernels and allocating library workspaces cannot be captured
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            output = function()
        current.wait_stream(self._stream)
        return Captured(graph.replay, output)


class CudaMeter:
    """Measures the memory of a CUDA device, in bytes."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._before = device, 0

    def begin(self) -> None:
        """Start measuring growth from here."""
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)
        self._before = torch.cuda.memory_allocated(self._device)

    def grown(self) -> int:
        """Return the peak growth since `begin`, fragmentation of the allocator's blocks included."""
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_reserved(self._device) - self._before

    def free(self) -> int:
        """Return the free bytes, after returning the allocator's unused memory to the device."""
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self._device)[0]
