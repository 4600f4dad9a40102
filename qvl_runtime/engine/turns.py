"""Turns at the core: callers in any number of threads step it together, and one at a time.

A step computes for all requests, of every thread. So a thread that waits for its request takes a turn and steps
the core if no other thread does, and otherwise sleeps until a step has ended. What must run between two steps (a new
request, a score, a report) goes before the next one.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import torch

from qvl_runtime.errors import ForkError, QVLError
from qvl_runtime.schedule.core import EngineCore
from qvl_runtime.schedule.request import Request

RECHECK_S = 0.5  # a sleeping thread looks again, should Ctrl-C have hit the thread that was about to wake it
_made_in: set[int] = set()  # the ids of this process and of those it was forked from that made an engine
Ready: TypeAlias = "Callable[[], object]"


def check_fork() -> None:
    """Raise `ForkError` where an engine cannot be made: torch's threads, once they run, are lost in a forked child."""
    if (parents := _made_in - {os.getpid()}) and torch.get_num_threads() > 1:
        raise ForkError(
            f"process {max(parents)} made an engine before it was forked, and torch's threads do not exist in child "
            f"{os.getpid()}: make engines only after the fork, start workers by spawn, or call torch.set_num_threads(1)"
        )


@dataclass(slots=True, eq=False)
class Waiter:
    """A thread that waits until something is ready. The thread that ends a turn looks, before another can begin one."""

    ready: Ready
    urgent: bool = False
    is_ready: bool = False


class Turns:
    """Serializes the use of an `EngineCore`. Only the process that made it may use it."""

    def __init__(self, core: EngineCore) -> None:
        self._core = core
        self._pid = os.getpid()
        _made_in.add(self._pid)
        self._changed = threading.Condition()  # protects what follows; never held during a step
        self._owner: int | None = None  # the thread whose turn it is
        self._stepping = False  # whether the owner is in a step
        self._waiters: list[Waiter] = []  # those that have waited longest first
        self._canceled: deque[Request] = deque()

    def check_process(self) -> None:
        """Raise `ForkError` in a forked child: the threads that compute do not exist there, and it would hang."""
        if (pid := os.getpid()) != self._pid:
            raise ForkError(
                f"the engine was made in process {self._pid} and cannot be used in its forked child {pid}: make it "
                "after the fork, or start workers by spawn instead of fork"
            )

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Have the core for oneself, between two steps. A thread that already has it keeps it.

        Raises `ForkError` in a forked child, and `QVLError` within a step of the same thread.
        """
        self.check_process()
        me = threading.get_ident()
        if self._owner == me:
            self._check_not_stepping()
            yield
            return
        try:
            self._take(me, urgent=True)
            yield
        finally:
            self._release(me)

    def step_until(self, ready: Ready) -> None:
        """Step the core, in turns with other threads, until `ready()` is true: called between steps, in any thread.

        Raises `ForkError` in a forked child, and `QVLError` within a turn of the same thread.
        """
        while not self.step_once(ready):
            continue

    def step_once(self, ready: Ready) -> bool:
        """Take one step as `step_until` does, or none if `ready()` is true, which is returned."""
        self.check_process()
        me = threading.get_ident()
        if self._owner == me:  # within `exclusive`
            self._check_not_stepping()
            if not (done := bool(ready())):
                self._step()
            return done
        try:
            if not self._take(me, ready):
                return True
            self._step()
            return False
        finally:
            self._release(me)

    def cancel(self, request: Request) -> None:
        """Cancel a request: at once if no thread has a turn, otherwise when that turn ends. Never waits for a step.

        A finalizer of a dropped stream may call it, in any thread and at any time.
        """
        if os.getpid() != self._pid:
            return  # the child's copy of a request
        self._canceled.append(request)
        with self._changed:
            if self._owner is None or (self._owner == threading.get_ident() and not self._stepping):
                self._run_cancellations()

    def _check_not_stepping(self) -> None:
        if self._stepping:
            raise QVLError("the engine is in the middle of a step of this thread: call it when that call has returned")

    def _step(self) -> None:
        self._stepping = True
        try:
            if not self._core.step():
                raise RuntimeError("requests are unanswered, but none can make progress")
        finally:
            self._stepping = False

    def _take(self, me: int, ready: Ready = lambda: False, urgent: bool = False) -> bool:
        """Wait for the turn; returns False, without it, as soon as `ready()` is true."""
        waiter = Waiter(ready, urgent)
        with self._changed:
            self._waiters.append(waiter)
            try:
                while True:
                    if self._owner is None:
                        waiter.is_ready = waiter.is_ready or bool(ready())
                    if waiter.is_ready:
                        return False
                    if self._owner is None and self._is_next(waiter):
                        self._owner = me
                        return True
                    self._changed.wait(RECHECK_S)
            finally:
                self._waiters.remove(waiter)

    def _is_next(self, waiter: Waiter) -> bool:
        """Whether a waiter may have the turn: what is urgent first, in the order of coming, so that none starves."""
        return next((other for other in self._waiters if other.urgent), waiter) is waiter

    def _release(self, me: int) -> None:
        """End the turn if this thread has it."""
        if self._owner != me:
            return
        try:
            with self._changed:
                self._run_cancellations()
                for waiter in self._waiters:
                    waiter.is_ready = waiter.is_ready or bool(waiter.ready())
                self._owner = None
                self._changed.notify_all()
        finally:
            if self._owner == me:
                self._owner = None

    def _run_cancellations(self) -> None:
        while self._canceled:
            self._core.cancel(self._canceled.popleft())
