"""Faults of a step: whose they are, and what that request's error says."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Sequence
from typing import TypeVar

from qvl_runtime.errors import CapacityError, QVLError, StepError
from qvl_runtime.schedule.request import Request
from qvl_runtime.schedule.scheduler import ScheduledBranch

_log = logging.getLogger("qvl_runtime")
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory")
T = TypeVar("T")


def compute_contained(
    plan: Sequence[ScheduledBranch],
    compute: Callable[[Sequence[ScheduledBranch]], list[T]],
    fail: Callable[[Request, QVLError], None],
) -> list[T]:
    """Compute a plan; if that raises, compute it by halves, down to the request that raises alone, and fail that one.

    One faulty request among R costs about 2 log2(R) more computations, once: it is gone afterwards. If only the whole
    is too large for memory, none fails. `compute` leaves everything as it was when it raises. Ctrl-C passes through.
    """
    requests = list(dict.fromkeys(planned.branch.request for planned in plan))
    try:
        return compute(plan)
    except Exception as fault:
        if len(requests) == 1:
            fail(requests[0], error_of(fault))
            return []
    results = []
    for half in (requests[: len(requests) // 2], requests[len(requests) // 2 :]):
        part = set(half)
        results += compute_contained([planned for planned in plan if planned.branch.request in part], compute, fail)
    return results


def error_of(fault: Exception) -> QVLError:
    """Return the error of a request that cannot be computed because of `fault`, and log what is no error of a user.

    The traceback becomes text: its frames would keep the tensors and all requests of the step as long as the error.
    """
    if isinstance(fault, QVLError):
        return fault.with_traceback(None)
    place = "".join(traceback.format_exception(fault))
    fault.__traceback__ = None
    named = f"{type(fault).__name__}: {fault}"
    error: QVLError
    if isinstance(fault, MemoryError) or any(words in str(fault).lower() for words in _OUT_OF_MEMORY):
        error = CapacityError(
            f"memory ran out while the request was computed ({named}): shorten it, lower max_step_tokens, or leave it "
            "more with a smaller kv_cache_bytes"
        )
    else:
        error = StepError(f"the request could not be computed, because of a bug or a fault of the machine: {named}")
        _log.error("a request failed: %s\n%s", error, place)
    if hasattr(error, "add_note"):  # Python 3.11: shown with the error's own traceback
        error.add_note(place)
    error.__cause__ = fault
    return error
