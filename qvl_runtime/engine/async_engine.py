"""An asyncio front end of the engine: the model runs in a worker thread, and answers are read by `async for`.

async with AsyncEngine(Engine("Qwen/Qwen-VL-Chat-Int4")) as engine:
    async for piece in engine.stream("Hello"):
        print(piece.text, end="")
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from qvl_runtime.engine.encoding import Encoding
from qvl_runtime.engine.engine import Encoded, Engine
from qvl_runtime.errors import CapacityError, PromptError, QVLError
from qvl_runtime.prompt.chatml import Prompt
from qvl_runtime.schedule.api import Completion, SamplingParams, StreamPiece
from qvl_runtime.schedule.request import Request

Item: TypeAlias = "StreamPiece | BaseException"


@dataclass(slots=True, eq=False)
class Reader:
    """The reader of one answer: its queue, and how many items the worker has sent and the reader has taken."""

    loop: asyncio.AbstractEventLoop
    items: asyncio.Queue[Item] = field(default_factory=asyncio.Queue)
    request: Request | None = None  # written by the worker
    sent: int = 0  # written by the worker
    taken: int = 0  # written by the reader


class AsyncEngine:
    """Answers any number of requests from one event loop. While it is open, only its worker may use the engine.

    Back-pressure is applied in two ways. Beyond `max_pending` requests, a new one waits for its turn, or fails with
    `wait=False`; and a request whose reader is `max_unread` pieces behind is paused until the reader catches up.
    """

    def __init__(self, engine: Engine, max_pending: int = 256, max_unread: int = 64) -> None:
        self.engine, self.max_pending, self.max_unread = engine, max_pending, max_unread
        self._slots = asyncio.Semaphore(max_pending)
        self._encoding = Encoding(engine)
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._readers: set[Reader] = set()  # used by the worker only
        self._closed = False
        self._worker = threading.Thread(target=self._work, name="qvl-model", daemon=True)
        self._worker.start()

    @property
    def busy(self) -> bool:
        """Whether `max_pending` requests are pending, so that a new one would have to wait."""
        return self._slots.locked()

    async def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, wait: bool = True
    ) -> AsyncGenerator[StreamPiece, None]:
        """Answer one prompt piece by piece, as `Engine.stream` does. Closing the iterator cancels the request.

        Raises the errors of `Engine.stream`, and `CapacityError` if the engine is busy and `wait` is false.
        """
        if isinstance(params, SamplingParams) and params.n != 1:
            raise PromptError(f"n is {params.n}, but a stream is one answer: use generate for several")
        async with aclosing(self._items(prompt, params, wait, streamed=True)) as items:
            async for piece in items:
                yield piece

    async def generate(self, prompt: Prompt, params: SamplingParams | None = None, *, wait: bool = True) -> Completion:
        """Answer one prompt; with n > 1 the other answers are in `alternatives`. Canceling the task cancels it."""
        completion = None
        async with aclosing(self._items(prompt, params, wait, streamed=False)) as items:
            async for piece in items:
                completion = piece.completion
        if completion is None:
            raise RuntimeError("the stream ended without a completion")
        return completion

    async def generate_all(
        self, prompts: Sequence[Prompt], params: SamplingParams | None = None
    ) -> list[Completion | BaseException]:
        """Answer several prompts together, in order; one that fails returns its error and does not stop the others."""
        return await asyncio.gather(*(self.generate(p, params) for p in prompts), return_exceptions=True)

    async def report(self) -> dict[str, Any]:
        """Return `Engine.report`, made between two steps."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[dict[str, Any]] = loop.create_future()

        def make_report() -> None:
            try:
                report = self.engine.report()
            except Exception as error:
                loop.call_soon_threadsafe(set_exception, future, error)
            else:
                loop.call_soon_threadsafe(set_result, future, report)

        self._send_command(make_report)
        return await future

    async def close(self) -> None:
        """Stop the worker; unfinished requests fail with `QVLError`. The engine may then be used directly again."""
        if not self._closed:
            self._closed = True
            self._encoding.close()
            self._commands.put(lambda: None)
            await asyncio.to_thread(self._worker.join)

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # --- the reader's side -------------------------------------------------------------------------------------------

    async def _items(
        self, prompt: Prompt, params: SamplingParams | None, wait: bool, streamed: bool
    ) -> AsyncGenerator[StreamPiece, None]:
        if self.busy and not wait:
            raise CapacityError(f"{self.max_pending} requests are pending, the limit of max_pending: try again later")
        async with self._slots:
            encoded = await self._encoding.encode(prompt)  # while the model runs
            reader = Reader(asyncio.get_running_loop())
            self._send_command(lambda: self._submit(reader, encoded, params, streamed))
            try:
                while True:
                    item = await reader.items.get()
                    reader.taken += 1
                    if isinstance(item, BaseException):
                        raise item
                    if reader.request is not None and reader.request.paused and not self._closed:
                        self._send_command(lambda: None)  # wake the worker, so that it resumes the request
                    yield item
                    if item.completion is not None:
                        return
            finally:
                if not self._closed:
                    self._send_command(lambda: self._cancel(reader))

    def _send_command(self, command: Callable[[], None]) -> None:
        """Have the worker run `command` before its next step. Only the event loop's thread may call this."""
        if self._closed:
            raise QVLError("the engine is closed: make another AsyncEngine")
        self._commands.put(command)

    # --- the worker's side -------------------------------------------------------------------------------------------

    def _work(self) -> None:
        idle = True
        while True:
            self._run_commands(wait=idle)
            if self._closed:
                break
            for reader in self._readers:
                if reader.request is not None:
                    reader.request.paused = reader.sent - reader.taken > self.max_unread
            try:
                idle = not self.engine.core.step()
            except Exception as error:  # every reader of this step receives the error
                self._fail(error)
            self._deliver()
        self._run_commands(wait=False)  # commands that were sent just before the end
        self._fail(
            QVLError("the engine was closed before the answer was complete: keep it open until the last answer is read")
        )

    def _run_commands(self, wait: bool) -> None:
        """Run the queued commands; with `wait`, sleep until there is one or a deadline may have passed."""
        try:
            if wait:
                self._commands.get(timeout=0.05 if self._readers else None)()
            while True:
                self._commands.get_nowait()()
        except queue.Empty:
            pass

    def _submit(self, reader: Reader, encoded: Encoded, params: SamplingParams | None, streamed: bool) -> None:
        try:
            reader.request = self.engine.submit(encoded, params, streamed)
        except Exception as error:  # it fails this reader only; the worker continues
            self._send(reader, [error])
        else:
            self._readers.add(reader)

    def _cancel(self, reader: Reader) -> None:
        self._readers.discard(reader)
        if reader.request is not None:
            self.engine.core.cancel(reader.request)

    def _deliver(self) -> None:
        """Send every reader the new pieces of its request, and remove the readers whose requests are done."""
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
                self._send(reader, pieces)
            if request.done:
                self._readers.discard(reader)

    def _fail(self, error: BaseException) -> None:
        for reader in list(self._readers):
            self._cancel(reader)
            self._send(reader, [error])

    def _send(self, reader: Reader, items: list[Item]) -> None:
        def put() -> None:
            for item in items:
                reader.items.put_nowait(item)

        reader.sent += len(items)
        if not reader.loop.is_closed():
            reader.loop.call_soon_threadsafe(put)


def set_result(future: asyncio.Future[dict[str, Any]], value: dict[str, Any]) -> None:
    """Set the result of a future, unless it was canceled."""
    if not future.done():
        future.set_result(value)


def set_exception(future: asyncio.Future[dict[str, Any]], error: Exception) -> None:
    """Set the exception of a future, unless it was canceled."""
    if not future.done():
        future.set_exception(error)
