"""Do jobs in processes with a GPU context of their own, so that kernels compile in parallel into Triton's cache."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Any, NamedTuple, TypeVar

Job = TypeVar("Job")
MOST_WORKERS = 14  # each holds a context of half a GB, and a model of two layers


class Done(NamedTuple):
    """A finished job: its seconds, what went wrong, and what it returned."""

    job: object
    seconds: float
    error: str | None
    result: Any = None


def workers_here() -> int:
    """Processes for this machine: one a core, but two."""
    return min(MOST_WORKERS, (os.cpu_count() or 1) - 2)


def do_all(work: Callable[[Job], object], jobs: Sequence[Job], workers: int | None = None) -> Iterator[Done]:
    """Do each job in one of some processes, as they finish; `work` is a function of a module. 0 workers: in this one.

    workers: None for `workers_here`.
    """
    workers = min(workers_here() if workers is None else workers, len(jobs))
    if workers < 1:
        yield from (_timed(work, job) for job in jobs)
        return
    spawn = multiprocessing.get_context("spawn")  # a forked process could not use CUDA
    with ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        job_of = {pool.submit(partial(_timed, work), job): job for job in jobs}
        for future in as_completed(job_of):
            try:
                yield future.result()
            except BrokenProcessPool as fault:
                yield Done(job_of[future], 0.0, f"the process ended: {fault}")


def _timed(work: Callable[[Job], object], job: Job) -> Done:
    began, error, result = time.perf_counter(), None, None
    try:
        result = work(job)
    except Exception as fault:  # reported in the job's row
        error = f"{type(fault).__name__}: {str(fault)[:200]}"
    return Done(job, time.perf_counter() - began, error, result)
