"""Measure many requests together: `python -m benchmarks.serving.many_requests COMMAND`, --help lists them.

Every figure is printed with what it ran on. Without --model the shipped nano checkpoint runs; `equal` and `soak` end
with code 1 where they do not hold.
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import random
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.serving.workload import all_together, greedy, image, one_at_a_time, prompt_of, random_requests
from benchmarks.timing import others, say, setting
from qvl_runtime import Engine, SamplingParams
from qvl_runtime.engine.engine import NANO
from qvl_runtime.host import resident_memory

SWITCHES: dict[str, dict[str, Any]] = {
    "plain": {"prefix_caching": False},
    "chunked prefill": {"prefix_caching": False, "max_step_tokens": 96},
    "prefix hits": {},
    "preemption": {"prefix_caching": False},
    "all": {"max_step_tokens": 96, "max_running": 12},
    "int8": {"kv_dtype": "int8", "prefix_caching": False},
    "int8 and all": {"kv_dtype": "int8", "max_step_tokens": 96, "max_running": 12},
    "drafts and all": {"speculative_tokens": 3, "max_step_tokens": 96, "max_running": 12},
}


def equal(args: argparse.Namespace) -> int:
    """Greedy tokens of random mixed requests, together against one at a time; skips cases already in --results."""
    model, references = args.model.name, dict[str, list[tuple[int, ...]]]()
    lines = args.results.read_text().splitlines() if args.results and args.results.exists() else []
    done = {(line["equal"], line["switches"]): line["differ"] for line in map(json.loads, lines) if "switches" in line}
    note(args, **setting())
    for name, options in SWITCHES.items():
        if (model, name) in done:
            continue
        engine = Engine(args.model, dtype=args.dtype, max_model_len=4096, **options)
        workload = random_requests(engine, args.requests, 2500)
        kind = str(options.get("kv_dtype", "auto"))
        if kind not in references:
            alone = Engine(
                args.model,
                dtype=args.dtype,
                max_model_len=4096,
                kv_dtype=kind,
                prefix_caching=False,
                max_step_tokens=4096,
            )
            references[kind] = one_at_a_time(alone, workload)
        got = all_together(engine, workload, preempt="all" in name or name == "preemption")
        differ = [i for i, (a, b) in enumerate(zip(got, references[kind], strict=True)) if a is not None and a != b]
        report = engine.report()
        hits = report["caches"]["prefixes"]
        done[model, name] = differ
        note(
            args,
            equal=model,
            switches=name,
            dtype=args.dtype,
            requests=args.requests,
            answered=sum(a is not None for a in got),
            differ=differ,
            steps=engine.core.steps,
            preemptions=report["requests"]["preemptions"],
            hit_tokens=0 if hits is None else hits["hit_tokens"],
            drafts=report["drafts"],
        )
    return int(any(done.values()))


def soak(args: argparse.Namespace) -> int:
    """Requests with images, many of them new: resident memory after the first tenth must not grow."""
    engine = Engine(args.model, kv_cache_bytes=16 * 2**20, image_cache_bytes=4 * 2**20)
    rng, marks = random.Random(0), list[float]()

    def requests() -> Any:
        for i in range(args.requests):
            prompt = prompt_of(engine, range(10), image(rng.randrange(args.requests // 2)), [rng.randrange(256)] * 9)
            yield i, prompt, SamplingParams(max_tokens=rng.randrange(1, 24), temperature=rng.choice((0.0, 1.0)))

    for done, _ in enumerate(engine.as_completed(requests()), start=1):
        if done % (args.requests // 10) == 0:
            gc.collect()
            marks.append(resident_memory() / 2**20)
            images = engine.core.runner.images
            note(
                args,
                requests=done,
                resident_mib=marks[-1],
                objects=len(gc.get_objects()),
                images=len(images),
                image_bytes=images.bytes,
            )
    cache = engine.core.runner.cache
    cache.check_integrity()
    leaked = cache.pool.num_blocks - cache.pool.available
    growth = max(marks[1:]) - marks[0]
    note(args, growth_after_the_first_tenth_mib=growth, blocks_leaked=leaked)
    return int(leaked > 0 or growth > 0.02 * marks[0])


def of_size(args: argparse.Namespace, **options: Any) -> Engine:
    """The engine of --model, or of a synthetic model of a published size."""
    if args.synthetic is None:
        return Engine(args.model, max_model_len=2048, **options)
    return Engine(synthetic=args.synthetic, precision=args.precision, device="cpu", max_model_len=2048, **options)


def photo(seed: int) -> bytes:
    """A JPEG of 1024 x 768 pixels, another one for each seed."""
    file = io.BytesIO()
    image(seed, 32).resize((1024, 768)).save(file, "JPEG")
    return file.getvalue()


def second(args: argparse.Namespace) -> int:
    """Time to first token of two questions about an image, each of the length that Qwen's vocabulary makes of

    "What is in the image?" in a chat: 23 tokens before the image and 12 after it, of which the first is the same.
    """
    engine, ratios = of_size(args), []
    for i in range(args.repeats + 1):
        file, times = photo(1000 + i), []
        for question in ("first", "second"):
            ids = [9, *(ord(question[0]) + k for k in range(11))]
            answer = engine.generate([prompt_of(engine, range(23), image(0), ids) | {"images": [file]}], greedy(2))[0]
            spent = answer.timings
            times.append(spent.ttft_s)
            note(
                args,
                question=question,
                model=engine.folder.name,
                precision=args.precision,
                ttft_s=spent.ttft_s,
                tokens=answer.usage.prompt_tokens,
                found=answer.usage.cached_tokens,
                image_s=spent.image_s,
                queue_s=spent.queue_s,
                vision_s=spent.vision_s,
                prefill_s=spent.prefill_s,
            )
        ratios.append(times[0] / times[1])
    note(args, second_question_sooner=median(ratios[1:]), repeats=args.repeats)
    return 0


def throughput(args: argparse.Namespace) -> int:
    """Tokens per second of one request and of several decoding together, in turns."""
    engine, spent = of_size(args), {many: list[float]() for many in (1, 2, 4, 8)}
    for _ in range(args.repeats):
        for many, seconds in spent.items():
            prompts = [engine.encode({"token_ids": [i, 1, 2, 3]}) for i in range(many)]
            requests = [engine.submit(prompt, greedy(args.steps + 2)) for prompt in prompts]
            engine.core.step()
            engine.core.step()
            began = time.perf_counter()
            while not all(request.done for request in requests):
                engine.core.step()
            seconds.append((time.perf_counter() - began) / args.steps)
    one = median(spent[1])
    for many, seconds in spent.items():
        step = median(seconds)
        note(
            args,
            together=many,
            model=engine.folder.name,
            precision=args.precision,
            tok_s=many / step,
            step_ms=1000 * step,
            over_one=many * one / step,
            repeats=args.repeats,
        )
    return 0


def drafts(args: argparse.Namespace) -> int:
    """Prompt lookup on and off in turns, on a caption of noise and on a prompt whose text repeats."""
    engine = of_size(args, speculative_tokens=args.drafts)
    drafter = engine.core.drafter
    prompts: dict[str, Any] = {
        "caption": [{"image": image(5, 144)}, {"text": "Generate the caption in English with grounding:"}],
        "repeated text": {"token_ids": [*range(60)] * 3},
    }
    for name, prompt in prompts.items():
        spent: dict[bool, list[float]] = {False: [], True: []}
        tokens: dict[bool, tuple[int, ...]] = {}
        proposed, accepted = (drafter.proposed, drafter.accepted) if drafter else (0, 0)
        for _ in range(args.repeats + 1):
            for on in spent:
                engine.core.drafter = engine.core.scheduler._drafter = drafter if on else None
                answer = engine.generate([prompt], greedy(args.steps))[0]
                spent[on].append(answer.timings.decode_s / answer.timings.decoded_tokens)
                tokens[on] = answer.token_ids
        plain, drafted = (median(spent[on][1:]) for on in (False, True))
        if drafter:
            proposed, accepted = drafter.proposed - proposed, drafter.accepted - accepted
        note(
            args,
            drafts=name,
            model=engine.folder.name,
            precision=args.precision,
            length=args.drafts,
            tok_s=1 / plain,
            tok_s_with_drafts=1 / drafted,
            gain=plain / drafted,
            proposed=proposed,
            accepted=accepted,
            same_tokens=tokens[False] == tokens[True],
            repeats=args.repeats,
        )
    return 0


def note(args: argparse.Namespace, **figures: Any) -> None:
    """One JSON line, printed and appended to the results file, if there is one."""
    say(**figures)
    if args.results:
        with args.results.open("a") as lines, redirect_stdout(lines):
            say(**figures)


def main() -> int:
    """Run one command; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = {f.__name__: f for f in (equal, soak, second, throughput, drafts)}
    parser.add_argument("command", choices=commands)
    parser.add_argument("--model", type=Path, default=NANO)
    parser.add_argument("--synthetic", help="for second, throughput and drafts: qwen-vl-chat-int4, random weights")
    parser.add_argument("--precision", default="exact", choices=["exact", "fast"], help="of the synthetic model")
    parser.add_argument("--dtype", default="float32", help="for equal")
    parser.add_argument("--results", type=Path, help="a file to append the lines to")
    parser.add_argument("--requests", type=int, default=None, help="default: 200, for soak 2,000")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--drafts", type=int, default=4)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    args.requests = args.requests or (2000 if args.command == "soak" else 200)
    torch.set_num_threads(args.threads)
    if args.command != "equal":
        note(args, **setting())
    load = others()
    code = commands[args.command](args)
    note(args, load=load(), exit_code=code)
    return code


if __name__ == "__main__":
    sys.exit(main())
