"""Time calls in turns on a shared machine; each sample records the load of other processes."""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from qvl_runtime.host import device_name, machine_cpu_seconds, process_cpu_seconds

DISTURBED = 0.15  # cores that other processes may use during a sample that counts

PAUSE = 0.02  # seconds between two samples: a peer's threads, and torch's, spin for some ms after their last work


class Timing(NamedTuple):
    """The time of one call and how disturbed its samples were."""

    seconds: float  # a call: the median of undisturbed samples, or of the least disturbed third where they are few
    best: float
    samples: int
    undisturbed: int
    load: float  # cores that others used during the samples behind `seconds`


def alternate(
    calls: Mapping[str, Callable[[], object]],
    min_samples: int = 5,
    limit_s: float = 60.0,
    sample_s: float = 0.25,
    processes: tuple[int, ...] = (),
) -> dict[str, Timing]:
    """Time the calls in turns until each has `min_samples` undisturbed samples, or `limit_s` is over.

    processes: ids whose work counts as ours, such as a peer's server.
    """
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    began = time.perf_counter()
    while time.perf_counter() - began < limit_s:
        for name, call in calls.items():
            taken[name].append(_sample(call, sample_s, processes))
        if all(sum(load < DISTURBED for _, load in samples) >= min_samples for samples in taken.values()):
            break
    return {name: _summary(samples) for name, samples in taken.items()}


def others() -> Callable[[], float]:
    """Start watching the machine; the returned function tells how many cores other processes have used since."""
    busy, ours, start = machine_cpu_seconds(), _own_cpu_seconds(()), time.perf_counter()
    return lambda: (
        max(0.0, (machine_cpu_seconds() - busy) - (_own_cpu_seconds(()) - ours)) / (time.perf_counter() - start)
    )


def say(**figures: Any) -> None:
    """Print the figures as one JSON line."""
    print(json.dumps({key: _short(value) for key, value in figures.items()}), flush=True)


def memory_state(read: Timing, nbytes: int) -> dict[str, Any]:
    """The read ceiling of a comparison, and whether it held: some machines' memory is twice as fast in some minutes."""
    return {
        "read_gb_s": nbytes / read.seconds / 1e9,
        "read_best_gb_s": nbytes / read.best / 1e9,
        "memory": "steady" if read.seconds < 1.2 * read.best else "changing",
    }


def setting() -> dict[str, Any]:
    """Date, commit, hardware, torch version and kernels of this run."""
    import torch

    from qvl_kernels import report

    cpu = torch.device("cpu")
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "commit": git.stdout.strip(),
        "hardware": device_name(cpu),
        "torch": torch.__version__,
        "ops": report(cpu)["ops"],
    }


def _sample(call: Callable[[], object], min_s: float, processes: tuple[int, ...]) -> tuple[float, float]:
    time.sleep(PAUSE)
    busy, ours, start, count = machine_cpu_seconds(), _own_cpu_seconds(processes), time.perf_counter(), 0
    while (spent := time.perf_counter() - start) < min_s:
        call()
        count += 1
    spent = time.perf_counter() - start
    return spent / count, max(0.0, (machine_cpu_seconds() - busy) - (_own_cpu_seconds(processes) - ours)) / spent


def _summary(samples: list[tuple[float, float]]) -> Timing:
    calm = [sample for sample in samples if sample[1] < DISTURBED]
    used = calm if len(calm) >= 3 else sorted(samples, key=lambda sample: sample[1])[: max(1, len(samples) // 3)]
    seconds, load = (statistics.median(column) for column in zip(*used, strict=True))
    return Timing(seconds, min(s for s, _ in samples), len(samples), len(calm), load)


def _own_cpu_seconds(processes: tuple[int, ...]) -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    total = used.ru_utime + used.ru_stime
    return total + sum(map(process_cpu_seconds, processes))


def _short(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value
