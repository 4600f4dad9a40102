"""What runs in each actor of a batch: an engine that answers many rows at a time, and ends if its GPU fails.

The class is plain Python: Ray makes an actor of it, tests do not. An engine is built where it runs, never sent.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, NamedTuple

from qvl_runtime import __version__
from qvl_runtime.cluster.rows import Row
from qvl_runtime.engine.records import answer_record, parse_record, parse_request, record_id
from qvl_runtime.errors import QVLError
from qvl_runtime.server.openai_batch import Asked, is_openai, parse_openai

if TYPE_CHECKING:
    from qvl_runtime.engine.async_engine import AsyncEngine
    from qvl_runtime.schedule.api import SamplingParams

_log = logging.getLogger("qvl_runtime")
READERS = 2  # rows whose pictures are read at a time: as many as the processes that decode them stay alive
POISONED = 70  # exit status of a process whose GPU context cannot be used again


@dataclass(frozen=True)
class ActorSpec:
    """What an actor needs to begin."""

    engine: Mapping[str, Any]  # arguments of `Engine`
    params: SamplingParams  # of rows that say nothing else
    source: str  # name of the file of requests, for messages
    max_line_bytes: int
    threads: int | None  # on a CPU, of torch and the kernels: Ray sets OMP_NUM_THREADS to 1; None: on a GPU
    folder: str  # where relative paths of pictures begin, if the node has it


class Answer(NamedTuple):
    """What became of a row."""

    position: int  # of the row, from 0
    line: int  # its number in the file
    id: Any
    in_openai_form: bool  # with custom_id and body
    record: str | None  # JSON of the answer's fields; None: failed
    error: str | None
    tokens: int  # generated


class Versions(NamedTuple):
    """What must be the same wherever a job runs."""

    qvl: str
    python: str  # without its patch number
    torch: str

    @classmethod
    def here(cls) -> Versions:
        """Those of this process, without a second for importing torch."""
        return cls(__version__, ".".join(platform.python_version_tuple()[:2]), version("torch").split("+")[0])


class EngineActor:
    """An engine and the rows that it answers. Methods are coroutines, so that rows of many calls run together."""

    def __init__(self, spec: ActorSpec) -> None:
        self._spec = spec
        self._engine: AsyncEngine | None = None
        self._readers = asyncio.Semaphore(READERS)
        self._between_steps = False  # whether pictures of files are read where the model computes on its one core

    async def load(self) -> Versions | str:
        """Build the engine. Returns the versions here, or what keeps it from running."""
        return await asyncio.to_thread(self._load)

    async def answer(self, rows: Sequence[Row]) -> list[Answer]:
        """Answer some rows, whatever becomes of each."""
        return list(await asyncio.gather(*map(self._answer, rows)))

    async def report(self) -> dict[str, Any]:
        """`Engine.report`, with the process's id."""
        return {**await self._loaded().report(), "pid": os.getpid()}

    def _load(self) -> Versions | str:
        import torch

        from qvl_runtime.engine.async_engine import AsyncEngine
        from qvl_runtime.engine.engine import Engine

        with suppress(OSError):
            os.chdir(self._spec.folder)
        if self._spec.threads is not None:
            torch.set_num_threads(self._spec.threads)
        try:
            engine = Engine(**self._spec.engine)
        except (QVLError, OSError) as error:
            return str(error)
        # Two engines' worth of rows are under way: those that run, and those that wait to take their places.
        self._between_steps = engine.core.runner.model.device.type == "cpu" and torch.get_num_threads() == 1
        self._engine = AsyncEngine(engine, max_pending=2 * engine.engine_config.max_running, max_parallel=None)
        return Versions.here()

    def _loaded(self) -> AsyncEngine:
        if self._engine is None:
            raise RuntimeError("load was not called, or failed")
        return self._engine

    async def _answer(self, row: Row) -> Answer:
        engine, spec = self._loaded(), self._spec
        answer = Answer(row.position, row.line.number, None, False, None, None, 0)
        asked: Asked | None = None
        try:
            record = parse_record(row.line, spec.source, spec.max_line_bytes)
            answer = answer._replace(id=record_id(record), in_openai_form=is_openai(record))
            if answer.in_openai_form:
                asked = parse_openai(record, engine.engine, spec.params)
                prompt, params = asked.prompt, asked.params
            else:
                prompt, params = parse_request(record, spec.params)
            if self._between_steps and not _may_download(row):
                encoded = await engine.encode_between_steps(prompt)
            else:
                async with self._readers:
                    encoded = await engine.encode(prompt)
            completion = await engine.generate(encoded, params)
        except QVLError as error:
            if is_poisoned(error) or not engine.is_alive:
                _log.error("this process ends, since its engine cannot go on: %s", error)
                os._exit(POISONED)  # at once: the rows that it has are answered elsewhere
            return answer._replace(error=str(error))
        fields = answer_record(completion) if asked is None else asked.answer(completion, encoded, engine.engine)
        tokens = sum(one.usage.completion_tokens for one in completion.answers)
        return answer._replace(record=json.dumps(fields, ensure_ascii=False), tokens=tokens)


def _may_download(row: Row) -> bool:
    """Whether an address may be in a row, for which steps shall not wait; JSON may escape a slash."""
    return b":/" in row.line.data or b":\\/" in row.line.data


def is_poisoned(error: BaseException) -> bool:
    """Whether an error of the GPU is behind it, after which nothing works in this process; lack of memory is none."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        name, text = type(cause).__name__, str(cause)
        if name == "AcceleratorError" or (isinstance(cause, RuntimeError) and "CUDA error" in text):
            return True
        cause = cause.__cause__ or cause.__context__
    return False
