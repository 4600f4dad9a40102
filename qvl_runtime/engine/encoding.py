"""Encode prompts while the model runs: text in a few threads, and images in a thread for each request that has any.

So a text never waits for an image, and no request for the slow images of another.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from qvl_runtime.engine.engine import Encoded, Engine
from qvl_runtime.errors import QVLError
from qvl_runtime.prompt.cancellation import Canceled, Cancellation
from qvl_runtime.prompt.chatml import Draft, EncodedPrompt, Prompt

_TEXT_THREADS = 4  # the tokenizer releases Python's lock, and needs 0.2 s for a text of 1 MB


class Encoding:
    """Encodes the prompts of an `AsyncEngine`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._texts = ThreadPoolExecutor(_TEXT_THREADS, thread_name_prefix="qvl-text")
        self._reading: set[Cancellation] = set()
        self._closed = False

    async def encode(self, prompt: Prompt) -> Encoded:
        """Encode a prompt as `Engine.encode` does. Canceling the task ends downloads and decoding at once."""
        return await self.drafted(lambda: self._engine.draft(prompt))

    async def drafted(self, make: Callable[[], Draft]) -> Encoded:
        """Make a draft in a thread, and read its images."""
        self._check_open()
        began = time.perf_counter()
        draft = await asyncio.get_running_loop().run_in_executor(self._texts, make)
        if draft.segment.slots:
            encoded = await self._read_images(draft)
        else:
            encoded = self._engine.read_images(draft)
        return Encoded(encoded, time.perf_counter() - began)

    def close(self) -> None:
        """Cancel what is being read; its requests fail with `QVLError`."""
        self._closed = True
        for cancellation in list(self._reading):
            cancellation.cancel()
        self._texts.shutdown(wait=False)

    async def _read_images(self, draft: Draft) -> EncodedPrompt:
        cancellation, future = Cancellation(), Future[EncodedPrompt]()

        def work() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(self._engine.read_images(draft, cancellation))
            except BaseException as error:
                future.set_exception(error)

        self._reading.add(cancellation)
        try:
            self._check_open()
            threading.Thread(target=work, name="qvl-images", daemon=True).start()
            return await asyncio.wrap_future(future)
        except Canceled:
            raise QVLError("the engine was closed before the images were read") from None
        finally:
            self._reading.discard(cancellation)
            cancellation.cancel()

    def _check_open(self) -> None:
        self._engine.check_process()  # a forked child has none of the threads
        if self._closed:
            raise QVLError("the engine is closed: make another AsyncEngine")
