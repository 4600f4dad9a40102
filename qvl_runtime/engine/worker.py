"""The thread that runs the model for an `AsyncEngine`, and the readers that it sends pieces to."""

from __future__ import annotations

import asyncio
import atexit
import queue
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias, TypeVar

from qvl_runtime.engine.engine import Encoded, Engine
from qvl_runtime.errors import QVLError
from qvl_runtime.schedule.api import SamplingParams, StreamPiece
from qvl_runtime.schedule.request import Request

Item: TypeAlias = "StreamPiece | BaseException"
T = TypeVar("T")


@dataclass(slots=True, eq=False)
class Reader:
    """The reader of one answer: its queue, and how many items the worker has sent and the reader has taken."""

    loop: asyncio.AbstractEventLoop
    items: asyncio.Queue[Item] = field(default_factory=asyncio.Queue)
    request: Request | None = None  # written by the worker
    sent: int = 0  # written by the worker
    taken: int = 0  # written by the reader

    def send(self, items: list[Item]) -> None:
        """Queue items, from any thread. Those for a loop that is closed are dropped."""
        self.sent += len(items)
        try:
            self.loop.call_soon_threadsafe(self.put, items)
        except RuntimeError:  # the loop was closed in the meantime
            return

    async def take(self) -> tuple[list[StreamPiece], BaseException | None]:
        """Wait for an item, and return all pieces that are there, and the error that ended them."""
        items = [await self.items.get()]
        while not self.items.empty():
            items.append(self.items.get_nowait())
        self.taken += len(items)
        error = next((item for item in items if isinstance(item, BaseException)), None)
        return [item for item in items if not isinstance(item, BaseException)], error

    def put(self, items: list[Item]) -> None:
        """Queue items that are counted already, in the thread of the loop."""
        for item in items:
            self.items.put_nowait(item)


def _put_all(items: list[tuple[Reader, list[Item]]]) -> None:
    for reader, own in items:
        reader.put(own)


class Command(NamedTuple):
    """What the worker does between two steps, and whom it tells if it cannot."""

    run: Callable[[], None]
    fail: Callable[[BaseException], None]


