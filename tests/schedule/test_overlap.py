"""Steps launched before the last one's tokens are read give the same answers, and take back what was over-run."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from benchmarks.serving.workload import image, prompt_of
from qvl_runtime import Completion, Engine, SamplingParams
from qvl_runtime.errors import NumericsError
from qvl_runtime.schedule.computing import Computing
from qvl_runtime.schedule.request import Request
from qvl_runtime.schedule.sampler import Sampled
from tests.engine.test_adapters import ADAPTERS
from tests.faults.test_rows import check_books, damage

pytestmark = pytest.mark.cpu
OPTIONS: dict[str, Any] = {"dtype": "float32", "max_model_len": 256, "adapters": ADAPTERS}
GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
DRAWN = SamplingParams(max_tokens=12, temperature=1.5, seed=7, ignore_eos=True)
# Every way for an answer to end, and everything that it may be sampled with.
KINDS: dict[str, SamplingParams] = {
    "length": GREEDY,
    "one token": replace(GREEDY, max_tokens=1),
    "its own end": SamplingParams(max_tokens=40, temperature=0.0),
    "the end of text": SamplingParams(max_tokens=40, temperature=0.0, end_of_text_only=True),
    "a drawn end": SamplingParams(max_tokens=60, temperature=1.0, seed=2),
    "a stop token": replace(DRAWN, stop_token_ids=tuple(range(0, 240, 7))),
    "a stop string": replace(DRAWN, max_tokens=40, stop=("e", "th", "\u00e9")),
    "no early end": SamplingParams(max_tokens=30, min_tokens=20, temperature=0.0, stop_token_ids=tuple(range(120))),
    "no early end, drawn": replace(DRAWN, min_tokens=6, stop_token_ids=tuple(range(120))),
    "context": replace(GREEDY, max_tokens=10_000, timeout_s=60),
    "drawn": DRAWN,
    "cut": replace(DRAWN, top_k=9, top_p=0.9, min_p=0.01),
    "penalties": replace(DRAWN, repetition_penalty=1.4, presence_penalty=0.5, frequency_penalty=0.7, logprobs=3),
    "greedy penalty": replace(GREEDY, repetition_penalty=1.3),
    "counts": replace(GREEDY, frequency_penalty=1.5),
    "biases": replace(DRAWN, logit_bias={65: 3.0, 66: -float("inf")}),
    "log probabilities": replace(GREEDY, logprobs=5, prompt_logprobs=2),
    "several": replace(DRAWN, n=3, logprobs=1),
    "more than slots": replace(DRAWN, n=9, repetition_penalty=1.2),
    "boxes": replace(GREEDY, max_tokens=40, boxes="force"),
    "boxes in text": replace(DRAWN, max_tokens=40, boxes="allow", ignore_eos=False),
    "an adapter": replace(GREEDY, adapter="first"),
    "another adapter": replace(DRAWN, adapter="second"),
}
if find_spec("llguidance") is not None:
    schema = {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
              "required": ["name", "age"], "additionalProperties": False}  # fmt: skip
    KINDS["a schema"] = SamplingParams(max_tokens=60, temperature=0.7, seed=3, json_schema=schema)
    KINDS["an expression"] = SamplingParams(max_tokens=60, temperature=0.0, regex=r"[a-c]{3,9}(yes|no)")


def engine_of(overlap: bool, **options: Any) -> Engine:
    return Engine(overlap=overlap, **{**OPTIONS, **options})


def content(completion: Completion) -> list[Any]:
    answers = completion.answers
    return [(a.text, a.token_ids, a.finish_reason, a.logprobs, a.prompt_logprobs, a.boxes) for a in answers]


def prompts(engine: Engine, count: int) -> list[dict[str, Any]]:
    """Prompts of all lengths, some with images, some with a common beginning."""
    parts = [[[7, i, 3], *([image(i % 3)] if i % 4 == 0 else []), [i] * (1 + 23 * (i % 3))] for i in range(count)]
    return [prompt_of(engine, *part) for part in parts]


@pytest.fixture(scope="module")
def plain() -> Engine:
    return engine_of(False)


@pytest.fixture(scope="module")
def ahead() -> Engine:
    return engine_of(True)


@pytest.fixture(autouse=True)
def nothing_is_left(ahead: Engine) -> Iterator[None]:
    yield
    check_books(ahead)
    assert ahead.core.overlap is not None and ahead.core.overlap.land() is None


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_answer(plain: Engine, ahead: Engine, kind: str) -> None:
    asked, overlap = prompts(plain, 2), ahead.core.overlap
    assert overlap is not None
    before = overlap.steps
    want = [content(one) for one in plain.generate(asked, KINDS[kind])]
    requests = [ahead.submit(ahead.encode(one), KINDS[kind], streamed=True) for one in asked]
    while not all(request.done for request in requests):
        assert ahead.core.step()
    assert [content(request.completion()) for request in requests] == want
    for request, answers in zip(requests, want, strict=True):
        assert "".join(piece.text for piece in request.pieces if piece.answer == 0) == answers[0][0]
    assert overlap.steps > before or max(len(tokens) for one in want for _, tokens, *_ in one) < 3


SWITCHES: dict[str, dict[str, Any]] = {
    "all kinds": {},
    "op by op, nothing cached": {"graphs": False, "prefix_caching": False},
    "parts of prompts, int8 cache": {"max_step_tokens": 20, "max_running": 8, "kv_dtype": "int8"},
    "drafts": {"speculative_tokens": 3},
    "preemption": {"kv_cache_bytes": 2**21},
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_all_kinds_together(switch: str) -> None:
    options = SWITCHES[switch]
    plain, ahead = engine_of(False, **options), engine_of(True, **options)
    kinds = [params for name, params in KINDS.items() if name != "context"]
    asked = prompts(plain, len(kinds))
    want = [content(one) for one in plain.generate(asked, kinds)]
    assert [content(one) for one in ahead.generate(asked, kinds)] == want
    check_books(ahead)
    said = ahead.report()["requests"]
    assert (said["steps_ahead"] > 0) == (switch != "drafts"), "drafts depend on the tokens"
    assert said["rows_over_run"] > 0 or switch == "drafts"
    assert said["preemptions"] > 0 or switch != "preemption"


def test_arriving_cancelled_preempted_and_used_for_something_else(plain: Engine) -> None:
    """Requests come and go at random steps, and between two of them others lose their blocks or the runner is used."""
    kinds = [params for name, params in KINDS.items() if name != "context"]
    asked = prompts(plain, len(kinds))
    want = [content(plain.generate([one], params)[0]) for one, params in zip(asked, kinds, strict=True)]
    engine, dice = engine_of(True, max_running=10), random.Random(3)
    core = engine.core
    arriving, running = list(range(len(kinds))) * 2, list[tuple[int, Request]]()
    answered = 0
    while arriving or running:
        for _ in range(dice.choice((0, 0, 1, 3))):
            if arriving:
                i = arriving.pop(dice.randrange(len(arriving)))
                running.append((i, engine.submit(engine.encode(asked[i]), kinds[i], streamed=dice.random() < 0.5)))
        chance = dice.random()
        if chance < 0.05:
            core.scheduler.make_room(core.runner.cache.pool.available + dice.randrange(1, 20))
        elif chance < 0.1:
            engine.choose({"token_ids": [5, 6]}, ["a", "bc"])
        elif chance < 0.2 and running:
            core.cancel(running.pop(dice.randrange(len(running)))[1])
        for _, request in running:
            request.paused = dice.random() < 0.1
        core.step()
        core.runner.cache.check_integrity()
        for i, request in [pair for pair in running if pair[1].done]:
            running.remove((i, request))
            assert content(request.completion()) == want[i]
            answered += 1
    assert answered > len(kinds) and core.overlap is not None and core.overlap.steps > 20
    check_books(engine)


def test_the_next_step_is_launched_before_tokens_are_read(ahead: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    for owner, name in ((Computing, "launch"), (Computing, "sample"), (Sampled, "read")):
        function = getattr(owner, name)

        def noted(*given: Any, _name: str = name, _function: Any = function, **named: Any) -> Any:
            order.append(_name)
            return _function(*given, **named)

        monkeypatch.setattr(owner, name, noted)
    ahead.generate([{"token_ids": [1, 2]}], replace(GREEDY, max_tokens=4))
    assert order == ["launch", *["sample", "launch", "read"] * 3, "sample", "read"]


def test_an_end_that_is_known_is_not_over_run(ahead: Engine) -> None:
    overlap = ahead.core.overlap
    assert overlap is not None
    lost = overlap.lost_rows
    ahead.generate(prompts(ahead, 4), GREEDY)
    assert overlap.lost_rows == lost
    ahead.generate([{"token_ids": [5, 6]}], replace(GREEDY, stop_token_ids=tuple(range(ahead.config.vocab_size))))
    assert overlap.lost_rows == lost + 1


def test_over_run_tokens_are_in_no_prefix(plain: Engine) -> None:
    """What a request over-ran is not found by later prompts, at every place in a block."""
    every = tuple(range(plain.config.vocab_size))
    for length in range(13, 19):
        found = []
        for overlap in (False, True):
            engine = engine_of(overlap)
            first = engine.generate([{"token_ids": [9] * length}], replace(GREEDY, stop_token_ids=every))[0]
            second = {"token_ids": [*[9] * length, *first.token_ids, 4, 4]}
            found.append((first.token_ids, *content(engine.generate([second], replace(GREEDY, n=2))[0])))
            prefixes = engine.core.runner.cache.prefixes
            assert prefixes is not None
            found[-1] += (prefixes.hit_tokens, len(prefixes.blocks))
            check_books(engine)
        assert found[0] == found[1]


def test_a_damaged_row_fails_alone_with_the_same_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its logits are gone by the time it is found: the next step has overwritten them."""
    said = []
    for overlap in (False, True):
        engine = damage(engine_of(overlap))
        bad = engine.submit(engine.encode({"token_ids": [5, 6]}), replace(GREEDY, logit_bias={77: 1e4}))
        good = engine.submit(engine.encode({"token_ids": [9]}), GREEDY)
        while not (bad.done and good.done):
            assert engine.core.step()
        assert isinstance(bad.error, NumericsError) and len(bad.branches[0].output.token_ids) == 1
        said.append((str(bad.error), good.completion().token_ids))
        check_books(engine)
    assert said[0] == said[1]


