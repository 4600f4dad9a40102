"""Cores that threads share, in simulated time (simpy), by the rules of Linux's scheduler that make a thread wait.

Each core has a queue of its own. A thread that wakes up goes to the core where it last ran or to another that is idle;
if none is, it waits at the former, unless the thread that runs there has used up its slice, which then waits instead.
With others in its queue, a thread gives way at the first tick after its slice. A core that becomes idle takes a thread
from another queue at once only if that one has not run for `HOT_S`, and any at the next tick: so a thread may wait
while a core is idle.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

TICK_S = 0.004  # CONFIG_HZ=250
SLICE_S = 0.0014  # 0.7 ms, times 1 + log2(cores) of two
HOT_S = 0.0005  # sysctl_sched_migration_cost
_DONE = 1e-9


class Thread:
    """Something that runs on one core at a time."""

    def __init__(self) -> None:
        self.core = 0  # where it last ran
        self.until = -1.0  # when that was
        self.left = 0.0  # seconds that it wants now
        self.done: Any = None


class Cores:
    """The cores of a machine."""

    def __init__(self, env: Any, count: int) -> None:
        self.env = env
        self._running: list[Thread | None] = [None] * count
        self._since = [0.0] * count  # when the running thread began
        self._queues: list[list[Thread]] = [[] for _ in range(count)]
        self._changed = [env.event() for _ in range(count)]
        for core in range(count):
            env.process(self._run(core))

    def compute(self, thread: Thread, seconds: float) -> Iterator[Any]:
        """Run a thread for some time, and wait for its end."""
        thread.left, thread.done = seconds, self.env.event()
        self._wake(thread)
        yield thread.done

    def _wake(self, thread: Thread) -> None:
        count = len(self._running)
        for core in (thread.core, *range(count)):
            if self._running[core] is None and not self._queues[core]:
                break
        else:
            core = thread.core
        self._queues[core].append(thread)
        self._notify(core)

    def _notify(self, core: int) -> None:
        if not self._changed[core].triggered:
            self._changed[core].succeed()

    def _run(self, core: int) -> Iterator[Any]:
        while True:
            thread = self._next(core)
            if thread is None:
                self._changed[core] = self.env.event()
                waiting = any(self._queues)
                yield self._changed[core] | self.env.timeout(self._to_tick()) if waiting else self._changed[core]
                if not self._queues[core]:
                    self._steal(core, hot=True)
                continue
            self._running[core], self._since[core] = thread, self.env.now
            yield from self._until_it_gives_way(core, thread)
            self._running[core] = None
            thread.core, thread.until = core, self.env.now
            if thread.left > _DONE:
                self._queues[core].append(thread)
                for other, running in enumerate(self._running):
                    if running is None:
                        self._notify(other)
            else:
                thread.done.succeed()

    def _until_it_gives_way(self, core: int, thread: Thread) -> Iterator[Any]:
        while thread.left > _DONE:
            began = self.env.now
            self._changed[core] = self.env.event()
            # nothing happens at a tick without others in the queue
            step = min(thread.left, self._to_tick()) if self._queues[core] else thread.left
            yield self._changed[core] | self.env.timeout(step)
            thread.left -= self.env.now - began
            used_up = self.env.now - self._since[core] >= SLICE_S - _DONE
            if self._queues[core] and used_up:
                return

    def _next(self, core: int) -> Thread | None:
        if not self._queues[core]:
            self._steal(core, hot=False)
        return self._queues[core].pop(0) if self._queues[core] else None

    def _steal(self, core: int, hot: bool) -> None:
        """Take a thread from the longest queue of another core."""
        for queue in sorted(self._queues, key=len, reverse=True):
            for thread in queue:
                if hot or self.env.now - thread.until >= HOT_S:
                    queue.remove(thread)
                    self._queues[core].append(thread)
                    return

    def _to_tick(self) -> float:
        return max(_DONE, TICK_S - float(self.env.now) % TICK_S)
