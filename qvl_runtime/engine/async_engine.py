"""An asyncio front end of the engine: the model runs in a worker thread, and answers are read by `async for`.

async with AsyncEngine(Engine("Qwen/Qwen-VL-Chat-Int4")) as engine:
    async for piece in engine.stream("Hello"):
        print(piece.text, end="")
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from qvl_runtime.engine.async_judging import AsyncJudging
from qvl_runtime.engine.encoding import Encoding
from qvl_runtime.engine.engine import Encoded, Engine
from qvl_runtime.engine.slots import Slots
from qvl_runtime.engine.worker import Reader, Worker
from qvl_runtime.errors import BusyError
from qvl_runtime.prompt.chatml import Prompt
from qvl_runtime.schedule.api import Completion, SamplingParams, StreamPiece
from qvl_runtime.schedule.guide_checks import guide_of


class AsyncEngine(AsyncJudging):
    """Answers any number of requests, from any event loops. The engine may be used directly in other threads.

    Back-pressure is applied in two ways. Beyond `max_pending` requests, a new one waits for its turn, or fails with
    `wait=False`; and a request whose reader is `max_unread` pieces behind is paused until the reader catches up.
    """

    def __init__(
        self, engine: Engine, max_pending: int = 256, max_unread: int = 64, max_parallel: int | None = 8
    ) -> None:
        """max_parallel: of the n answers to one prompt, those that are generated at a time; None: all.

        A step takes longer with every answer in it: more at a time are done sooner, and others wait longer.
        """
        engine.check_process()
        super().__init__()
        self.engine, self.max_pending, self.max_unread = engine, max_pending, max_unread
        self._encoding = Encoding(engine)
        self._slots = Slots(max_pending)
        self._worker = Worker(engine, max_unread)
        weakref.finalize(self, self._worker.stop)  # one that is dropped without `close` frees its thread and engine
        engine.core.share_steps(max_parallel)
        self._end_sharing = weakref.finalize(self, engine.core.share_steps, None)

    @property
    def busy(self) -> bool:
        """Whether `max_pending` requests are pending, so that a new one would have to wait."""
        return self._slots.locked()

    @property
    def is_alive(self) -> bool:
        """Whether the thread of the model runs. Once it has ended, every request fails with `QVLError`."""
        return self._worker.is_alive

    async def encode(self, prompt: Prompt) -> Encoded:
        """Read and encode a prompt while the model runs, for `stream` and `generate`; it may be used several times.

        Canceling the task ends downloads and decoding at once. Raises `PromptError`, `ImageError` or `DownloadError`.
        """
        return await self._encoding.encode(prompt)

    async def encode_between_steps(self, prompt: Prompt) -> Encoded:
        """Do the same in the thread of the model, while it computes nothing, and to the end.

        It costs less processor time than `encode`, whose threads wait for Python's lock in turns with the model: better
        where the model computes on as many cores as there are, and no request waits for its first token.
        """
        return await asyncio.wrap_future(self._worker.call(lambda: self.engine.encode(prompt)))

    async def stream(
        self, prompt: Prompt | Encoded, params: SamplingParams | None = None, *, wait: bool = True
    ) -> AsyncGenerator[StreamPiece, None]:
        """Answer one prompt piece by piece, as `Engine.stream` does. Closing the iterator cancels the request.

        `prompt` may be what `encode` returned. Raises the errors of `Engine.stream`, and `BusyError` if the engine is
        busy and `wait` is false.
        """
        async with aclosing(self.stream_batches(prompt, params, wait=wait)) as batches:
            async for pieces in batches:
                for piece in pieces:
                    yield piece

    async def stream_batches(
        self, prompt: Prompt | Encoded, params: SamplingParams | None = None, *, wait: bool = True
    ) -> AsyncGenerator[list[StreamPiece], None]:
        """Do the same, and yield at once all pieces that have come since the last were taken."""
        async with aclosing(self._batches(prompt, params, wait, streamed=True)) as batches:
            async for pieces in batches:
                yield pieces

    async def generate(
        self, prompt: Prompt | Encoded, params: SamplingParams | None = None, *, wait: bool = True
    ) -> Completion:
        """Answer one prompt; with n > 1 the other answers are in `alternatives`. Canceling the task cancels it."""
        completion = None
        async with aclosing(self._batches(prompt, params, wait, streamed=False)) as batches:
            async for pieces in batches:
                completion = pieces[-1].completion
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
        return await asyncio.wrap_future(self._worker.call(self.engine.report))

    async def close(self) -> None:
        """Stop the worker; unfinished requests fail with `QVLError`. The engine stays usable."""
        self._encoding.close()
        self._end_judging()
        self._worker.stop()
        await asyncio.to_thread(self._worker.join)
        self._end_sharing()

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _batches(
        self, prompt: Prompt | Encoded, params: SamplingParams | None, wait: bool, streamed: bool
    ) -> AsyncGenerator[list[StreamPiece], None]:
        if self.busy and not wait:
            raise BusyError(f"{self.max_pending} requests are pending, the limit of max_pending: try again later")
        async with self._slots:
            # While the model runs.
            encoded = prompt if isinstance(prompt, Encoded) else await self._encoding.encode(prompt)
            if isinstance(params, SamplingParams) and guide_of(params) is not None:
                await asyncio.to_thread(self.engine.constraints.prepare, params)  # not in a step of all requests
            reader = Reader(asyncio.get_running_loop())
            self._worker.submit(reader, encoded, params, streamed)
            unfinished = params.n if streamed and isinstance(params, SamplingParams) else 1
            try:
                while True:
                    pieces, error = await reader.take()
                    if reader.request is not None and reader.request.paused:
                        self._worker.wake()  # so that it resumes the request
                    if pieces:
                        yield pieces
                    if error is not None:
                        raise error
                    unfinished -= sum(piece.completion is not None for piece in pieces)
                    if not unfinished:
                        return
            finally:
                self._worker.cancel(reader)
