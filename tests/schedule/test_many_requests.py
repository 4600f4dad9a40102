"""Many requests together are answered as each is alone, whatever is switched on; and the traps on the way there."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import pytest
from PIL import Image

from qvl_runtime import Engine, SamplingParams
from qvl_runtime.errors import CapacityError, ConfigError
from qvl_runtime.schedule.task import Request
from tests.schedule.drive import (
    Wanted,
    all_together,
    checkpoint,
    greedy,
    one_at_a_time,
    picture,
    prompt_of,
    random_requests,
)

pytestmark = pytest.mark.cpu

SWITCHES = {
    "plain": {"prefix_caching": False},
    "chunked prefill": {"prefix_caching": False, "max_step_tokens": 70},
    "prefix hits": {},
    "preemption": {"prefix_caching": False, "kv_tokens": 0.3},
    "all": {"max_step_tokens": 70, "max_running": 12, "kv_tokens": 0.3},
    "int8": {"kv_dtype": "int8", "prefix_caching": False},
    "int8 and all": {"kv_dtype": "int8", "max_step_tokens": 70, "max_running": 12, "kv_tokens": 0.3},
    "drafts and all": {"speculative_tokens": 3, "max_step_tokens": 70, "max_running": 12, "kv_tokens": 0.3},
}
COUNT = {"tiny": 24, "tiny-int4": 14, "nano": 24}  # all 200 of up to 2,500 tokens: benchmarks/many_requests.py equal


def engine_of(folder: Path, context: int = 4096, **options: object) -> Engine:
    """In float32; `kv_tokens` is the cache's size as a share of a context."""
    share = options.pop("kv_tokens", None)
    if share is not None:
        per_token = Engine(folder, dtype="float32", max_model_len=64, **options).report()["memory"]["kv_per_token"]
        options["kv_cache_bytes"] = int(share * context) * per_token
    return Engine(folder, dtype="float32", max_model_len=context, **options)


@lru_cache(maxsize=8)
def alone(folder: Path, kv_dtype: str) -> tuple[list[Wanted], list[tuple[int, ...]]]:
    engine = engine_of(folder, prefix_caching=False, max_running=1, max_step_tokens=4096, kv_dtype=kv_dtype)
    wanted = random_requests(engine, COUNT[folder.name], 400)
    return wanted, one_at_a_time(engine, wanted)


@pytest.mark.parametrize("switches", SWITCHES)
@pytest.mark.parametrize("name", ["tiny", "tiny-int4", "nano"])
def test_together_is_as_alone(name: str, switches: str, golden: Path) -> None:
    folder, options = checkpoint(name, golden), SWITCHES[switches]
    wanted, want = alone(folder, str(options.get("kv_dtype", "auto")))
    engine = engine_of(folder, **options)
    got = all_together(engine, wanted, preempt="kv_tokens" in options)
    for i, (answer, expected) in enumerate(zip(got, want, strict=True)):
        assert answer == expected or (answer is None and wanted[i].cancelled_after is not None), f"request {i}"
    said = engine.report()
    assert (said["requests"]["preemptions"] > 0) == ("kv_tokens" in options)
    if said["caches"]["prefixes"] is not None:
        assert said["caches"]["prefixes"]["hit_tokens"] > 0
    assert sum(answer is not None for answer in got) > len(got) / 2


@pytest.fixture(scope="module")
def nano() -> Engine:
    return Engine(dtype="float32", max_model_len=8192, max_step_tokens=512)


def submitted(engine: Engine, prompt: object, **params: object) -> Request:
    """A request that has been through one step."""
    request = engine.submit(engine.encode(prompt), greedy(1, **params))  # type: ignore[arg-type]
    engine.loop.step()
    return request


def cached(engine: Engine, prompt: object, **params: object) -> int:
    """Tokens of a prompt that are found in the cache, once it has been answered."""
    return engine.generate([prompt], greedy(3, **params))[0].usage.cached_tokens  # type: ignore[list-item]


SPAN = 66  # of nano: <img>, 64 pads, </img>


def test_two_pictures_with_the_same_text(nano: Engine) -> None:
    first, second = (prompt_of(nano, range(20), picture(seed), range(9)) for seed in (101, 102))
    assert cached(nano, first) == 0
    assert cached(nano, second) == 21, "the text and <img> before it, and nothing of the other picture"
    together = nano.generate([first, second], greedy(6))
    fresh = Engine(dtype="float32", prefix_caching=False)
    assert [c.token_ids for c in together] == [fresh.generate([p], greedy(6))[0].token_ids for p in (first, second)]


def test_pictures_equal_in_their_first_half(nano: Engine) -> None:
    whole, changed = picture(111, 144), picture(111, 144)
    changed.paste((0, 0, 0), (0, 72, 144, 144))
    assert cached(nano, prompt_of(nano, range(30, 50), whole, range(9))) == 0
    assert cached(nano, prompt_of(nano, range(30, 50), changed, range(9))) == 21


