"""One engine, many threads: each caller gets the answer that it gets alone, and a forked child an error."""

from __future__ import annotations

import gc
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from benchmarks.serving.workload import greedy, image, prompt_of
from qvl_runtime import Engine, SamplingParams
from qvl_runtime.errors import CapacityError, PromptError, QVLError

pytestmark = pytest.mark.cpu
THREADS = 8
CALLS = int(os.environ.get("QVL_THREAD_CALLS", "96"))  # 500 take two minutes on two cores


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(dtype="float32", max_model_len=512, max_step_tokens=96)


@pytest.fixture(autouse=True)
def nothing_is_left(engine: Engine) -> Iterator[None]:
    yield
    cache, scheduler = engine.core.runner.cache, engine.core.scheduler
    cache.check_integrity()
    assert cache.pool.available == cache.pool.num_blocks
    assert not scheduler.running and not scheduler.waiting


def call(engine: Engine, number: int) -> Any:
    """One of the engine's calls on one of its inputs, by number; the result compares equal if the answer does."""
    rng = random.Random(number)
    ids = [rng.randrange(1, 800) for _ in range(rng.randrange(1, 40))]
    parts = [ids, image(number % 3)] if number % 4 == 0 else [ids]
    prompt = prompt_of(engine, *parts)
    drawn = SamplingParams(max_tokens=12, temperature=0.9, top_p=0.9, seed=number, ignore_eos=True)
    kind = number % 7
    if kind == 0:
        return [c.token_ids for c in engine.generate([prompt, prompt_of(engine, ids[:3])], greedy(10))]
    if kind == 1:
        return engine.generate([prompt], drawn)[0].token_ids
    if kind == 2:
        return [token for piece in engine.stream(prompt, drawn) for token in piece.token_ids]
    if kind == 3:  # a stream that is left half-way
        pieces = engine.stream(prompt, greedy(200))
        taken = [next(pieces).token_ids for _ in range(3)]
        pieces.close()  # type: ignore[attr-defined]
        return taken
    if kind == 4:
        return engine.score(prompt).logprobs.tolist()
    if kind == 5:
        several = SamplingParams(max_tokens=6, temperature=1.0, seed=number, n=3, repetition_penalty=1.1)
        return [answer.token_ids for answer in engine.generate([prompt], several)[0].answers]
    engine.report()
    return engine.chat([{"role": "user", "content": f"number {number}"}], greedy(8)).token_ids


# llama-cpp-python#471, ctransformers#38, exllama#235, exllamav2#690
def test_mixed_calls_of_many_threads_are_what_each_gets_alone(engine: Engine) -> None:
    alone = [call(engine, number) for number in range(CALLS)]
    order = random.Random(0).sample(range(CALLS), CALLS)
    with ThreadPoolExecutor(THREADS) as pool:
        together = dict(zip(order, pool.map(lambda number: call(engine, number), order), strict=True))
    assert [together[number] for number in range(CALLS)] == alone


def test_a_call_within_a_stream_of_the_same_thread(engine: Engine) -> None:
    prompt, other = prompt_of(engine, [5, 6]), prompt_of(engine, [7, 8, 9])
    alone = engine.generate([prompt], greedy(8))[0].token_ids, engine.score(other).logprobs.tolist()
    tokens: list[int] = []
    for piece in engine.stream(prompt, greedy(8)):
        tokens += piece.token_ids
        assert engine.score(other).logprobs.tolist() == alone[1]
        assert engine.report()["requests"]["running"] in (0, 1)
    assert tuple(tokens) == alone[0]


def test_a_thread_that_has_the_engine_to_itself_may_use_it(engine: Engine) -> None:
    alone = call(engine, 1), call(engine, 2)
    with ThreadPoolExecutor(1) as pool:
        with engine.exclusive():
            other = pool.submit(call, engine, 2)
            with engine.exclusive():
                assert call(engine, 1) == alone[0]
            assert not other.done()
        assert other.result(60) == alone[1]


def test_a_request_that_arrives_late_joins_those_that_run(engine: Engine) -> None:
    """As the lines of a pipe do: None means that there is none yet."""
    polls = 0

    def arriving() -> Iterator[tuple[str, Any, SamplingParams] | None]:
        nonlocal polls
        yield "long", prompt_of(engine, [1]), greedy(60)
        for _ in range(5):
            polls += 1
            yield None
        yield "short", prompt_of(engine, [2]), greedy(3)

    assert [tag for tag, _ in engine.as_completed(arriving())] == ["short", "long"]
    assert polls == 5


def test_a_long_answer_does_not_hold_up_a_short_one(engine: Engine) -> None:
    steps: list[int] = []
    with ThreadPoolExecutor(2) as pool:
        long = pool.submit(engine.generate, [prompt_of(engine, [1])], greedy(300))
        while not engine.core.scheduler.running:
            pass
        before = engine.core.steps
        engine.generate([prompt_of(engine, [2])], greedy(4))
        steps.append(engine.core.steps - before)
        assert not long.done()
        long.result()
    assert steps[0] < 60, "the short request waited for the long one"


