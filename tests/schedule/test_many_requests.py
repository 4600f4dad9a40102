"""Many requests together are answered as each is alone, whatever is switched on."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import pytest

from benchmarks.serving.workload import (
    WorkloadRequest,
    all_together,
    greedy,
    image,
    one_at_a_time,
    prompt_of,
    random_requests,
)
from qvl_runtime import Engine
from tests.schedule.drive import checkpoint, engine_of

pytestmark = pytest.mark.cpu
SWITCHES = {
    "plain": {"prefix_caching": False},
    "chunked prefill": {"prefix_caching": False, "max_step_tokens": 70},
    "prefix hits": {},
    "preemption": {"prefix_caching": False, "kv_tokens": 0.3},
    "all": {"max_step_tokens": 70, "max_running": 12, "kv_tokens": 0.3},
    "int8": {"kv_dtype": "int8", "prefix_caching": False},
    "int8 and all": {"kv_dtype": "int8", "max_step_tokens": 70, "max_running": 12, "kv_tokens": 0.3},
    "overlap and all": {"overlap": True, "max_step_tokens": 70, "max_running": 12, "kv_tokens": 0.3},
    "drafts and all": {"speculative_tokens": 3, "max_step_tokens": 70, "max_running": 12, "kv_tokens": 0.3},
}
# The benchmark runs all 200, of up to 2,500 tokens: `python -m benchmarks.serving.many_requests equal`.
COUNT = {"tiny": 24, "tiny-int4": 14, "nano": 24}


@lru_cache(maxsize=8)
def alone(folder: Path, kv_dtype: str) -> tuple[list[WorkloadRequest], list[tuple[int, ...]]]:
    engine = engine_of(folder, prefix_caching=False, max_running=1, max_step_tokens=4096, kv_dtype=kv_dtype)
    wanted = random_requests(engine, COUNT[folder.name], 400)
    return wanted, one_at_a_time(engine, wanted)


@pytest.mark.parametrize("switches", SWITCHES)
@pytest.mark.parametrize("name", ["tiny", "tiny-int4", "nano"])
def test_together_is_as_alone(name: str, switches: str, one_golden: Path) -> None:
    folder, options = checkpoint(name, one_golden), SWITCHES[switches]
    wanted, want = alone(folder, str(options.get("kv_dtype", "auto")))  # type: ignore[attr-defined]
    engine = engine_of(folder, **options)
    got = all_together(engine, wanted, preempt="kv_tokens" in options)  # type: ignore[operator]
    for i, (answer, expected) in enumerate(zip(got, want, strict=True)):
        assert answer == expected or (answer is None and wanted[i].cancelled_after is not None), f"request {i}"
    said = engine.report()
    assert (said["requests"]["preemptions"] > 0) == ("kv_tokens" in options)  # type: ignore[operator]
    if said["caches"]["prefixes"] is not None:
        assert said["caches"]["prefixes"]["hit_tokens"] > 0
    assert sum(answer is not None for answer in got) > len(got) / 2


def test_one_batch_of_short_and_long_prompts(nano: Engine) -> None:
    prompts = [{"token_ids": [(i * step) % 241 for i in range(n)]} for n, step in ((500, 3), (500, 5), (4000, 7))]
    fresh = Engine(dtype="float32", prefix_caching=False, max_step_tokens=8192)
    together = nano.generate(prompts, greedy(8))
    assert [c.token_ids for c in together] == [fresh.generate([p], greedy(8))[0].token_ids for p in prompts]


def test_images_of_a_step_are_seen_together_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(dtype="float32")
    passes: list[int] = []
    encode = engine.core.runner.model.encode_images

    def counted(pixels: object) -> object:
        passes.append(len(pixels))
        return encode(pixels)

    monkeypatch.setattr(engine.core.runner.model, "encode_images", counted)
    prompts = [prompt_of(engine, [i], image(i % 2), [1]) for i in range(4)]
    engine.generate(prompts, greedy(1))
    assert passes == [2]


def test_a_step_that_fails_leaves_everything_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(dtype="float32")
    want = engine.generate([{"token_ids": [1, 2, 3]}], greedy(6))[0].token_ids
    request = engine.submit(engine.encode({"token_ids": [1, 2, 3]}), greedy(6))
    engine.core.step()
    several = engine.submit(engine.encode({"token_ids": [4, 5]}), greedy(3, n=3))
    for name in ("forward", "logits"):
        with monkeypatch.context() as patched:
            patched.setattr(engine.core.runner.model, name, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                engine.core.step()
        engine.core.runner.cache.check_integrity()
    while not (request.done and several.done):
        engine.core.step()
    assert request.completion().token_ids == want
    assert len({answer.token_ids for answer in several.completion().answers}) == 1