def test_a_step_that_cannot_be_launched_ahead_is_computed_in_its_turn(
    plain: Engine, ahead: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    want = [content(one) for one in plain.generate(prompts(plain, 4), DRAWN)]
    compute, fails = ahead.core.runner.compute, 0

    def failing(chunks: Any, *tokens: Any) -> Any:
        nonlocal fails
        if tokens and fails < 3:
            fails += 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return compute(chunks, *tokens)

    monkeypatch.setattr(ahead.core.runner, "compute", failing)
    assert [content(one) for one in ahead.generate(prompts(ahead, 4), DRAWN)] == want
    assert caplog.text.count("could not be launched ahead: OutOfMemoryError") == 3


@pytest.mark.parametrize("where", ["launch", "sample", "read", "add"])
def test_control_c_at_any_moment(plain: Engine, ahead: Engine, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """Requests that are not cancelled continue as if nothing had happened."""
    from qvl_runtime.schedule.request import Branch

    params = replace(DRAWN, repetition_penalty=1.3, frequency_penalty=0.5)
    want = [content(one) for one in plain.generate(prompts(plain, 4), params)]
    owner = Branch if where == "add" else Computing
    function, calls = getattr(owner, where), 0

    def interrupted(*given: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls in (3, 6, 9):
            raise KeyboardInterrupt
        return function(*given, **named)

    requests = [ahead.submit(ahead.encode(one), params) for one in prompts(ahead, 4)]
    monkeypatch.setattr(owner, where, interrupted)
    stopped = 0
    while not all(request.done for request in requests):
        try:
            assert ahead.core.step()
        except KeyboardInterrupt:
            stopped += 1
        ahead.core.runner.cache.check_integrity()
    assert stopped == 3 and [content(request.completion()) for request in requests] == want


def test_embeddings_on_the_host_need_the_tokens_there(plain: Engine) -> None:
    engine = Engine(dtype="float32", max_model_len=512, overlap=True, embedding_on_host=True)
    assert engine.core.overlap is None
    assert content(engine.generate([{"token_ids": [1, 2]}], DRAWN)[0]) == content(
        plain.generate([{"token_ids": [1, 2]}], DRAWN)[0]
    )
