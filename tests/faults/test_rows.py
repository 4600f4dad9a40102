"""A request whose logits are not finite ends with an error of its own, and the others get their answers."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from qvl_runtime import AsyncEngine, Completion, Engine, SamplingParams
from qvl_runtime.cli.batch import run_batch
from qvl_runtime.errors import NumericsError, QVLError, SamplingError

pytestmark = pytest.mark.cpu
DAMAGED = 77  # the token whose embedding is damaged
BAD = {"token_ids": [5, DAMAGED, 6]}
GOOD = [{"token_ids": [5, 4, 6]}, {"token_ids": [*range(20, 60)]}, {"token_ids": [9]}]
GREEDY = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
DRAWN = SamplingParams(max_tokens=6, temperature=1.0, top_p=0.9, seed=3, ignore_eos=True)
PENALIZED = SamplingParams(max_tokens=6, temperature=0.7, repetition_penalty=1.2, seed=3, logprobs=2, ignore_eos=True)


def damage(engine: Engine, value: float = math.nan) -> Engine:
    """Make the embedding of one token NaN, as a flipped bit of a file or of memory does."""
    decoder = engine.core.runner.model.decoder
    decoder.embedding = decoder.embedding.clone()
    decoder.embedding[DAMAGED] = value
    return engine


@pytest.fixture(scope="module")
def engine() -> Engine:
    return damage(Engine(dtype="float32", max_model_len=1024, max_step_tokens=64))


@pytest.fixture(autouse=True)
def nothing_is_left(engine: Engine) -> Iterator[None]:
    yield
    check_books(engine)


def check_books(engine: Engine) -> None:
    cache, scheduler = engine.core.runner.cache, engine.core.scheduler
    cache.check_integrity()
    assert cache.pool.available == cache.pool.num_blocks
    assert not scheduler.running and not scheduler.waiting


def together(engine: Engine, prompts: list[Any], params: Any) -> list[Completion | QVLError]:
    try:
        return list(engine.generate(prompts, params))
    except QVLError as error:
        assert error.completions is not None
        return list(error.completions)


def answer_of(engine: Engine, prompt: Any, params: SamplingParams) -> tuple[int, ...]:
    return engine.generate([prompt], params)[0].token_ids


# Qwen3#269, Qwen3#381, vllm#14126, Qwen3#761, MiMo-VL#8
@pytest.mark.parametrize("params", [GREEDY, DRAWN, PENALIZED], ids=["greedy", "drawn", "penalized"])
def test_generate_finishes_all_and_then_raises(engine: Engine, params: SamplingParams) -> None:
    alone = [answer_of(engine, prompt, params) for prompt in GOOD]
    with pytest.raises(NumericsError, match="NaN of its 1152 logits in float32") as one:
        engine.generate([GOOD[0], BAD, GOOD[1], BAD, GOOD[2]], params)
    assert one.value.completions is not None
    assert "The likely cause is a damaged weight: fetch the checkpoint again" in str(one.value)
    first, bad, second, also_bad, third = one.value.completions
    assert [c.token_ids for c in (first, second, third)] == alone
    assert bad is one.value and isinstance(also_bad, NumericsError)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "options",
    [
        {"speculative_tokens": 4},
        {"graphs": False},
        {"kv_dtype": "int8"},
        {"precision": "fast"},
        {"prefix_caching": False},
        {"dtype": "bfloat16"},
        {"dtype": "float16"},
    ],
    ids=str,
)
def test_however_the_engine_runs(options: dict[str, Any], value: float) -> None:
    engine = damage(Engine(**{"dtype": "float32", "max_model_len": 512} | options), value)
    prompts = [GOOD[0], BAD, GOOD[1]]
    for params in (GREEDY, DRAWN):
        found = together(engine, prompts, params)
        assert isinstance(found[1], NumericsError)
        assert ("float16's 65,504" in str(found[1])) == (options.get("dtype") == "float16")
        assert all(isinstance(one, Completion) and len(one.token_ids) == 6 for one in (found[0], found[2]))
    check_books(engine)


def test_a_damaged_token_in_the_answer(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error comes where the answer meets it: a stream gives the pieces before. Drafts that meet it are refused."""
    params = SamplingParams(max_tokens=9, temperature=0.0, logit_bias={DAMAGED: 1e4})
    pieces = []
    with pytest.raises(NumericsError):
        for piece in engine.stream(GOOD[0], params):
            pieces.append(piece)
    assert [piece.token_ids for piece in pieces] == [(DAMAGED,)]
    drafting = damage(Engine(dtype="float32", max_model_len=512, speculative_tokens=6))
    prompt = {"token_ids": [1, 2, 3, 4] * 4}
    plain = answer_of(engine, prompt, GREEDY)
    drafts = (plain[0], DAMAGED, 3, 3, 3, 3)
    monkeypatch.setattr("qvl_runtime.schedule.speculative.Drafter.propose", lambda _, tokens, count: drafts[:count])
    assert answer_of(drafting, prompt, GREEDY) == plain
    check_books(drafting)


def test_several_answers_of_one_prompt_fail_together(engine: Engine) -> None:
    several = SamplingParams(max_tokens=4, temperature=1.0, seed=1, n=5, ignore_eos=True)
    found = together(engine, [GOOD[0], BAD], several)
    assert isinstance(found[0], Completion) and len(found[0].answers) == 5
    assert isinstance(found[1], NumericsError)
    half = SamplingParams(max_tokens=4, temperature=9.0, seed=1, n=8, logit_bias={DAMAGED: 60.0}, ignore_eos=True)
    assert isinstance(together(engine, [GOOD[0]], half)[0], NumericsError), "some answers meet the damaged token"


