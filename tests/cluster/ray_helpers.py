"""A Ray cluster in this process, and small jobs for it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from PIL import Image

from qvl_runtime import SamplingParams
from qvl_runtime.cluster.actor import ActorSpec, EngineActor
from qvl_runtime.cluster.batch import Job, Progress
from qvl_runtime.cluster.pool import ActorPool
from qvl_runtime.cluster.rows import Row
from qvl_runtime.engine.async_engine import AsyncEngine
from qvl_runtime.reading.lines import MAX_LINE

# float32: the same greedy tokens, whatever runs along
ENGINE: dict[str, Any] = {"dtype": "float32", "max_model_len": 1024, "kv_cache_bytes": 2**25}
GREEDY = SamplingParams(temperature=0, max_tokens=16)
QUESTIONS = ("What is this?", "Which color is it?", "Box it")


class Deadly(EngineActor):
    """An actor that ends at once, without a word, when it is asked a certain question."""

    async def _answer(self, row: Row) -> Any:
        if b"deadly" in row.line.data:
            os._exit(1)
        return await super()._answer(row)


class Mortal(EngineActor):
    """An actor whose GPU fails at a certain question, as CUDA reports it."""

    def _load(self) -> Any:
        loaded = super()._load()
        engine = self._loaded()
        encode = engine.encode_between_steps

        async def fail(prompt: Any) -> Any:
            if "deadly" in str(prompt):
                from qvl_runtime.errors import StepError

                raise StepError("a step failed") from RuntimeError("CUDA error: device-side assert triggered")
            return await encode(prompt)

        assert isinstance(engine, AsyncEngine)
        engine.encode_between_steps = fail  # type: ignore[method-assign]
        return loaded


def write_rows(folder: Path, count: int, pictures: int = 5, extra: tuple[Any, ...] = ()) -> Path:
    """A file of requests about a few pictures; every seventh samples, each with a seed."""
    for number in range(pictures):
        Image.new("RGB", (60, 40), (50 * number, 255 - 40 * number, 90)).save(folder / f"{number}.png")
    records: list[Any] = []
    for number in range(count):
        image = str(folder / f"{number * 3 % pictures}.png")
        record: dict[str, Any] = {"id": f"row {number}", "prompt": QUESTIONS[number % 3], "images": [image]}
        if number % 7 == 3:
            record["params"] = {"temperature": 0.7, "seed": number}
        records.append(record)
    path = folder / "requests.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in (*records, *extra)))
    return path


def answers(*paths: Path) -> list[str]:
    """The lines of answers as they are, sorted, but for the number of cached tokens, which depends on the order."""
    lines = [line for path in paths for line in path.read_text().splitlines()]
    return sorted(re.sub(r'"cached_tokens": [0-9]+', '"cached_tokens": 0', line) for line in lines)


def run(
    ray: Any,
    path: Path,
    out: Path,
    actors: int = 2,
    kind: type[EngineActor] = EngineActor,
    watch: Callable[[ActorPool, Progress], None] = lambda pool, progress: None,
) -> Progress:
    """Answer a file with some actors of a thread each."""
    spec = ActorSpec(ENGINE, GREEDY, str(path), MAX_LINE, 1, str(Path.cwd()))
    pools: list[ActorPool] = []

    def open_pool() -> ActorPool:
        pools.append(ActorPool(ray, spec, actors, 0, 1, 60, kind))
        return pools[0]

    with closing(Job(path, out, {"params": "greedy"})) as job:
        for progress in job.run(open_pool, 32):
            watch(pools[0], progress)
        return job.progress


def parts(out: Path) -> Iterator[Path]:
    """The parts of a job's folder."""
    yield from sorted(out.glob("part-*.jsonl"))
