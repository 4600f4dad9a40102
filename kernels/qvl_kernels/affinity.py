"""The CPUs that a process may use, also where OpenMP has bound its first thread to one of its places.

With OMP_PROC_BIND, OMP_PLACES or GOMP_CPU_AFFINITY, loading libgomp binds the thread that loads it. Every thread that
is started from there inherits the mask, unless OpenMP starts it: those of the kernels would share one core.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
from contextlib import suppress
from pathlib import Path

BINDS = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")
_RUNTIME = re.compile(r"/lib[gi]?omp[^/]*$")  # of gcc, Intel and LLVM


def allowed_cpus() -> set[int]:
    """The CPUs of the calling thread's mask; those of all places, if OpenMP has bound the thread to one of them."""
    if not hasattr(os, "sched_getaffinity"):
        return set(range(os.cpu_count() or 1))
    mask, places = os.sched_getaffinity(0), openmp_places()
    return set().union(*places) if mask in places else mask


def unbind() -> None:
    """Let this thread and the process's first one run on all allowed CPUs, if OpenMP has bound them.

    Threads that they start afterwards are free to, too. OpenMP's own threads stay where they are bound.
    """
    places = openmp_places()
    for thread in (0, os.getpid()) if places else ():
        if os.sched_getaffinity(thread) in places:
            with suppress(OSError):  # a cpuset that was changed since
                os.sched_setaffinity(thread, set().union(*places))


def openmp_places() -> list[set[int]]:
    """The CPUs of each place that a loaded OpenMP runtime binds threads to; none where it was not asked to bind."""
    if not sys.platform.startswith("linux") or not any(os.environ.get(name) for name in BINDS):
        return []
    places = []
    for path in _loaded():
        with suppress(OSError, AttributeError):
            runtime = ctypes.CDLL(path)
            for place in range(runtime.omp_get_num_places()):
                cpus = (ctypes.c_int * runtime.omp_get_place_num_procs(place))()
                runtime.omp_get_place_proc_ids(place, cpus)
                places.append(set(cpus))
    return places


def _loaded() -> list[str]:
    """The paths of OpenMP runtimes in this process's memory."""
    lines = Path("/proc/self/maps").read_text(errors="replace").split("\n")
    paths = {line.split(maxsplit=5)[5] for line in lines if len(line.split(maxsplit=5)) == 6}
    return sorted(path for path in paths if _RUNTIME.search(path))