def test_an_error_of_one_thread_is_its_own(engine: Engine) -> None:
    def wrong(number: int) -> str:
        with pytest.raises((CapacityError, PromptError)):
            engine.generate([{"token_ids": [1] * 600}] if number % 2 else [""], greedy(2))
        return "refused"

    alone = call(engine, 1)
    with ThreadPoolExecutor(THREADS) as pool:
        results = list(pool.map(lambda n: wrong(n) if n % 3 else call(engine, 1), range(24)))
    assert results == ["refused" if n % 3 else alone for n in range(24)]


def test_streams_dropped_in_any_thread_free_their_blocks(engine: Engine) -> None:
    streams = [engine.stream(prompt_of(engine, [i + 1]), greedy(400)) for i in range(6)]
    for stream in streams:
        next(stream)

    def drop() -> None:
        streams.pop()
        gc.collect()

    busy = threading.Thread(target=lambda: engine.generate([prompt_of(engine, [3])], greedy(60)))
    busy.start()
    droppers = [threading.Thread(target=drop) for _ in range(len(streams))]
    for thread in droppers:
        thread.start()
    for thread in [*droppers, busy]:
        thread.join(60)
        assert not thread.is_alive()


def test_an_interrupt_in_one_thread_leaves_the_turn_to_the_others(engine: Engine) -> None:
    """Ctrl-C reaches the main thread at any instruction; here the step itself raises it."""
    alone, step, main = call(engine, 1), engine.core.step, threading.get_ident()

    def interrupted() -> bool:
        if threading.get_ident() == main:
            raise KeyboardInterrupt
        return step()

    engine.core.step = interrupted  # type: ignore[method-assign]
    try:
        with ThreadPoolExecutor(2) as pool:
            others = [pool.submit(call, engine, 1) for _ in range(4)]
            for _ in range(4):
                try:
                    engine.generate([prompt_of(engine, [1, 2])], greedy(8))
                except KeyboardInterrupt:
                    continue
            assert [other.result(60) for other in others] == [alone] * 4
    finally:
        del engine.core.step


def test_a_call_from_within_a_step_is_refused(engine: Engine) -> None:
    """As a signal handler might do."""
    step, refused = engine.core.step, []

    def nested() -> bool:
        for door in (engine.report, lambda: engine.generate(["x"]), lambda: engine.score("x")):
            with pytest.raises(QVLError, match="in the middle of a step"):
                door()
            refused.append(door)
        return step()

    engine.core.step = nested  # type: ignore[method-assign]
    try:
        engine.generate([prompt_of(engine, [1])], greedy(1))
    finally:
        del engine.core.step
    assert len(refused) >= 3


FORK = """
import os, sys
from qvl_runtime import AsyncEngine, Engine, SamplingParams
from qvl_runtime.errors import ForkError
engine = Engine(dtype="float32", max_model_len=128)
import torch
torch.set_num_threads(2)
first = engine.generate(["hello"], SamplingParams(max_tokens=2))[0].token_ids
half = engine.stream("hello", SamplingParams(max_tokens=9, ignore_eos=True))
next(half)
pid = os.fork()
if pid == 0:
    import asyncio
    doors = [lambda: engine.generate(["hello"]), lambda: next(engine.stream("hello")), lambda: engine.score("hello"),
             engine.report, lambda: engine.encode("hello"), lambda: engine.chat([{"role": "user", "content": "a"}]),
             lambda: next(half), lambda: AsyncEngine(engine)]
    try:
        Engine(dtype="float32", max_model_len=128)
    except ForkError as error:
        assert "torch's threads do not exist" in str(error), error
    else:
        os._exit(100)
    for number, door in enumerate(doors):
        try:
            door()
        except ForkError as error:
            assert f"made in process {os.getppid()}" in str(error) and "spawn" in str(error), error
        else:
            os._exit(number + 1)
    import torch
    torch.set_num_threads(1)
    own = Engine(dtype="float32", max_model_len=128)
    os._exit(0 if own.generate(["hello"], SamplingParams(max_tokens=2))[0].token_ids == first else 101)
_, status = os.waitpid(pid, 0)
rest = [token for piece in half for token in piece.token_ids]
assert len(rest) == 8, rest  # the parent's stream goes its way
sys.exit(os.waitstatus_to_exitcode(status))
"""


# pytorch#49555, gunicorn#2478, pytorch#17199
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_child_gets_an_error() -> None:
    done = subprocess.run([sys.executable, "-c", FORK], timeout=120, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_turn_is_taken_once_a_step(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    taken, take = [], engine._turns._take
    monkeypatch.setattr(engine._turns, "_take", lambda *a, **k: taken.append(1) or take(*a, **k))  # type: ignore[func-returns-value]
    before = engine.core.steps
    engine.generate([prompt_of(engine, [1])], greedy(10))
    assert len(taken) == engine.core.steps - before + 2, "one a step, one for the submission, one that finds it done"
