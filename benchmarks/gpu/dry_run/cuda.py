"""torch.cuda as on an H100: streams, events and graphs that record what is launched, and answers about the device."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.gpu.dry_run.binding import Bound
from qvl_kernels.gpus import gpu_named

GPU = "H100 80GB HBM3"
ALLOCATED = 8 << 30  # bytes: any number will do


class Stream:
    """A stream of which nothing has to be awaited."""

    device = torch.device("cuda", 0)
    cuda_stream = 0

    def __init__(self, *_: Any, **__: Any) -> None:
        """Any device and priority."""

    def wait_stream(self, stream: object) -> None:
        """Nothing is queued."""

    def synchronize(self) -> None:
        """Nothing is queued."""


class Event:
    """An event that takes the time of the host."""

    def __init__(self, enable_timing: bool = False) -> None:
        self._timing, self._at = enable_timing, 0.0

    def record(self, stream: object = None) -> None:
        """Note the time."""
        self._at = time.perf_counter()

    def synchronize(self) -> None:
        """Nothing is queued."""

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds; raises RuntimeError for events without times, as torch does."""
        if not (self._timing and end._timing):
            raise RuntimeError("both events should be created with enable_timing=True")
        return max(1e-3, 1e3 * (end._at - self._at))


class Graphs:
    """Graphs that replay the names of their launches."""

    def __init__(self, bound: Bound) -> None:
        bound_launches = bound

        class CUDAGraph:
            """A graph: the launches between its capture's beginning and end."""

            def __init__(self, *_: Any) -> None:
                self.launches: list[str] | None = None

            def replay(self) -> None:
                """Launch them again; raises RuntimeError for a graph that was not captured."""
                if self.launches is None:
                    raise RuntimeError("called CUDAGraph::replay without a preceding successful capture")
                bound_launches.replay(self.launches)

        @contextmanager
        def graph(captured: CUDAGraph, pool: object = None, stream: object = None) -> Iterator[None]:
            with bound_launches.captured() as launches:
                yield
            captured.launches = launches

        self.CUDAGraph, self.graph = CUDAGraph, graph


class Profile:
    """Of torch.profiler: the launches inside the block, each of a microsecond."""

    def __init__(self, bound: Bound) -> None:
        self._bound, self._first, self._last = bound, 0, 0

    def __call__(self, **_: Any) -> Profile:
        """Any activities."""
        return self

    def __enter__(self) -> Profile:
        self._bound.names.clear()
        return self

    def __exit__(self, *_: object) -> None:
        self._launched = [*self._bound.names]

    def events(self) -> list[Any]:
        """Events as the profiler has them, as far as the suite reads them."""
        taken = SimpleNamespace(elapsed_us=lambda: 1.0)
        return [SimpleNamespace(name=n, device_type="DeviceType.CUDA", time_range=taken) for n in self._launched]


@contextmanager
def pretended_cuda(bound: Bound, name: str = GPU) -> Iterator[None]:
    """Replace what the package and the suite use of torch.cuda. name: of the GPU, as in `qvl_kernels.gpus`."""
    gpu, graphs, stream = gpu_named(name), Graphs(bound), Stream()
    capability = divmod(gpu.capability, 10)
    properties = SimpleNamespace(
        name=f"NVIDIA {GPU}",
        major=capability[0],
        minor=capability[1],
        total_memory=gpu.memory,
        multi_processor_count=gpu.sms,
    )
    answers: dict[str, Any] = {
        "is_available": True,
        "is_initialized": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_name": properties.name,
        "get_device_capability": capability,
        "get_device_properties": properties,
        "mem_get_info": (gpu.memory - ALLOCATED, gpu.memory),
        "memory_allocated": ALLOCATED,
        "memory_reserved": ALLOCATED,
        "max_memory_allocated": ALLOCATED,
        "max_memory_reserved": ALLOCATED,
        "graph_pool_handle": (0, 0),
        "current_stream": stream,
        "synchronize": None,
        "empty_cache": None,
        "reset_peak_memory_stats": None,
        "set_device": None,
    }
    replaced: dict[str, Any] = {name: _answering(answer) for name, answer in answers.items()}
    replaced |= {"Stream": Stream, "Event": Event, "CUDAGraph": graphs.CUDAGraph, "graph": graphs.graph}
    replaced |= {"stream": _entered, "device": _entered}
    with ExitStack() as stack:
        for name, value in replaced.items():
            stack.enter_context(patch.object(torch.cuda, name, value))
        stack.enter_context(patch("torch.profiler.profile", Profile(bound)))
        yield


def _answering(answer: Any) -> Any:
    return lambda *_, **__: answer


@contextmanager
def _entered(_: object) -> Iterator[None]:
    yield