class Worker:
    """Runs the steps of an engine in a thread while there are requests, and commands between them.

    Whatever goes wrong in the thread fails everything that waits for it at once, and what is sent later, too.
    """

    def __init__(self, engine: Engine, max_unread: int) -> None:
        self._engine, self._max_unread = engine, max_unread
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._readers: set[Reader] = set()  # used by the worker only
        self._end: QVLError | None = None  # why it takes no more commands
        self._sending = threading.Lock()  # so that no command is queued after the last one was failed
        self._thread = threading.Thread(target=self._work, name="qvl-model", daemon=True)
        _running.add(self)
        self._thread.start()
        _threads.add(self._thread)

    @property
    def is_alive(self) -> bool:
        """Whether it takes commands."""
        return self._end is None

    def submit(self, reader: Reader, encoded: Encoded, params: SamplingParams | None, streamed: bool) -> None:
        """Have an encoded prompt answered to its reader. Raises `QVLError` once the worker has ended."""
        self._send(Command(lambda: self._submit(reader, encoded, params, streamed), lambda error: reader.send([error])))

    def cancel(self, reader: Reader) -> None:
        """Stop the answer to a reader; nothing happens if it is complete, or the worker has ended."""
        if self._end is None:
            self._send(Command(lambda: self._cancel(reader), lambda error: None))

    def wake(self) -> None:
        """Have the worker look at its paused requests, if it sleeps."""
        if self._end is None:
            self._send(Command(lambda: None, lambda error: None))

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Have a function called between two steps."""
        future: Future[T] = Future()

        def run() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except Exception as error:
                    future.set_exception(error)

        def fail(error: BaseException) -> None:
            if not future.done() and (future.running() or future.set_running_or_notify_cancel()):
                future.set_exception(error)

        self._send(Command(run, fail))
        return future

    def stop(self, reason: str = "the engine is closed: make another AsyncEngine") -> None:
        """Take no more commands, and end after the running step. Does not wait."""
        with self._sending:
            self._end = self._end or QVLError(reason)
        self._commands.put(Command(lambda: None, lambda error: None))

    def join(self) -> None:
        """Wait until the thread has ended."""
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _send(self, command: Command) -> None:
        self._engine.check_process()  # a forked child has no worker
        with self._sending:
            if self._end is not None:
                raise QVLError(str(self._end))
            self._commands.put(command)

    def _work(self) -> None:
        unfinished = "the engine was closed before the answer was complete: keep it open until the last answer is read"
        try:
            self._run()
        except BaseException as error:
            unfinished = (
                f"the thread of the model has ended by {type(error).__name__}: {error}; make another AsyncEngine"
            )
            with self._sending:
                self._end = QVLError(unfinished)
            if not isinstance(error, Exception):
                raise
        finally:
            self._fail_all(QVLError(unfinished))
            _running.discard(self)

    def _run(self) -> None:
        idle = True
        while True:
            self._run_commands(wait=idle)
            if self._end is not None:
                return
            with self._engine.exclusive():
                for reader in self._readers:
                    if reader.request is not None:
                        reader.request.paused = reader.sent - reader.taken > self._max_unread
                try:
                    idle = not self._engine.core.step()
                except Exception as error:  # every reader of this step receives the error
                    self._fail_readers(error)
                self._deliver()

    def _run_commands(self, wait: bool) -> None:
        """Run the queued commands; with `wait`, sleep until there is one or a deadline may have passed."""
        try:
            if wait:
                self._run_command(self._commands.get(timeout=0.05 if self._readers else None))
            while True:
                self._run_command(self._commands.get_nowait())
        except queue.Empty:
            pass

    def _run_command(self, command: Command) -> None:
        try:
            command.run()
        except BaseException as error:
            command.fail(error)
            raise

    def _submit(self, reader: Reader, encoded: Encoded, params: SamplingParams | None, streamed: bool) -> None:
        try:
            reader.request = self._engine.submit(encoded, params, streamed)
        except Exception as error:  # it fails this reader only; the worker continues
            reader.send([error])
        else:
            self._readers.add(reader)

    def _cancel(self, reader: Reader) -> None:
        self._readers.discard(reader)
        if reader.request is not None:
            self._engine.cancel(reader.request)

    def _deliver(self) -> None:
        """Send every reader the new pieces of its request, and remove the readers whose requests are done."""
        sent: dict[asyncio.AbstractEventLoop, list[tuple[Reader, list[Item]]]] = {}
        for reader in list(self._readers):
            if (request := reader.request) is None:
                continue
            pieces: list[Item] = list(request.pieces)
            request.pieces.clear()
            if request.error is not None:
                pieces.append(request.error)
            elif request.done and not request.streamed:
                pieces.append(StreamPiece("", (), request.completion()))
            if pieces:
                reader.sent += len(pieces)
                sent.setdefault(reader.loop, []).append((reader, pieces))
            if request.done:
                self._readers.discard(reader)
        for loop, items in sent.items():  # a loop is woken once a step, not once for each of its readers
            with suppress(RuntimeError):  # the loop was closed in the meantime
                loop.call_soon_threadsafe(_put_all, items)

    def _fail_readers(self, error: BaseException) -> None:
        for reader in list(self._readers):
            self._cancel(reader)
            reader.send([error])

    def _fail_all(self, error: QVLError) -> None:
        """Fail the readers, and the commands that were sent just before the end."""
        self._fail_readers(error)
        with self._sending:
            try:
                while True:
                    self._commands.get_nowait().fail(error)
            except queue.Empty:
                pass


_running: weakref.WeakSet[Worker] = weakref.WeakSet()
_threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()  # one may still free an engine when its worker is gone


@atexit.register
def _stop_workers() -> None:
    """End all threads of workers before the interpreter does, which would abort one in a kernel or freeing a tensor."""
    for worker in list(_running):
        worker.stop()
    for thread in list(_threads):
        thread.join()
