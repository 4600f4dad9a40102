"""The workers of this process, started when they are needed or ahead, and the rules by which images share them.

Each image begins in the quick lane. One that is large, or takes longer than its size explains, continues in the slow
lane with the machine's leftover time, or starts over there when it is its turn: so it delays no one but its like.

The quick lane holds as many images as there are cores: to start more workers takes processor time from those that work,
and from the model, when there is least of it. A server starts its workers before it takes requests.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time

from qvl_runtime.cores import usable_cores
from qvl_runtime.errors import ImageError
from qvl_runtime.prompt.cancellation import Cancellation
from qvl_runtime.prompt.isolation.lanes import Lane
from qvl_runtime.prompt.isolation.messages import Disconnected
from qvl_runtime.prompt.isolation.process import Job, Worker
from qvl_runtime.prompt.preparing import Admit, Prepared

_log = logging.getLogger("qvl_runtime")
QUICK_PIXELS = 2**24  # of an image in the quick lane, at most: what phones take by default
_MAX_QUICK, _SLOW_IMAGES = 8, 2
_SLOW_PIXELS = 2**27  # together: up to 2 GiB, if they are WebP
# The CPU time that an image may take in the quick lane: what JPEG and PNG take on a slow core, and a half more. It is
# not time by the clock, of which any image takes long on a busy machine.
_QUICK_S, _QUICK_S_PER_PIXEL, _QUICK_S_PER_BYTE = 0.04, 5e-8, 1e-7
# Idle workers that are kept for good, of 25 MB each, unless they were started ahead; as many as may be busy at a time
# are kept for `_IDLE_S`, since a start takes 100 ms of CPU time, five times what a small image takes.
_MAX_IDLE, _IDLE_S = 2, 5.0


class Pool:
    """Decodes images in worker processes, for any number of threads."""

    def __init__(self) -> None:
        self._quick_images = max(2, min(_MAX_QUICK, usable_cores().threads))
        self._quick = Lane(self._quick_images, self._quick_images * QUICK_PIXELS)
        self._slow = Lane(_SLOW_IMAGES, _SLOW_PIXELS)
        self._lock = threading.Lock()
        self._idle: list[Worker] = []
        self._workers: set[Worker] = set()
        self._since: dict[Worker, float] = {}  # when each of the idle ones became so
        self._starts_spare = self._trims = False
        self._kept = _MAX_IDLE

    def start_ahead(self) -> None:
        """Start the workers of the quick lane, wait until they have started, and keep as many for good.

        Raises `ImageError` if one does not start.
        """
        with self._lock:
            self._kept = self._quick_images
            count = self._kept - len(self._workers)
        started = list[Worker]()
        try:
            for _ in range(count):
                started.append(self._started())
            for worker in started:
                worker.wait_for_start()
        finally:
            for worker in started:
                self._give_back(worker)

    def decode(self, job: Job, pixels: memoryview, admit: Admit, cancellation: Cancellation) -> Prepared:
        """Decode an image into `pixels`, S x S x 3 bytes. Its time limit does not count the wait for other images.

        Raises `ImageError`, what `admit` raises, and `Canceled`.
        """
        self._quick.enter(0, cancellation)
        turn = _Turn(self._quick, 0)
        try:
            found = self._attempt(job, pixels, admit, cancellation, turn)
            if isinstance(found, Prepared):
                return found
            turn.end()
            self._slow.enter(found, cancellation)
            turn = _Turn(self._slow, found)
            done = self._attempt(job, pixels, admit, cancellation, turn)
            if isinstance(done, Prepared):
                return done
            raise ImageError(f"{job.described} has another size each time that it is read")
        finally:
            turn.end()

    def close(self) -> None:
        """Kill all workers, and wait for their end."""
        with self._lock:
            workers, self._workers, self._idle, self._since = self._workers, set(), [], {}
        for worker in workers:
            worker.kill()
        for worker in workers:
            worker.join()

    def disown(self) -> None:
        """In a forked child: forget the workers, which are the parent's."""
        for worker in self._workers:
            worker.disown()

    def pids(self) -> list[int]:
        """The ids of the processes that run."""
        with self._lock:
            return sorted(worker.pid for worker in self._workers if worker.is_alive())

    def _attempt(
        self, job: Job, pixels: memoryview, admit: Admit, cancellation: Cancellation, turn: _Turn
    ) -> Prepared | int:
        """Decode, or return the number of pixels if this must wait for the slow lane."""
        worker = self._take()
        try:
            with cancellation.ending_with(worker.kill):
                return self._ask(worker, job, pixels, admit, turn)
        except TimeoutError:
            raise ImageError(
                f"{job.described} was not read within {job.limits.image_timeout_s:g} s: shrink it, save it in "
                "another format, or raise image_timeout_s"
            ) from None
        except Disconnected:
            raise ImageError(
                f"{job.described} cannot be read: the process that decodes it {worker.how_it_ended()}; "
                "shrink it or save it in another format"
            ) from None
        finally:
            self._give_back(worker)

    def _ask(self, worker: Worker, job: Job, pixels: memoryview, admit: Admit, turn: _Turn) -> Prepared | int:
        if turn.lane is self._slow:
            worker.slow_down()
        worker.send(job)
        patience = _QUICK_S + _QUICK_S_PER_BYTE * len(job.data)
        if not self._keeps_turn(worker, turn, QUICK_PIXELS, patience):
            return QUICK_PIXELS
        width, height = worker.header()
        count = width * height
        try:
            admit(width, height)
        except BaseException:
            worker.refuse()
            raise
        if turn.lane is self._quick and count > QUICK_PIXELS:
            if not turn.change(self._slow, count):
                worker.refuse()
                return count
            worker.slow_down()
        worker.start()
        if not self._keeps_turn(worker, turn, count, patience + _QUICK_S_PER_PIXEL * count):
            return count
        return worker.result(pixels)

    def _keeps_turn(self, worker: Worker, turn: _Turn, pixels: int, patience: float) -> bool:
        """Wait for an answer; an image that takes more CPU time than `patience` leaves the quick lane, if it can."""
        if turn.lane is self._slow or worker.is_ready(patience):
            return True
        if not turn.change(self._slow, pixels):
            return False
        worker.slow_down()
        self._keep_a_spare()
        return True

    def _take(self) -> Worker:
        with self._lock:
            while self._idle:
                worker = self._idle.pop()  # the one that was busy last: the others may be ended
                self._since.pop(worker, None)
                if worker.is_alive():
                    return worker
                self._workers.discard(worker)
                worker.close()
        return self._started()

    def _started(self) -> Worker:
        try:
            worker = Worker()
        except OSError as error:
            raise ImageError(
                f"no process for decoding images can be started ({error}): turn isolate_images off"
            ) from error
        with self._lock:
            self._workers.add(worker)
        return worker

    def _give_back(self, worker: Worker) -> None:
        with self._lock:
            if worker.is_reusable and len(self._idle) < self._quick_images:
                self._idle.append(worker)
                self._since[worker] = time.monotonic()
                if len(self._idle) > self._kept and not self._trims:
                    self._trim_later()
                return
            self._workers.discard(worker)
        worker.close()

    def _trim_later(self) -> None:
        self._trims = True
        timer = threading.Timer(_IDLE_S, self._trim)
        timer.daemon = True
        timer.start()

    def _trim(self) -> None:
        """End the workers that have been idle for long, but for some."""
        ended = []
        with self._lock:
            self._trims = False
            long_ago = time.monotonic() - _IDLE_S
            while len(self._idle) > self._kept and self._since.get(self._idle[0], 0.0) <= long_ago:
                ended.append(self._idle.pop(0))
                self._since.pop(ended[-1], None)
                self._workers.discard(ended[-1])
            if len(self._idle) > self._kept:
                self._trim_later()
        for worker in ended:
            worker.close()

    def _keep_a_spare(self) -> None:
        """Start a worker ahead, since some are busy for long and a start takes 100 ms."""
        with self._lock:
            if self._idle:
                return
            if self._starts_spare:
                return
            self._starts_spare = True
        try:
            worker = self._started()
            with self._lock:
                self._idle.append(worker)
        finally:
            self._starts_spare = False


class _Turn:
    """An image's place in a lane."""

    def __init__(self, lane: Lane, pixels: int) -> None:
        self.lane, self._pixels = lane, pixels
        self._ended = False

    def change(self, lane: Lane, pixels: int) -> bool:
        """Go to another lane, if that has room at once."""
        if not lane.try_enter(pixels):
            return False
        self.lane.leave(self._pixels)
        self.lane, self._pixels = lane, pixels
        return True

    def end(self) -> None:
        """Leave the lane."""
        if not self._ended:
            self._ended = True
            self.lane.leave(self._pixels)


_pool: Pool | None = None
_making = threading.Lock()


def shared_pool() -> Pool:
    """The pool of this process."""
    global _pool
    with _making:
        if _pool is None:
            _pool = Pool()
        return _pool


def start_ahead() -> None:
    """Start the workers of this process ahead; a failure is logged, since texts can be answered without them."""
    try:
        shared_pool().start_ahead()
    except ImageError as error:
        _log.warning("%s", error)


def _close_at_exit() -> None:
    if _pool is not None:
        _pool.close()


def _forget_in_child() -> None:
    global _pool, _making
    _making = threading.Lock()
    if _pool is not None:
        _pool.disown()
        _pool = None


atexit.register(_close_at_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
