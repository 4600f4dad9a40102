"""Processor time of some processes and all that they start, by what each is, read from /proc while they run."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

_PROC = Path("/proc")
_TICKS = os.sysconf("SC_CLK_TCK")
# what is in a command line, and what to call the process: the first that fits
_KINDS = (
    ("prompt.isolation.worker", "picture decoders"),
    ("ray::", "actors"),
    ("gcs_server", "gcs"),
    ("raylet/raylet", "raylet"),
    ("/ray/", "other Ray processes"),
)


class ProcessTimes:
    """Seconds of processor time since now, by kind of process. What one takes after its last `look` is not seen."""

    def __init__(self, roots: Mapping[int, str]) -> None:
        """roots: what to call each of the processes, whose descendants are looked at, too."""
        self._roots = set(roots)
        self._kinds = dict(roots)
        self._seconds: dict[int, float] = {}
        self.look()
        self._before = dict(self._seconds)

    def look(self) -> None:
        """Read all of them."""
        found = {int(path.name): _stat(path) for path in _PROC.glob("[0-9]*")}
        alive = {pid: stat for pid, stat in found.items() if stat is not None}
        for pid, (_, seconds) in alive.items():
            if self._is_ours(pid, alive):
                self._seconds[pid] = seconds
                self._kinds[pid] = self._kind(pid)

    def by_kind(self) -> dict[str, float]:
        """What was found so far."""
        total: dict[str, float] = defaultdict(float)
        for pid, seconds in self._seconds.items():
            total[self._kinds[pid]] += seconds - self._before.get(pid, 0.0)
        return dict(total)

    def _is_ours(self, pid: int, alive: dict[int, tuple[int, float]]) -> bool:
        while pid not in self._kinds:
            if pid not in alive:
                return False
            pid = alive[pid][0]
        return True

    def _kind(self, pid: int) -> str:
        """What it is by now: a worker of Ray's is renamed when it becomes an actor, and when it ends has no name."""
        before = self._kinds.get(pid, "others")
        if pid in self._roots:
            return before
        try:
            command = (_PROC / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            return before
        return next((kind for part, kind in _KINDS if part in command), before)


def _stat(path: Path) -> tuple[int, float] | None:
    """Parent and seconds of a process; None if it has ended."""
    try:
        fields = (path / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return int(fields[1]), (int(fields[11]) + int(fields[12])) / _TICKS


def seconds_of(path: Path) -> float:
    """Seconds of a process, or of a thread, by its folder in /proc; 0 if it has ended."""
    found = _stat(path)
    return 0.0 if found is None else found[1]


def running_seconds(path: Path) -> float:
    """The same to the nanosecond, where the system counts them."""
    try:
        return int((path / "schedstat").read_text().split()[0]) / 1e9
    except (OSError, IndexError):
        return seconds_of(path)
