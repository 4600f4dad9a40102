"""Whose turn it is: who is served first, who gives way, who is refused, cancelled or out of time."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.serving.workload import greedy
from qvl_runtime import Engine
from qvl_runtime.errors import CapacityError, ConfigError
from qvl_runtime.schedule.request import Request
from tests.schedule.drive import checkpoint, engine_of

pytestmark = pytest.mark.cpu


def submitted(engine: Engine, prompt: object, **params: object) -> Request:
    """A request that has been through one step."""
    request = engine.submit(engine.encode(prompt), greedy(1, **params))
    engine.core.step()
    return request


def test_a_long_prompt_does_not_stall_those_that_decode(nano: Engine) -> None:
    """While 2,000 tokens are prefilled in chunks of 512, a running answer gets a token in every step."""
    running = submitted(nano, {"token_ids": [5, 4, 3]}, min_p=0.0)
    running = nano.submit(nano.encode({"token_ids": [9, 8, 7]}), greedy(12))
    nano.core.step()
    long = nano.submit(nano.encode({"token_ids": [(i * 11) % 239 for i in range(2000)]}), greedy(1))
    for made in range(2, 6):
        nano.core.step()
        assert len(running.branches[0].output.token_ids) == made
    assert long.done
    nano.core.cancel(running)


def test_who_came_first_is_served_first_and_the_latest_gives_way() -> None:
    engine = engine_of(checkpoint("nano", Path()), 1024, kv_tokens=0.15, prefix_caching=False)
    requests = [engine.submit(engine.encode({"token_ids": [i] * 40}), greedy(60)) for i in range(6)]
    done: list[int] = []
    while len(done) < len(requests):
        assert engine.core.step()
        done += [r.number for r in requests if r.done and r.number not in done]
    assert done == sorted(done)
    assert engine.report()["requests"]["preemptions"] > 0


def test_what_can_never_fit_is_refused_with_the_numbers() -> None:
    engine = engine_of(checkpoint("nano", Path()), 1024, kv_tokens=0.25)
    with pytest.raises(
        CapacityError, match=r"needs 301 tokens of KV cache, 2 MiB; the cache holds 256: shorten it, raise"
    ):
        engine.generate([{"token_ids": [1] * 300}])
    with pytest.raises(CapacityError, match=r"the prompt has 1024 tokens; the context holds 1024 with the answer"):
        engine.generate([{"token_ids": [1] * 1024}])
    out = engine.generate([{"token_ids": [1] * 250}], greedy(100))[0]
    assert (len(out.token_ids), out.finish_reason) == (6, "length"), "an answer ends where the cache does"
    with pytest.raises(ConfigError, match="100 bytes of KV cache hold 0 tokens"):
        Engine(kv_cache_bytes=100)
    with pytest.raises(ConfigError, match="max_running is 9 and max_step_tokens 8"):
        Engine(max_running=9, max_step_tokens=8)


def test_cancelling_frees_everything_at_once(nano: Engine) -> None:
    pool = nano.core.runner.cache.pool
    requests = [nano.submit(nano.encode({"token_ids": [i, 2, 3] * 300}), greedy(50)) for i in range(4)]
    for steps in range(4):
        nano.core.cancel(requests[steps])
        nano.core.runner.cache.check_integrity()
        if steps < 3:
            assert nano.core.step()
    assert pool.available == pool.num_blocks
    assert not nano.core.step()


def test_a_deadline_ends_an_answer_with_what_it_has(nano: Engine) -> None:
    out = nano.generate([{"token_ids": [1, 2, 3]}], greedy(5000, timeout_s=0.2, n=2))[0]
    assert out.finish_reason == "deadline" and 0 < len(out.token_ids) < 5000
    assert out.text == nano.tokenizer.decode(out.token_ids)
    late = nano.generate([{"token_ids": [1, 2, 3]}], greedy(5, timeout_s=1e-9, n=3))[0]
    assert [c.token_ids for c in late.answers] == [()] * 3
    pool = nano.core.runner.cache.pool
    assert pool.available == pool.num_blocks
