"""What an `AsyncEngine` tells besides answers: the likelihood of texts and boxes, between the steps of requests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

from qvl_runtime.engine.choice import Choice, choose, option_ids
from qvl_runtime.engine.encoding import Encoding
from qvl_runtime.engine.engine import Encoded, Engine
from qvl_runtime.engine.locating import Located, check_number, locate, score_boxes, spelled_boxes
from qvl_runtime.engine.slots import Slots
from qvl_runtime.errors import BusyError, QVLError
from qvl_runtime.prompt.boxes import Box
from qvl_runtime.prompt.cancellation import Canceled, Cancellation
from qvl_runtime.prompt.chatml import EncodedPrompt, Prompt
from qvl_runtime.prompt.images import ImageSource

T = TypeVar("T")
_CLOSED = "the engine is closed: make another AsyncEngine"


class AsyncJudging:
    """The methods of `AsyncEngine` that judge given texts. Each takes a slot, as a request does.

    They compute one after another in a thread of their own, in turns with the steps of requests; canceling the task
    ends the computation at its next step.
    """

    engine: Engine
    max_pending: int
    _encoding: Encoding
    _slots: Slots

    def __init__(self) -> None:
        self._judges = ThreadPoolExecutor(1, thread_name_prefix="qvl-judge")
        self._judging: set[Cancellation] = set()
        self._ended = False

    async def choose(self, prompt: Prompt | Encoded, options: Sequence[str], *, wait: bool = True) -> Choice:
        """Return how likely each of the given answers to a prompt is, as `Engine.choose` does."""
        engine, ids = self.engine, option_ids(self.engine.tokenizer, options)
        async with self._slot(wait):
            encoded = prompt if isinstance(prompt, Encoded) else await self._encoding.encode(prompt)
            return await self._judge(lambda c: choose(engine.core, encoded.prompt, options, ids, c))

    async def locate(
        self,
        image: ImageSource,
        phrase: str,
        k: int = 1,
        question: str | None = None,
        system: str | None = None,
        *,
        wait: bool = True,
    ) -> Located:
        """Find what a phrase names in an image, as `Engine.locate` does."""
        check_number(k)
        core = self.engine.core
        async with self._slot(wait):
            encoded = await self._phrase(image, phrase, question, system)
            return await self._judge(lambda c: locate(core, core.answers.judge, encoded, phrase, k, c))

    async def score_boxes(
        self,
        image: ImageSource,
        phrase: str,
        boxes: Sequence[Box | Sequence[int]],
        question: str | None = None,
        system: str | None = None,
        *,
        wait: bool = True,
    ) -> list[Box]:
        """Return given boxes with scores, as `Engine.score_boxes` does."""
        core, spelled = self.engine.core, spelled_boxes(self.engine.tokenizer, boxes)
        async with self._slot(wait):
            encoded = await self._phrase(image, phrase, question, system)
            return await self._judge(lambda c: score_boxes(core, core.answers.judge, encoded, phrase, spelled, c))

    async def _phrase(self, image: ImageSource, phrase: str, question: str | None, system: str | None) -> EncodedPrompt:
        encoded = await self._encoding.drafted(lambda: self.engine.draft_phrase(image, phrase, question, system))
        return encoded.prompt

    async def _judge(self, compute: Callable[[Cancellation], T]) -> T:
        """Compute something between two steps, in the thread for it, unless the task is canceled."""
        cancellation = Cancellation()

        def work() -> T:
            cancellation.check()
            with self.engine.exclusive():
                return compute(cancellation)

        self._judging.add(cancellation)
        try:
            with suppress(Canceled):
                return await asyncio.get_running_loop().run_in_executor(self._judges, work)
        except RuntimeError:  # the thread takes nothing once it was told to end
            if not self._ended:
                raise
        finally:
            self._judging.discard(cancellation)
            cancellation.cancel()
        raise QVLError(_CLOSED)

    def _slot(self, wait: bool) -> Slots:
        """The slots to take one of. Raises `BusyError` if all are taken and `wait` is false, and `QVLError`."""
        if not self.is_alive:
            raise QVLError(_CLOSED)
        if self._slots.locked() and not wait:
            raise BusyError(f"{self.max_pending} requests are pending, the limit of max_pending: try again later")
        return self._slots

    def _end_judging(self) -> None:
        """Fail what is being computed, and take no more."""
        self._ended = True
        for cancellation in list(self._judging):
            cancellation.cancel()
        self._judges.shutdown(wait=False)

    @property
    def is_alive(self) -> bool:
        """Whether the thread of the model runs."""
        raise NotImplementedError
