"""Requests alone and together, compared bit by bit: `python -m benchmarks.serving.invariance`.

Each request is answered once on its own, its prompt in one step and nothing cached, and once together with
all others, in each of several settings. The command ends with code 1 where an answer differs.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from benchmarks.serving.workload import random_requests
from benchmarks.timing import setting
from qvl_runtime import Completion, Engine, SamplingParams
from qvl_runtime.engine.engine import NANO

LONGEST = 600  # tokens of a prompt
CHUNKED: dict[str, Any] = {"max_step_tokens": 96, "max_running": 12}
SMALL = 4 << 20  # bytes of a cache that holds a few of the requests


class Setting(NamedTuple):
    """What a request may depend on, and what it may not."""

    model: str  # nano or nano_int4
    numbers: dict[str, Any]  # dtype, precision, kv_dtype: the same alone and together
    switches: Mapping[str, Any] = MappingProxyType({})  # of the engine that answers all together
    preempt: bool = False  # at random steps some running requests lose their blocks, as if the cache were full


BFLOAT16 = {"dtype": "bfloat16"}
SETTINGS = {
    "bfloat16": Setting("nano", BFLOAT16),
    "bfloat16, no prefix cache": Setting("nano", BFLOAT16, {"prefix_caching": False}),
    "bfloat16, prompts in chunks": Setting("nano", BFLOAT16, CHUNKED),
    "bfloat16, preemption": Setting("nano", BFLOAT16, {"kv_cache_bytes": SMALL}, preempt=True),
    "bfloat16, drafts": Setting("nano", BFLOAT16, {"speculative_tokens": 3, **CHUNKED}),
    "bfloat16, overlap": Setting("nano", BFLOAT16, {"overlap": True, **CHUNKED}, preempt=True),
    "bfloat16, no graphs": Setting("nano", BFLOAT16, {"graphs": False}),
    "bfloat16, int8 cache": Setting("nano", {**BFLOAT16, "kv_dtype": "int8"}, {"speculative_tokens": 3, **CHUNKED}),
    "bfloat16, fast": Setting("nano", {**BFLOAT16, "precision": "fast"}, CHUNKED),
    "float16": Setting("nano", {"dtype": "float16"}, {"speculative_tokens": 3, **CHUNKED}),
    "float32": Setting("nano", {"dtype": "float32"}, {"speculative_tokens": 3, **CHUNKED}),
    "float32, int8 cache": Setting("nano", {"dtype": "float32", "kv_dtype": "int8"}, {}, preempt=True),
    "Int4, bfloat16": Setting("nano_int4", BFLOAT16, {"speculative_tokens": 3, **CHUNKED}),
    "Int4, float16": Setting("nano_int4", {"dtype": "float16"}, CHUNKED),
    "Int4, float32": Setting("nano_int4", {"dtype": "float32"}, CHUNKED),
    "Int4, bfloat16, fast": Setting("nano_int4", {**BFLOAT16, "precision": "fast"}, CHUNKED),
    "Int4, bfloat16, fast, int8 cache": Setting(
        "nano_int4", {**BFLOAT16, "precision": "fast", "kv_dtype": "int8"}, CHUNKED, preempt=True
    ),
}
FOLDERS = {"nano": NANO, "nano_int4": NANO.with_name("nano_int4")}


def mixed(engine: Engine, count: int, seed: int = 0) -> tuple[list[Any], list[SamplingParams]]:
    """Prompts of text and images, some beginnings shared, and sampling parameters of every kind."""
    rng = random.Random(seed)
    requests, params = random_requests(engine, count, LONGEST, seed), []
    for i, request in enumerate(requests):
        common: dict[str, Any] = {
            "max_tokens": request.max_tokens,
            "ignore_eos": True,
            "logprobs": rng.choice((0, 0, 2, 5)),
            "n": rng.choice((1, 1, 1, 2, 3)),
        }
        kinds: list[dict[str, Any]] = [
            {"temperature": 0},
            {"temperature": 0},
            {"temperature": 0, "repetition_penalty": 1.1},
            {"temperature": 0.8, "top_p": 0.9, "seed": i},
            {"temperature": 1.5, "top_k": 40, "seed": i},
            {"temperature": 1.0, "min_p": 0.05, "seed": i, "frequency_penalty": 0.5},
        ]
        params.append(SamplingParams(**common, **rng.choice(kinds)))
    return [request.prompt for request in requests], params


def answered(completion: Completion) -> list[Any]:
    """What must be equal: tokens and log probabilities of all answers, with their alternatives."""
    return [(answer.token_ids, answer.logprobs) for answer in completion.answers]


def engine_of(chosen: Setting, **switches: Any) -> Engine:
    """An engine of a setting."""
    return Engine(FOLDERS[chosen.model], max_model_len=1024, **chosen.numbers, **switches)


def alone(chosen: Setting, count: int) -> list[list[Any]]:
    """The answers to requests that run alone."""
    engine = engine_of(chosen, prefix_caching=False, max_step_tokens=1024, max_running=4)
    prompts, params = mixed(engine, count)
    return [answered(engine.generate([p], one)[0]) for p, one in zip(prompts, params, strict=True)]


class Together(NamedTuple):
    """What became of requests that ran together."""

    differ: list[int]  # those with other answers than alone
    preemptions: int


def together(chosen: Setting, expected: Sequence[list[Any]]) -> Together:
    """Answer all requests at once, and compare. Raises `AssertionError` if the cache is damaged."""
    engine = engine_of(chosen, **chosen.switches)
    prompts, params = mixed(engine, len(expected))
    rng, core = random.Random(len(expected)), engine.core
    requests = [engine.submit(engine.encode(prompt), one) for prompt, one in zip(prompts, params, strict=True)]
    while not all(request.done for request in requests):
        if chosen.preempt and rng.random() < 0.2:
            core.scheduler.make_room(core.runner.cache.pool.available + rng.randrange(1, 40))
        core.step()
    core.runner.cache.check_integrity()
    differ = [i for i, request in enumerate(requests) if answered(request.completion()) != expected[i]]
    return Together(differ, core.scheduler.preemptions)


def main() -> int:
    """Run the settings, print a JSON line of each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=500, help="how many (default: 500)")
    parser.add_argument("--setting", action="append", choices=SETTINGS, help="one of them; repeat (default: all)")
    args = parser.parse_args()
    print(json.dumps(setting()), flush=True)
    references: dict[str, list[list[Any]]] = {}
    worst = 0
    for name in args.setting or SETTINGS:
        chosen, began = SETTINGS[name], time.perf_counter()
        key = json.dumps([chosen.model, chosen.numbers])
        if key not in references:
            references[key] = alone(chosen, args.requests)
        differ, preemptions = together(chosen, references[key])
        line = {"setting": name, "requests": args.requests, "differ": len(differ), "first": differ[:5]}
        seconds = round(time.perf_counter() - began, 1)
        print(json.dumps({**line, "preemptions": preemptions, "s": seconds}), flush=True)
        worst = max(worst, len(differ))
    return int(worst > 0)


if __name__ == "__main__":
    sys.exit(main())
