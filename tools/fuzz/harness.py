"""Run the cases of one target and check what must hold of each; a case is its target and its number, nothing else."""

from __future__ import annotations

import random
import resource
import signal
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from qvl_runtime.errors import MAX_MESSAGE, QVLError

CASE_S = 20.0  # of one case; loading a small checkpoint takes one
CASE_BYTES = 1 << 30  # that one case may add to the most memory that the process has had
Case = Callable[[random.Random], object]


class Failure(AssertionError):
    """What must not happen has happened."""


class OutOfTime(BaseException):
    """A case took longer than `CASE_S`; no `except Exception` may swallow it."""


@dataclass(frozen=True, slots=True)
class Target:
    """Something to feed: `make` prepares it once in a process and returns what runs a case."""

    name: str
    make: Callable[[], Case]


def run_case(target: Target, case: Case, number: int) -> str:
    """Run one case: "answered", or "refused" by a `QVLError`. Raises `Failure` for anything else."""
    rng = random.Random(f"{target.name}/{number}")
    before = _peak_bytes()
    outcome = "answered"
    try:
        with _time_limit(CASE_S):
            case(rng)
    except QVLError as error:
        outcome = "refused"
        _check_message(str(error))
    except OutOfTime:
        raise Failure(f"takes more than {CASE_S:.0f} s") from None
    except Failure:
        raise
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise Failure(f"{type(error).__name__}: {error}"[:300] + "\n" + traceback.format_exc(limit=-6)) from None
    if (grown := _peak_bytes() - before) > CASE_BYTES:
        raise Failure(f"takes {grown / 2**20:.0f} MiB of memory")
    return outcome


def run_cases(target: Target, numbers: Iterator[int], report: Callable[[dict[str, object]], None]) -> None:
    """Run cases and report each before it begins, each failure, and the counts."""
    case, counts = target.make(), Counter[str]()
    for number in numbers:
        report({"case": number})
        try:
            counts[run_case(target, case, number)] += 1
        except Failure as failure:
            report({"failed": number, "why": str(failure)})
        report({"counts": dict(counts)})


def _check_message(message: str) -> None:
    if not message or len(message) > MAX_MESSAGE or not message.isprintable():
        raise Failure(f"its message is not one bounded line: {message[:200]!r}")


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    def ring(number: int, frame: FrameType | None) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
