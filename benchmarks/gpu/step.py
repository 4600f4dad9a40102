"""Where the time of a decode step goes: the kernels of its graph by name, with their share of the read ceiling."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.asking import finish, submit, text
from benchmarks.gpu.place import Place
from qvl_runtime import Engine

Row = dict[str, Any]
STEPS = 12
PLACES = ((300, 1), (2048, 1), (8000, 1), (700, 16))  # context and requests
NAMED = 16  # kernels with a row of their own, longest first
GROUPS = {  # by the name of a kernel, first match
    "packed linears": r"small_m_kernel|int4_gemm|int4_wgmma|_dequantize",
    "decode attention": r"decode_kv",
    "attention merge": r"merge_kernel",
    "norms": r"norm_kernel",
    "rotary": r"rotary",
    "swiglu": r"swiglu",
    "sampling": r"greedy|sample|select|top",
    "dense products": r"gemm|gemv|nvjet|cutlass|splitK|xmma|addmm|aten::mm|linear",
}


class Spent(NamedTuple):
    """The time of one kernel in a step."""

    name: str
    us: float
    launches: float


def steps(place: Place, engine: Engine, kind: str) -> Iterator[Row]:
    """For each context and number of requests: a step's wall time, then its groups of kernels, then single kernels.

    Wall times are those of steps launched ahead and, for comparison, of steps in turn (no `overlap`).
    """
    ceiling = place.read_ceiling()
    for context, requests in ((3, 1),) if place.tiny else PLACES:
        with in_turn(engine):
            in_turns = wall_seconds(place, engine, context, requests)
            finish(engine)
        wall = wall_seconds(place, engine, context, requests)
        spent = profiled(place, engine)
        finish(engine)
        at = {"model": kind, "context": context, "requests": requests}
        on_gpu = sum(kernel.us for kernel in spent)
        times = {"wall_us": wall * 1e6, "gpu_us": on_gpu, "in_turn_us": in_turns * 1e6}
        ratios = {"wall_over_gpu": wall * 1e6 / on_gpu, "in_turn_over_gpu": in_turns * 1e6 / on_gpu}
        yield {"what": "step", **at, "ahead": engine.core.overlap is not None, **times, **ratios}
        yield from grouped(spent, bytes_of_groups(engine, context * requests), ceiling, at)
        for kernel in spent[:NAMED]:
            name = kernel.name[:80]
            yield {"what": "kernel", **at, "kernel": name, "us": kernel.us, "launches": kernel.launches}


@contextmanager
def in_turn(engine: Engine) -> Iterator[None]:
    """Read the tokens of each step before the next is launched. The engine must be idle, here and at the end."""
    overlap, engine.core.overlap = engine.core.overlap, None
    try:
        yield
    finally:
        engine.core.overlap = overlap


def wall_seconds(place: Place, engine: Engine, context: int, requests: int) -> float:
    """Seconds of a step of some requests after `context` tokens, which go on decoding."""
    count = 2 if place.tiny else STEPS
    submit(engine, [text(context, 700 + r) for r in range(requests)], 3 * count)
    engine.core.step()
    place.wait()
    began = time.perf_counter()
    for _ in range(count):
        engine.core.step()
    place.wait()
    return (time.perf_counter() - began) / count


def profiled(place: Place, engine: Engine) -> list[Spent]:
    """The kernels of a step of the requests that are decoding, longest first."""
    with profile(activities=[ProfilerActivity.CPU] if place.tiny else [ProfilerActivity.CUDA]) as seen:
        done = sum(bool(engine.core.step()) for _ in range(1 if place.tiny else STEPS // 2))
        place.wait()
    return kernels_of(seen.events(), done, on_gpu=not place.tiny)


def kernels_of(events: Iterable[Any], steps: int, on_gpu: bool) -> list[Spent]:
    """The kernels of a profile of some steps, per step, longest first; without a GPU torch's operators."""
    total: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    for event in events:
        if str(event.device_type).endswith("CUDA" if on_gpu else "CPU"):
            spent = total[event.name]
            spent[0] += event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total
            spent[1] += 1
    kernels = [Spent(name, us / steps, launches / steps) for name, (us, launches) in total.items()]
    return sorted(kernels, key=lambda kernel: -kernel.us)


def grouped(spent: Iterable[Spent], nbytes: dict[str, int], ceiling: float, at: Row) -> Iterator[Row]:
    """A row for each group of kernels: microseconds, launches, and its bytes over time as a share of the ceiling."""
    total: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for kernel in spent:
        name = next((group for group, pattern in GROUPS.items() if re.search(pattern, kernel.name)), "other")
        total[name][0] += kernel.us
        total[name][1] += kernel.launches
    for name, (us, launches) in sorted(total.items(), key=lambda pair: -pair[1][0]):
        rate = nbytes[name] / us * 1e6 if nbytes.get(name) and us else None
        shares: Row = {"gb_s": rate and rate / 1e9, "of_read": rate and rate / ceiling}
        yield {"what": "group", **at, "group": name, "us": us, "launches": launches, **shares}


def bytes_of_groups(engine: Engine, tokens: int) -> dict[str, int]:
    """Bytes that a step must read: packed and dense weights of decoder and head, and the keys and values of `tokens`.

    A dense product among packed ones is the head's.
    """
    model = engine.core.runner.model
    sizes = model.bytes_by_part
    kinds = {part: model.kernels[f"{part} linears"].startswith("int") for part in ("language", "head")}
    return {
        "packed linears": sum(sizes[part] for part, packed in kinds.items() if packed),
        "dense products": sum(sizes[part] for part, packed in kinds.items() if not packed),
        "decode attention": tokens * engine.core.runner.cache.bytes_per_token,
    }
