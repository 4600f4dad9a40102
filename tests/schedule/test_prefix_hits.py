"""What is found in the KV cache, and the traps on the way there: images, paths, alpha, salts."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from benchmarks.serving.workload import greedy, image, prompt_of
from qvl_runtime import Engine
from tests.schedule.drive import checkpoint, engine_of

pytestmark = pytest.mark.cpu


def cached(engine: Engine, prompt: object, **params: object) -> int:
    """Tokens of a prompt that are found in the cache, once it has been answered."""
    return engine.generate([prompt], greedy(3, **params))[0].usage.cached_tokens  # type: ignore[list-item]


SPAN = 66  # of nano: <img>, 64 pads, </img>


def test_two_images_with_the_same_text(nano: Engine) -> None:
    first, second = (prompt_of(nano, range(20), image(seed), range(9)) for seed in (101, 102))
    assert cached(nano, first) == 0
    assert cached(nano, second) == 21, "the text and <img> before it, and nothing of the other image"
    together = nano.generate([first, second], greedy(6))
    fresh = Engine(dtype="float32", prefix_caching=False)
    assert [c.token_ids for c in together] == [fresh.generate([p], greedy(6))[0].token_ids for p in (first, second)]


def test_images_equal_in_their_first_half(nano: Engine) -> None:
    whole, changed = image(111, 144), image(111, 144)
    changed.paste((0, 0, 0), (0, 72, 144, 144))
    assert cached(nano, prompt_of(nano, range(30, 50), whole, range(9))) == 0
    assert cached(nano, prompt_of(nano, range(30, 50), changed, range(9))) == 21


def test_the_same_path_with_another_image_and_another_path_with_the_same(nano: Engine, tmp_path: Path) -> None:
    one, two = tmp_path / "one.png", tmp_path / "two.png"
    image(121).save(one)
    image(121).save(two)
    nano.generate([[{"image": one}, {"text": "What is this?"}]], greedy(3))
    assert nano.generate([[{"image": two}, {"text": "What is that?"}]], greedy(3))[0].usage.cached_tokens >= SPAN
    image(122).save(one)
    assert nano.generate([[{"image": one}, {"text": "What is this?"}]], greedy(3))[0].usage.cached_tokens < SPAN


def test_a_second_turn_with_a_second_image_still_hits_the_first(nano: Engine) -> None:
    def message(image: Image.Image, text: str) -> dict[str, object]:
        return {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}

    opening = [message(image(131), "What is this?")]
    first = nano.chat(opening, greedy(8))
    again = [*opening, {"role": "assistant", "content": "A dog."}, message(image(132), "And this?")]
    assert nano.chat(again, greedy(8)).usage.cached_tokens >= first.usage.prompt_tokens


@pytest.mark.parametrize(
    ("length", "alpha"), [(1, 1), (1024, 1), (1025, 1), (2048, 1), (2049, 3), (4096, 3), (4097, 7)]
)
def test_alpha_is_that_of_the_whole_prompt(nano: Engine, length: int, alpha: int) -> None:
    """Under chunked prefill, with a prefix hit, while decoding, and after a preemption."""
    tokens = [length % 256, length // 256, *(i % 251 for i in range(length - 2))][:length]
    for hit in (False, True):
        request = nano.submit(nano.encode({"token_ids": tokens}), greedy(4))
        branch = request.branches[0]
        seen = set()
        while not request.done:
            if len(branch.output.token_ids) == 2 and branch in nano.core.scheduler.running:
                nano.core.scheduler.make_room(nano.core.runner.cache.pool.num_blocks)
            nano.core.step()
            seen.add(branch.sequence.alpha)
        assert seen == {float(alpha)}
        assert (request.cached_tokens == length - 1) == hit or length == 1
    nano.core.runner.cache.check_integrity()


def test_prompts_of_different_alpha_share_no_block(nano: Engine) -> None:
    tokens = [(i * 7) % 253 for i in range(2060)]
    assert cached(nano, {"token_ids": tokens[:2040]}, cache_salt="here") == 0
    assert cached(nano, {"token_ids": tokens}, cache_salt="here") == 0
    assert cached(nano, {"token_ids": [*tokens, 1]}, cache_salt="here") == 2060


def test_another_salt_never_hits(nano: Engine) -> None:
    prompt = prompt_of(nano, range(60, 80), image(141), range(30))
    assert cached(nano, prompt, cache_salt="one") == 0
    assert cached(nano, prompt, cache_salt="two") == 0
    assert cached(nano, prompt, cache_salt="one") > SPAN


def test_the_second_question_about_an_image_costs_its_own_tokens(nano: Engine) -> None:
    look = image(151)
    nano.generate([prompt_of(nano, range(80, 90), look, range(5))], greedy(2))
    second = nano.generate([prompt_of(nano, range(80, 90), look, range(50, 58))], greedy(2))[0]
    assert second.timings.vision_s == 0
    assert second.timings.prompt_tokens == 8 and second.usage.cached_tokens == 10 + SPAN


def test_questions_about_one_image_that_come_together_compute_it_once() -> None:
    engine = Engine(dtype="float32", max_step_tokens=64)
    prompts = [prompt_of(engine, range(10), image(161), [i] * 20) for i in range(4)]
    prompts.append(prompt_of(engine, range(9), image(161), [5] * 20))  # not the same beginning
    first, *others, last = engine.generate(prompts, greedy(4))
    assert [c.usage.cached_tokens for c in (first, *others)] == [0] + 3 * [10 + SPAN]
    assert last.usage.cached_tokens < 10
    fresh = Engine(dtype="float32", prefix_caching=False)
    assert [c.token_ids for c in (first, *others, last)] == [
        fresh.generate([p], greedy(4))[0].token_ids for p in prompts
    ]


def test_a_request_that_fills_the_cache_alone_can_still_use_it() -> None:
    """Found blocks that it must copy would be one too many: then it does without."""
    engine = engine_of(checkpoint("nano", Path()), 1024, kv_tokens=0.125)
    prompt = {"token_ids": list(range(120))}
    first = engine.generate([prompt], greedy(8))[0]
    again = engine.generate([prompt], greedy(8))[0]
    assert again.token_ids == first.token_ids and len(again.token_ids) == 8
    engine.core.runner.cache.check_integrity()
