"""What many requests cost and gain: `python -m benchmarks.many_requests COMMAND`, --help lists them.

Every figure is printed with what it ran on. Without --model the shipped nano checkpoint runs; `equal` and `soak` end
with code 1 where they do not hold.
"""

from __future__ import annotations

import argparse
import gc
import platform
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from qvl_runtime import Engine, SamplingParams
from qvl_runtime.engine import NANO
from tests.schedule.drive import all_together, greedy, one_at_a_time, picture, prompt_of, random_requests

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
    """Greedy tokens of random mixed requests, together against one at a time."""
    wrong = 0
    references: dict[str, list[tuple[int, ...]]] = {}
    for name, options in SWITCHES.items():
        engine = Engine(args.model, dtype="float32", max_model_len=4096, **options)
        wanted = random_requests(engine, args.requests, 2500)
        kind = str(options.get("kv_dtype", "auto"))
        if kind not in references:
            alone = Engine(
                args.model,
                dtype="float32",
                max_model_len=4096,
                kv_dtype=kind,
                prefix_caching=False,
                max_step_tokens=4096,
            )
            references[kind] = one_at_a_time(alone, wanted)
        got = all_together(engine, wanted, preempt="all" in name or name == "preemption")
        differ = [i for i, (a, b) in enumerate(zip(got, references[kind], strict=True)) if a is not None and a != b]
        said = engine.report()
        hits, preemptions = said["caches"]["prefixes"], said["requests"]["preemptions"]
        print(
            f"{name:16} {sum(a is not None for a in got)} answered, {len(differ)} differ {differ[:5]}; "
            f"{preemptions} preemptions, {0 if hits is None else hits['hit_tokens']} tokens found",
            flush=True,
        )
        wrong += len(differ)
    return int(wrong > 0)


