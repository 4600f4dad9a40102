"""A fault inside a step is that of the request that causes it: others get their answers, and the books are right."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.serving.workload import image, prompt_of
from qvl_runtime import AsyncEngine, Completion, Engine, SamplingParams
from qvl_runtime.cli.batch import run_batch
from qvl_runtime.errors import CapacityError, ImageError, QVLError, StepError
from qvl_runtime.schedule.request import Branch
from qvl_runtime.schedule.runner import Chunk, Runner
from tests.faults.places import BAD, HOSTILE, PLACES, in_the_images, in_the_model
from tests.faults.test_rows import check_books, together
from tests.leaks import instances, left_behind

pytestmark = pytest.mark.cpu
GREEDY = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)
PENALIZED = SamplingParams(max_tokens=5, temperature=0.8, repetition_penalty=1.5, seed=4, ignore_eos=True)


@pytest.fixture(scope="module")
def engine(request: pytest.FixtureRequest) -> Engine:
    """Steps are launched ahead where a test asks for it."""
    overlap = getattr(request, "param", False)
    return Engine(dtype="float32", max_model_len=1024, max_step_tokens=96, overlap=overlap)


IN_BOTH_MODES = pytest.mark.parametrize("engine", [False, True], ids=["in turn", "ahead"], indirect=True)


@pytest.fixture(autouse=True)
def books_are_right(engine: Engine) -> Iterator[None]:
    yield
    check_books(engine)


class Boom(Exception):
    """A fault of the program."""


def prompts(engine: Engine, count: int) -> list[dict[str, Any]]:
    """Prompts of all lengths, every third with an image."""
    return [
        prompt_of(engine, [7, i, 3], *([image(i % 5)] if i % 3 == 0 else []), [i] * (1 + 40 * (i % 4)))
        for i in range(count)
    ]


def with_salts(params: SamplingParams, count: int, bad: Sequence[int]) -> list[SamplingParams]:
    return [replace(params, cache_salt=BAD if i in bad else "") for i in range(count)]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("params", [GREEDY, PENALIZED], ids=["greedy", "penalized"])
@pytest.mark.parametrize(
    ("engine", "bad"),
    [(False, (5,)), (False, (2, 7, 8)), (False, tuple(range(10))), (True, (5,)), (True, (2, 7, 8))],
    indirect=["engine"],
    ids=str,
)
def test_it_is_the_fault_of_one(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, place: Any, params: SamplingParams, bad: tuple[int, ...]
) -> None:
    asked = prompts(engine, 10)
    want = [engine.generate([one], params)[0].token_ids for one in asked]
    if place is in_the_images:
        for i in bad:
            asked[i] = prompt_of(engine, [8, i], image(100 + i), [i])
        HOSTILE.clear()
        HOSTILE.update(span.image.digest for i in bad for span in engine.encode(asked[i]).prompt.spans)
    each = with_salts(params, 10, bad)
    with monkeypatch.context() as patch:
        place(patch, lambda: Boom("no"))
        found = dict(engine.as_completed(list(zip(range(10), asked, each, strict=True))))
    for i in range(10):
        if i in bad:
            error = found[i]
            assert isinstance(error, StepError) and "Boom: no" in str(error) and isinstance(error.__cause__, Boom)
        else:
            one = found[i]
            assert isinstance(one, Completion) and one.token_ids == want[i]
    check_books(engine)
    assert [one.token_ids for one in engine.generate(prompts(engine, 10), params)] == want, "all is well afterwards"


def test_one_of_sixty_four_costs_few_more_computations(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    in_the_model(monkeypatch, lambda: Boom("no"))
    compute = Runner.compute

    def counted(self: Runner, chunks: Sequence[Chunk], *tokens: Any) -> Any:
        calls.append(len(chunks))
        return compute(self, chunks, *tokens)

    monkeypatch.setattr(Runner, "compute", counted)
    asked = [{"token_ids": [i, 1]} for i in range(48)]
    found = together(engine, asked, with_salts(GREEDY, 48, (41,)))
    assert [i for i, one in enumerate(found) if isinstance(one, QVLError)] == [41]
    assert calls[0] == 48 and len(calls) <= 1 + 2 * 6 + 5


def test_what_is_too_large_together_fails_nobody(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    compute = Runner.compute

    def small(self: Runner, chunks: Sequence[Chunk], *tokens: Any) -> Any:
        if len(chunks) > 3:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory")
        return compute(self, chunks, *tokens)

    asked = [{"token_ids": [i, 1]} for i in range(10)]
    want = [one.token_ids for one in engine.generate(asked, GREEDY)]
    monkeypatch.setattr(Runner, "compute", small)
    assert [one.token_ids for one in engine.generate(asked, GREEDY)] == want


@pytest.mark.parametrize(("kind", "words"), [
    (MemoryError, "no room"), (torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 2 GiB"),
    (ImageError, "gone"),
])  # fmt: skip
def test_the_error_says_what_it_is(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, kind: type[Exception], words: str
) -> None:
    in_the_model(monkeypatch, lambda: kind(words))
    with pytest.raises(ImageError if kind is ImageError else CapacityError, match=words.partition(".")[0]) as error:
        engine.generate([{"token_ids": [5]}], replace(GREEDY, cache_salt=BAD))
    cause = error.value.__cause__
    assert kind is ImageError or (isinstance(cause, kind) and "memory ran out" in str(error.value))


def test_an_error_keeps_nothing_of_its_step(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says where it came from as text: the frames of a traceback keep every request and tensor of the step."""
    kept = left_behind(lambda: instances(Branch))
    in_the_model(monkeypatch, lambda: Boom("no"))
    requests = [(i, {"token_ids": [i]}, params) for i, params in enumerate(with_salts(GREEDY, 4, (1,)))]
    error = dict(engine.as_completed(requests))[1]
    del requests
    assert not kept()
    assert isinstance(error, StepError)
    if hasattr(error, "__notes__"):  # Python 3.11
        assert "in raising" in error.__notes__[0] and "Boom: no" in error.__notes__[0]