def test_the_same_path_with_another_picture_and_another_path_with_the_same(nano: Engine, tmp_path: Path) -> None:
    one, two = tmp_path / "one.png", tmp_path / "two.png"
    picture(121).save(one)
    picture(121).save(two)
    nano.generate([[{"image": one}, {"text": "What is this?"}]], greedy(3))
    assert nano.generate([[{"image": two}, {"text": "What is that?"}]], greedy(3))[0].usage.cached_tokens >= SPAN
    picture(122).save(one)
    assert nano.generate([[{"image": one}, {"text": "What is this?"}]], greedy(3))[0].usage.cached_tokens < SPAN


def test_a_second_turn_with_a_second_picture_still_hits_the_first(nano: Engine) -> None:
    def message(image: Image.Image, text: str) -> dict[str, object]:
        return {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}

    opening = [message(picture(131), "What is this?")]
    first = nano.chat(opening, greedy(8))
    again = [*opening, {"role": "assistant", "content": "A dog."}, message(picture(132), "And this?")]
    assert nano.chat(again, greedy(8)).usage.cached_tokens >= first.usage.prompt_tokens


@pytest.mark.parametrize(
    ("length", "alpha"), [(1, 1), (1024, 1), (1025, 1), (2048, 1), (2049, 3), (4096, 3), (4097, 7)]
)
def test_alpha_is_that_of_the_whole_prompt(nano: Engine, length: int, alpha: int) -> None:
    """Under chunked prefill, with a prefix hit, while decoding, and after a preemption."""
    tokens = [length % 256, length // 256, *(i % 251 for i in range(length - 2))][:length]
    for hit in (False, True):
        request = nano.submit(nano.encode({"token_ids": tokens}), greedy(4))
        task = request.tasks[0]
        seen = set()
        while not request.done:
            if len(task.answer.token_ids) == 2 and task in nano.loop.scheduler.running:
                nano.loop.scheduler.make_room(nano.loop.runner.cache.pool.num_blocks)
            nano.loop.step()
            seen.add(task.sequence.alpha)
        assert seen == {float(alpha)}
        assert (request.cached_tokens == length - 1) == hit or length == 1
    nano.loop.runner.cache.check_integrity()


def test_prompts_of_different_alpha_share_no_block(nano: Engine) -> None:
    tokens = [(i * 7) % 253 for i in range(2060)]
    assert cached(nano, {"token_ids": tokens[:2040]}, cache_salt="here") == 0
    assert cached(nano, {"token_ids": tokens}, cache_salt="here") == 0
    assert cached(nano, {"token_ids": [*tokens, 1]}, cache_salt="here") == 2060


def test_one_batch_of_short_and_long_prompts(nano: Engine) -> None:
    prompts = [{"token_ids": [(i * step) % 241 for i in range(n)]} for n, step in ((500, 3), (500, 5), (4000, 7))]
    fresh = Engine(dtype="float32", prefix_caching=False, max_step_tokens=8192)
    together = nano.generate(prompts, greedy(8))
    assert [c.token_ids for c in together] == [fresh.generate([p], greedy(8))[0].token_ids for p in prompts]


def test_another_salt_never_hits(nano: Engine) -> None:
    prompt = prompt_of(nano, range(60, 80), picture(141), range(30))
    assert cached(nano, prompt, cache_salt="one") == 0
    assert cached(nano, prompt, cache_salt="two") == 0
    assert cached(nano, prompt, cache_salt="one") > SPAN


def test_the_second_question_about_a_picture_costs_its_own_tokens(nano: Engine) -> None:
    look = picture(151)
    nano.generate([prompt_of(nano, range(80, 90), look, range(5))], greedy(2))
    second = nano.generate([prompt_of(nano, range(80, 90), look, range(50, 58))], greedy(2))[0]
    assert second.timings.vision_s == 0
    assert second.timings.prompt_tokens == 8 and second.usage.cached_tokens == 10 + SPAN


def test_questions_about_one_picture_that_come_together_compute_it_once() -> None:
    engine = Engine(dtype="float32", max_step_tokens=64)
    prompts = [prompt_of(engine, range(10), picture(161), [i] * 20) for i in range(4)]
    prompts.append(prompt_of(engine, range(9), picture(161), [5] * 20))  # not the same beginning
    first, *others, last = engine.generate(prompts, greedy(4))
    assert [c.usage.cached_tokens for c in (first, *others)] == [0] + 3 * [10 + SPAN]
    assert last.usage.cached_tokens < 10
    fresh = Engine(dtype="float32", prefix_caching=False)
    assert [c.token_ids for c in (first, *others, last)] == [
        fresh.generate([p], greedy(4))[0].token_ids for p in prompts
    ]


def test_pictures_of_a_step_are_seen_together_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(dtype="float32")
    passes: list[int] = []
    encode = engine.loop.runner.model.encode_pictures

    def counted(pixels: object) -> object:
        passes.append(len(pixels))  # type: ignore[arg-type]
        return encode(pixels)  # type: ignore[arg-type]

    monkeypatch.setattr(engine.loop.runner.model, "encode_pictures", counted)
    prompts = [prompt_of(engine, [i], picture(i % 2), [1]) for i in range(4)]
    engine.generate(prompts, greedy(1))
    assert passes == [2]


def test_a_long_prompt_does_not_stall_those_that_decode(nano: Engine) -> None:
    """While 2,000 tokens are prefilled in chunks of 512, a running answer gets a token in every step."""
    running = submitted(nano, {"token_ids": [5, 4, 3]}, min_p=0.0)
    running = nano.submit(nano.encode({"token_ids": [9, 8, 7]}), greedy(12))
    nano.loop.step()
    long = nano.submit(nano.encode({"token_ids": [(i * 11) % 239 for i in range(2000)]}), greedy(1))
    for made in range(2, 6):
        nano.loop.step()
        assert len(running.tasks[0].answer.token_ids) == made
    assert long.done
    nano.loop.cancel(running)


def test_who_came_first_is_served_first_and_the_latest_gives_way() -> None:
    engine = engine_of(checkpoint("nano", Path()), 1024, kv_tokens=0.15, prefix_caching=False)
    requests = [engine.submit(engine.encode({"token_ids": [i] * 40}), greedy(60)) for i in range(6)]
    done: list[int] = []
    while len(done) < len(requests):
        assert engine.loop.step()
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
    pool = nano.loop.runner.cache.pool
    requests = [nano.submit(nano.encode({"token_ids": [i, 2, 3] * 300}), greedy(50)) for i in range(4)]
    for steps in range(4):
        nano.loop.cancel(requests[steps])
        nano.loop.runner.cache.check_integrity()
        if steps < 3:
            assert nano.loop.step()
    assert pool.available == pool.num_blocks
    assert not nano.loop.step()


def test_a_deadline_ends_an_answer_with_what_it_has(nano: Engine) -> None:
    out = nano.generate([{"token_ids": [1, 2, 3]}], greedy(5000, timeout_s=0.2, n=2))[0]
    assert out.finish_reason == "deadline" and 0 < len(out.token_ids) < 5000
    assert out.text == nano.tokenizer.decode(out.token_ids)
    late = nano.generate([{"token_ids": [1, 2, 3]}], greedy(5, timeout_s=1e-9, n=3))[0]
    assert [c.token_ids for c in late.answers] == [()] * 3
    pool = nano.loop.runner.cache.pool
    assert pool.available == pool.num_blocks


def test_answers_of_one_prompt_share_its_blocks() -> None:
    engine = Engine(dtype="float32", prefix_caching=False)
    params = SamplingParams(max_tokens=20, temperature=2.0, seed=5, n=4, ignore_eos=True)
    request = engine.submit(engine.encode({"token_ids": list(range(100))}), params)
    pool = engine.loop.runner.cache.pool
    engine.loop.step()
    assert pool.num_blocks - pool.available == 7
    engine.loop.step()
    assert pool.num_blocks - pool.available == 10, "six in common, and each its own copy of the last"
    engine.loop.runner.cache.check_integrity()
    while not request.done:
        engine.loop.step()
    for i, answer in enumerate(request.completion().answers):
        single = SamplingParams(max_tokens=20, temperature=2.0, seed=5 + i, ignore_eos=True)
        assert engine.generate([{"token_ids": list(range(100))}], single)[0].token_ids == answer.token_ids


def test_sampled_answers_do_not_depend_on_neighbours_drafts_or_preemption() -> None:
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
    assert engine.loop.steps < plain.loop.steps
    engine.loop.runner.cache.check_integrity()


def test_a_step_that_fails_leaves_everything_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(dtype="float32")
    want = engine.generate([{"token_ids": [1, 2, 3]}], greedy(6))[0].token_ids
    request = engine.submit(engine.encode({"token_ids": [1, 2, 3]}), greedy(6))
    engine.loop.step()
    several = engine.submit(engine.encode({"token_ids": [4, 5]}), greedy(3, n=3))
    for name in ("forward", "logits"):
        with monkeypatch.context() as patched:
            patched.setattr(engine.loop.runner.model, name, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                engine.loop.step()
        engine.loop.runner.cache.check_integrity()
    while not (request.done and several.done):
        engine.loop.step()
    assert request.completion().token_ids == want
    assert len({answer.token_ids for answer in several.completion().answers}) == 1


def test_a_request_that_fills_the_cache_alone_can_still_use_it() -> None:
    """Found blocks that it must copy would be one too many: then it does without."""
    engine = engine_of(checkpoint("nano", Path()), 1024, kv_tokens=0.125)
    prompt = {"token_ids": list(range(120))}
    first = engine.generate([prompt], greedy(8))[0]
    again = engine.generate([prompt], greedy(8))[0]
    assert again.token_ids == first.token_ids and len(again.token_ids) == 8
    engine.loop.runner.cache.check_integrity()