def soak(args: argparse.Namespace) -> int:
    """Requests with pictures, many of them new: resident memory after the first tenth must stay where it is."""
    engine = Engine(args.model, kv_cache_bytes=16 * 2**20, image_cache_bytes=4 * 2**20)
    dice, marks = random.Random(0), list[float]()

    def requests() -> Any:
        for i in range(args.requests):
            prompt = prompt_of(
                engine, range(10), picture(dice.randrange(args.requests // 2)), [dice.randrange(256)] * 9
            )
            yield i, prompt, SamplingParams(max_tokens=dice.randrange(1, 24), temperature=dice.choice((0.0, 1.0)))

    for done, _ in enumerate(engine.as_completed(requests()), start=1):
        if done % (args.requests // 10) == 0:
            gc.collect()
            marks.append(resident() / 2**20)
            print(f"{done:5} requests: {marks[-1]:.1f} MiB resident, {engine.report()['caches']}", flush=True)
    cache = engine.loop.runner.cache
    cache.check_integrity()
    leaked = cache.pool.num_blocks - cache.pool.available
    growth = max(marks[1:]) - marks[0]
    print(f"growth after the first tenth: {growth:.1f} MiB of {marks[0]:.0f}; blocks leaked: {leaked}")
    return int(leaked > 0 or growth > 0.02 * marks[0])


def overhead(args: argparse.Namespace) -> int:
    """CPU milliseconds a decoding step spends outside the model, with a model that computes nothing."""
    engine = Engine(args.model, max_model_len=4096, max_step_tokens=4096)
    model, vocab = engine.loop.runner.model, engine.config.vocab_size
    width, spent = engine.config.hidden_size, dict.fromkeys(("schedule", "layout", "sample", "step"), 0.0)
    hidden = torch.zeros(1, width)
    logits = torch.randn(args.running, vocab)
    model.forward = lambda step, caches, observe: hidden.expand(len(step.token_ids), -1)  # type: ignore[method-assign]
    model.logits = lambda x: logits[: len(x)]  # type: ignore[method-assign]
    params = SamplingParams(max_tokens=10**4, temperature=args.temperature, top_p=0.5, ignore_eos=True)
    for i in range(args.running):
        engine.submit(engine.encode({"token_ids": [*[*range(200)] * 5, i]}), params)
        if i == 0:
            engine.loop.step()  # the others find all but their last token: each still has a table of its own
    loop = engine.loop
    while len(loop.scheduler.running) < args.running or any(t.pending > 1 for t in loop.scheduler.running):
        loop.step()

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any) -> Any:
            began = time.thread_time()
            result = function(*given)
            spent[name] += time.thread_time() - began
            return result

        return run

    loop.scheduler.schedule = timed("schedule", loop.scheduler.schedule)  # type: ignore[method-assign]
    loop.runner._step = timed("layout", loop.runner._step)  # type: ignore[method-assign]
    loop._sample = timed("sample", loop._sample)  # type: ignore[method-assign]
    step = timed("step", loop.step)
    for _ in range(args.steps):
        step()
    each = {name: 1000 * s / args.steps for name, s in spent.items()}
    rest = each["step"] - each["sample"]
    print(f"{args.running} running at about 1,000 tokens each, {args.steps} steps, vocabulary {vocab}")
    print(f"scheduler and cache {rest:.2f} ms a step (schedule {each['schedule']:.2f}, layout {each['layout']:.2f})")
    print(f"sampler {each['sample']:.2f} ms a step at temperature {args.temperature}")
    return 0


def int8(args: argparse.Namespace) -> int:
    """An int8 KV cache beside the model's dtype: bytes, logits, greedy tokens, and scores on nano's scenes."""
    from tools.eval_nano import ask
    from tools.nano.scenes import SceneConfig
    from tools.nano.scoring import score

    rows: dict[str, dict[str, float]] = {}
    logits: dict[str, list[torch.Tensor]] = {}
    for kind in ("auto", "int8"):
        engine = Engine(args.model, max_model_len=2048, kv_dtype=kind)
        prompts = [prompt_of(engine, range(9), picture(i), range(20 + 9 * i)) for i in range(8)]
        scored = (engine.score(p, return_logits=True).logits for p in prompts)
        logits[kind] = [part for part in scored if part is not None]
        rows[kind] = {"bytes a token": engine.report()["memory"]["kv_per_token"]}
        if args.scenes:
            config = SceneConfig(side=engine.config.visual.image_size)
            tally = score(lambda *asked, engine=engine: ask(engine, *asked), config, args.scenes)  # type: ignore[misc]
            rows[kind] |= {name: 100 * rate for name, rate in tally.rates.items()}
    pairs = list(zip(logits["auto"], logits["int8"], strict=True))
    error = torch.cat([(a - b).flatten() for a, b in pairs])
    spread = torch.cat([a.flatten() for a, _ in pairs]).std()
    same = torch.cat([a.argmax(-1) == b.argmax(-1) for a, b in pairs]).float().mean()
    print(f"logits: error {error.square().mean().sqrt():.4f} rms, {error.abs().max():.3f} at most; spread {spread:.2f}")
    print(
        f"the likeliest token is the same at {100 * same:.2f} % of the positions\n\n| | 16 bits | int8 |\n|---|---|---|"
    )
    for name in rows["auto"]:
        print(f"| {name} | {rows['auto'][name]:,.1f} | {rows['int8'][name]:,.1f} |")
    return 0


def full_size(args: argparse.Namespace) -> Engine:
    """The model named, or a synthetic one of a published size."""
    if args.synthetic is None:
        return Engine(args.model, max_model_len=2048)
    return Engine(synthetic=args.synthetic, precision=args.precision, device="cpu", max_model_len=2048)


def second(args: argparse.Namespace) -> int:
    """Time to first token of the first question about a picture and of the second."""
    engine = full_size(args)
    ratios = []
    for i in range(args.requests if args.requests < 20 else 3):
        look = picture(1000 + i, 448)
        times = []
        for question in ("What is in the picture?", "Which colour has it?"):
            content = [{"type": "image", "image": look}, {"type": "text", "text": question}]
            answer = engine.chat([{"role": "user", "content": content}], greedy(2))
            times.append(answer.timings.ttft_s)
            print(
                f"{answer.usage.cached_tokens:5} of {answer.usage.prompt_tokens} tokens found, {times[-1]:.3f} s",
                flush=True,
            )
        ratios.append(times[0] / times[1])
    print(f"the second question's first token comes {median(ratios):.1f} x sooner")
    return 0


def throughput(args: argparse.Namespace) -> int:
    """Tokens per second of one request and of several decoding together."""
    engine = full_size(args)
    speeds = {}
    for many in (1, 2, 4, 8):
        requests = [
            engine.submit(engine.encode({"token_ids": [i, 1, 2, 3]}), greedy(args.steps + 1)) for i in range(many)
        ]
        engine.loop.step()
        began = time.perf_counter()
        while not all(request.done for request in requests):
            engine.loop.step()
        speeds[many] = many * args.steps / (time.perf_counter() - began)
        print(f"{many} together: {speeds[many]:.2f} tok/s, {speeds[many] / speeds[1]:.2f} x one", flush=True)
    return 0


def drafts(args: argparse.Namespace) -> int:
    """Prompt lookup on and off, on captions of noise and on a prompt whose text repeats."""
    for name in ("caption", "repeated text"):
        told = []
        for length in (0, args.drafts):
            engine = Engine(args.model, max_model_len=2048, speculative_tokens=length)
            prompt: Any = [{"image": picture(5, 144)}, {"text": "Generate the caption in English with grounding:"}]
            if name == "repeated text":
                prompt = {"token_ids": [*range(60)] * 8}
            engine.generate([prompt], greedy(4))
            answer = engine.generate([prompt], greedy(args.steps))[0]
            told.append((answer.timings.decode_tokens_per_s, answer.token_ids, engine.report()["drafts"]))
        (plain, want, _), (fast, got, counts) = told
        print(f"{name}: {plain:.1f} to {fast:.1f} tok/s, {fast / plain:.2f} x; {counts}; same tokens: {want == got}")
    return 0


def resident() -> int:
    """Bytes of memory that this process has in RAM."""
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * 4096


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = {f.__name__: f for f in (equal, soak, overhead, int8, second, throughput, drafts)}
    parser.add_argument("command", choices=commands)
    parser.add_argument("--model", type=Path, default=NANO)
    parser.add_argument("--synthetic", help="for second and throughput: qwen-vl-chat-int4, random weights of that size")
    parser.add_argument("--precision", default="exact", choices=["exact", "fast"], help="of the synthetic model")
    parser.add_argument("--requests", type=int, default=None, help="default: 200, for soak 2,000")
    parser.add_argument("--running", type=int, default=64)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--scenes", type=int, default=100)
    parser.add_argument("--drafts", type=int, default=4)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    args.requests = args.requests or (2000 if args.command == "soak" else 200)
    torch.set_num_threads(args.threads)
    print(f"{args.command}: {args.model.name}, {platform.machine()}, {args.threads} threads, torch {torch.__version__}")
    return commands[args.command](args)


if __name__ == "__main__":
    sys.exit(main())