def test_a_broken_device_ends_all_and_never_loops(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [{"token_ids": [i]} for i in range(20)]
    with monkeypatch.context() as patch:
        patch.setattr(Runner, "compute", lambda *given: 1 / 0)
        found = together(engine, asked, GREEDY)
        assert all(isinstance(one, StepError) for one in found)
    assert all(isinstance(one, Completion) for one in together(engine, asked, GREEDY))


@IN_BOTH_MODES
@pytest.mark.parametrize("place", PLACES)
def test_control_c_passes_through(engine: Engine, monkeypatch: pytest.MonkeyPatch, place: Any) -> None:
    asked = [prompt_of(engine, [i], image(50 + 4 * PLACES.index(place) + i), [i]) for i in range(4)]  # not cached
    HOSTILE.clear()
    HOSTILE.update(span.image.digest for one in asked for span in engine.encode(one).prompt.spans)
    params = with_salts(GREEDY, 4, range(4))
    with monkeypatch.context() as patch:
        place(patch, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            engine.generate(asked, params)
    check_books(engine)
    assert len(engine.generate(asked, params)) == 4


def test_readers_and_batches(engine: Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked, bad = prompts(engine, 6), replace(GREEDY, cache_salt=BAD)
    want = [one.token_ids for one in engine.generate(asked, GREEDY)]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    records = [{"raw": {"token_ids": [i, 5]}, "params": {"cache_salt": BAD if i == 1 else ""}} for i in range(4)]
    source.write_text("\n".join(map(json.dumps, records)))
    in_the_model(monkeypatch, lambda: Boom("no"))

    async def main() -> None:
        async with AsyncEngine(engine) as served:
            failing = asyncio.create_task(served.generate(asked[3], bad))
            found = await served.generate_all(asked, GREEDY)
            assert [one.token_ids for one in found if isinstance(one, Completion)] == want
            with pytest.raises(StepError):
                await failing
            with pytest.raises(StepError):
                async for _ in served.stream(asked[3], bad):
                    pass
            assert (await served.generate(asked[0], GREEDY)).token_ids == want[0]

    asyncio.run(main())
    *_, last = run_batch(engine, source, target, GREEDY)
    assert (last.done, last.errors) == (4, 1)


def test_random_faults_at_random_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """Preemption, several answers, drafts, and faults of any kind in any step: who is answered is answered right."""
    for seed in range(3):
        dice = random.Random(seed)
        engine = Engine(dtype="float32", max_model_len=512, kv_cache_bytes=2**21, max_running=6, max_step_tokens=48,
                        speculative_tokens=2 * (seed % 2), overlap=seed == 2)  # fmt: skip
        asked = prompts(engine, 16)
        given = [
            SamplingParams(max_tokens=6, temperature=1.0, seed=i, n=dice.choice((1, 1, 3)), ignore_eos=True,
                           repetition_penalty=dice.choice((1.0, 1.3)))
            for i in range(16)
        ]  # fmt: skip
        want = [[a.token_ids for a in engine.generate([p], g)[0].answers] for p, g in zip(asked, given, strict=True)]
        core = engine.core
        with monkeypatch.context() as patch:
            for owner, name in ((Runner, "compute"), (Runner, "features"), (Branch, "add"), (Branch, "finish_step")):
                patch.setattr(owner, name, failing_at_times(getattr(owner, name), dice))
            requests = [engine.submit(engine.encode(p), g) for p, g in zip(asked, given, strict=True)]
            while not all(request.done for request in requests):
                assert core.step()
                core.runner.cache.check_integrity()
        answered = 0
        for request, answers in zip(requests, want, strict=True):
            if request.error is None:
                answered += 1
                assert [a.token_ids for a in request.completion().answers] == answers
        assert 0 < answered < 16
        check_books(engine)


def failing_at_times(function: Any, dice: random.Random) -> Any:
    def run(*arguments: Any) -> Any:
        if dice.random() < 0.01:
            raise Boom
        result = function(*arguments)
        if dice.random() < 0.01:
            raise Boom
        return result

    return run