def test_what_a_damaged_prompt_shares_stays_right(engine: Engine) -> None:
    """Blocks that hold NaN are not published, and those of a shared beginning are clean, chunk by chunk."""
    opening = [(i * 7) % 70 for i in range(150)]
    healthy = {"token_ids": [*opening, 1, 2]}
    want = answer_of(Engine(dtype="float32", max_model_len=1024), healthy, GREEDY)
    for position in (3, 40, 100, 149):
        spoiled = [*opening[:position], DAMAGED, *opening[position + 1 :], 1, 2]
        found = together(engine, [{"token_ids": spoiled}, healthy], GREEDY)
        assert isinstance(found[0], NumericsError)
        assert isinstance(found[1], Completion) and found[1].token_ids == want
    cache = engine.core.runner.cache
    assert cache.prefixes is not None
    for block in cache.prefixes.blocks:
        filled = len(cache.prefixes._keys[block].tokens)
        assert all(tensor[block, :, :filled].isfinite().all() for layer in cache.layers for tensor in layer)


def test_as_completed_yields_it_for_its_tag(engine: Engine) -> None:
    requests = [(i, prompt, GREEDY) for i, prompt in enumerate([GOOD[0], BAD, GOOD[1], GOOD[2]])]
    found = dict(engine.as_completed(requests, window=3))
    assert isinstance(found.pop(1), NumericsError)
    assert sorted(found) == [0, 2, 3] and all(isinstance(one, Completion) for one in found.values())


def test_chat_and_score_raise_it(engine: Engine) -> None:
    with pytest.raises(NumericsError):
        engine.generate([BAD], GREEDY)
    word = engine.tokenizer.decode([DAMAGED])
    with pytest.raises(NumericsError):
        engine.chat([{"role": "user", "content": word}], GREEDY)
    with pytest.raises(NumericsError):
        list(engine.chat([{"role": "user", "content": word}], GREEDY, stream=True))
    for ids in (BAD["token_ids"], [5, 6, DAMAGED], [DAMAGED]):
        with pytest.raises(NumericsError, match="NaN of its 1152 logits"):
            engine.score({"token_ids": ids}, return_logits=True)
    assert engine.score(GOOD[0]).logprobs.isfinite().all()


def test_async_readers_get_their_own(engine: Engine) -> None:
    alone = [answer_of(engine, prompt, DRAWN) for prompt in GOOD]

    async def main() -> None:
        async with AsyncEngine(engine) as served:
            found = await served.generate_all([GOOD[0], BAD, GOOD[1], BAD, GOOD[2]], DRAWN)
            assert [isinstance(one, NumericsError) for one in found] == [False, True, False, True, False]
            assert [one.token_ids for one in found[::2]] == alone  # type: ignore[union-attr]
            with pytest.raises(NumericsError):
                async for _ in served.stream(BAD, DRAWN):
                    pass
            assert (await served.generate(GOOD[0], DRAWN)).token_ids == alone[0]

    asyncio.run(main())


def test_a_batch_goes_past_it(engine: Engine, tmp_path: Path) -> None:
    """It ended at the record, and again at each resume."""
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    ruled_out = {"logit_bias": {str(token): -1e39 for token in range(1152)}, "temperature": 1.0}
    records: list[dict[str, Any]] = [
        {"raw": GOOD[0]},
        {"raw": BAD, "params": {"temperature": 1.0}},
        {"raw": GOOD[1]},
        {"raw": GOOD[2], "params": ruled_out},
        {"raw": GOOD[2]},
    ]
    source.write_text("\n".join(map(json.dumps, records)))
    *_, last = run_batch(engine, source, target, GREEDY)
    lines = [json.loads(line) for line in target.read_text().splitlines()]
    assert (last.done, last.errors) == (5, 2)
    assert "logits in float32" in lines[1]["error"] and "error" in lines[3]
    assert all(lines[i]["text"] for i in (0, 2, 4))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_token_forbidden(engine: Engine, temperature: float) -> None:
    forbidden = SamplingParams(temperature=temperature, logit_bias=dict.fromkeys(range(1152), -math.inf))
    with pytest.raises(SamplingError, match="logit_bias forbids every token of 1152: leave one without -inf"):
        engine.generate([GOOD[0], GOOD[1]], [forbidden, GREEDY])
    seen = [token for token in range(1000) if token != DAMAGED]  # at least one has a positive logit
    beyond = SamplingParams(temperature=temperature, repetition_penalty=1.2e-38, logit_bias=dict.fromkeys(seen, 3.4e38))
    with pytest.raises(
        NumericsError, match=r"repetition_penalty 1\.2e-38 and logit_bias give a token an infinite score"
    ):
        engine.generate([{"token_ids": seen}], beyond)
    one_left = SamplingParams(temperature=temperature, max_tokens=3, ignore_eos=True, logit_bias={
        token: -math.inf for token in range(1152) if token != 40
    })  # fmt: skip
    assert answer_of(engine, GOOD[0], one_left) == (40, 40, 40)


def test_blocks_that_hold_nan_do_not_spoil_the_next_request() -> None:
    for kv_dtype in ("auto", "int8"):
        engine = Engine(dtype="float32", max_model_len=512, kv_dtype=kv_dtype)
        want = [answer_of(engine, prompt, GREEDY) for prompt in GOOD]
        fresh = Engine(dtype="float32", max_model_len=512, kv_dtype=kv_dtype)
        for layer in fresh.core.runner.cache.layers:
            for tensor in layer:
                tensor[:-1].view(torch.uint8).fill_(0xFF)  # NaN, as float32 and as the scale of int8
        assert [answer_of(fresh, prompt, GREEDY) for prompt in GOOD] == want
