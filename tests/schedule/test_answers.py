"""Several answers of one prompt, sampled answers and drafts do not depend on the other sequences in a step."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.serving.workload import greedy
from qvl_runtime import Engine, SamplingParams
from tests.schedule.drive import checkpoint, engine_of

pytestmark = pytest.mark.cpu


def test_answers_of_one_prompt_share_its_blocks() -> None:
    engine = Engine(dtype="float32", prefix_caching=False)
    params = SamplingParams(max_tokens=20, temperature=2.0, seed=5, n=4, ignore_eos=True)
    request = engine.submit(engine.encode({"token_ids": list(range(100))}), params)
    pool = engine.core.runner.cache.pool
    engine.core.step()
    assert pool.num_blocks - pool.available == 7
    engine.core.step()
    assert pool.num_blocks - pool.available == 10, "six in common, and each its own copy of the last"
    engine.core.runner.cache.check_integrity()
    while not request.done:
        engine.core.step()
    for i, answer in enumerate(request.completion().answers):
        single = SamplingParams(max_tokens=20, temperature=2.0, seed=5 + i, ignore_eos=True)
        assert engine.generate([{"token_ids": list(range(100))}], single)[0].token_ids == answer.token_ids


def test_sampled_answers_do_not_depend_on_neighbors_drafts_or_preemption() -> None:
    params = [SamplingParams(max_tokens=30, temperature=1.0, top_p=0.8, seed=i, ignore_eos=True) for i in range(8)]
    prompts = [{"token_ids": [i, *range(30), *range(20)]} for i in range(8)]
    quiet = Engine(dtype="float32", prefix_caching=False)
    want = [quiet.generate([p], own)[0].token_ids for p, own in zip(prompts, params, strict=True)]
    for options in ({}, {"kv_tokens": 0.3}, {"speculative_tokens": 4}):
        engine = engine_of(checkpoint("nano", Path()), 1024, **options)
        assert [c.token_ids for c in engine.generate(prompts, params)] == want


def test_drafts_are_accepted_where_the_text_repeats_itself() -> None:
    engine = Engine(dtype="float32", speculative_tokens=4)
    plain = Engine(dtype="float32")
    prompt = {"token_ids": [*range(40)] * 5}
    params = greedy(60)
    assert engine.generate([prompt], params)[0].token_ids == plain.generate([prompt], params)[0].token_ids
    drafts = engine.report()["drafts"]
    assert drafts["proposed"] >= drafts["accepted"] > 0
    assert engine.core.steps < plain.core.steps
    engine.core.runner.cache.check_integrity()
