"""The same work on qvl, on llama.cpp and on plain torch in bfloat16, in turns in one run. One JSON line a figure.

    python -m benchmarks.peers --contexts 0,300,2000 --prefill 512 --image [--llama SERVE MODEL.gguf]
    python -m benchmarks.peers --contexts "" --prefill 512 --image --no-torch     # alone: its peak memory at the end

qvl runs the full-size Int4 model, llama.cpp its Q4_0 twin (`benchmarks.peers.llama_build`), torch the definition of
every op in bfloat16: a faithful implementation of the original without tricks. All weights are random, which costs the
same. `over_ours` is how many times longer than the first qvl it takes. torch's blocks share the memory of one, which
is larger than the caches, for 19 GB would not fit in memory with the others.
"""

from __future__ import annotations

import argparse
import os
import resource
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch

from benchmarks.peers.llama import Llama
from benchmarks.timing import Timing, alternate, memory_state, say, setting
from qvl_kernels.bandwidth import reader
from qvl_runtime import Engine
from qvl_runtime.profile import steps

READ = 1 << 30  # bytes a sample of the ceiling
Calls = dict[str, Callable[[], object]]


def engines(precisions: list[str], kv_dtype: str, plain: bool) -> dict[str, Engine]:
    """The engines that run in this process, by name."""
    common: dict[str, Any] = {"device": "cpu", "max_model_len": 4096, "kv_cache_bytes": 3 << 30}
    ours: dict[str, Any] = {"synthetic": "qwen-vl-chat-int4", "kv_dtype": kv_dtype, **common}
    cache = "" if kv_dtype == "auto" else f", {kv_dtype} KV"
    built = {f"qvl {precision}{cache}": Engine(precision=precision, **ours) for precision in precisions}
    if plain:
        os.environ["QVL_KERNELS"] = "reference"
        built["torch bf16"] = Engine(synthetic="qwen-vl-chat", repeat_blocks=True, dtype="bfloat16", **common)
        del os.environ["QVL_KERNELS"]
    return built


def decode(engines_by_name: dict[str, Engine], context: int, llama: Llama | None) -> None:
    """Time decode steps after `context` tokens, with the read ceiling in turns, and print tokens/s and GB/s."""
    with ExitStack() as stack:
        turns: Calls = {
            name: partial(stack.enter_context(steps.decoding(engine, context)), context)
            for name, engine in engines_by_name.items()
        }
        read = reader(torch.device("cpu"), READ)
        if llama is not None:
            llama(f"depth {context}")
            turns["llama.cpp"] = lambda: llama("tg 1")
        timings = alternate(turns | {"read": read.call}, processes=_processes(llama), limit_s=90)
    ceiling = read.nbytes / timings["read"].seconds
    for name, timing in timings.items():
        if name != "read":
            reads = steps.bytes_read(engines_by_name[name], context) if name in engines_by_name else None
            rate = None if reads is None else reads / timing.seconds
            _say(
                timings,
                name,
                decode=name,
                context=context,
                tok_s=1 / timing.seconds,
                gb_s=rate and rate / 1e9,
                of_read=rate and rate / ceiling,
                **memory_state(timings["read"], read.nbytes),
            )


def prefill(engines_by_name: dict[str, Engine], tokens: int, llama: Llama | None) -> None:
    """Time the prefill of `tokens` tokens and print tokens/s."""
    turns: Calls = {name: partial(steps.prefill, engine, tokens, rounds=1) for name, engine in engines_by_name.items()}
    if llama is not None:
        turns["llama.cpp"] = lambda: llama(f"pp {tokens}")
    timings = alternate(turns, min_samples=3, processes=_processes(llama), limit_s=150)
    for name, timing in timings.items():
        _say(timings, name, prefill=name, tokens=tokens, tok_s=tokens / timing.seconds, s=timing.seconds)


def image(engines_by_name: dict[str, Engine]) -> None:
    """Time one image through the vision encoder and the resampler, in seconds."""
    timings = alternate(
        {name: partial(steps.images, engine, 1, rounds=1) for name, engine in engines_by_name.items()},
        min_samples=3,
        limit_s=150,
    )
    for name, timing in timings.items():
        _say(timings, name, image=name, s=timing.seconds)


def _say(timings: dict[str, Timing], name: str, **figures: object) -> None:
    ours, timing = next(iter(timings.values())), timings[name]
    say(**figures, over_ours=timing.seconds / ours.seconds, load=timing.load, samples=timing.samples)


def _processes(llama: Llama | None) -> tuple[int, ...]:
    return () if llama is None else (llama.process.pid,)


def main() -> None:
    """Run the comparisons that the command line selects."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precisions", default="fast", help="of qvl: fast, exact, or both with a comma")
    parser.add_argument("--kv-dtype", default="auto", help="of qvl's cache: auto or int8")
    parser.add_argument("--contexts", default="0,300,2000")
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--image", action="store_true", help="also one image through the full vision encoder")
    parser.add_argument("--no-torch", action="store_true", help="leave plain torch out")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--llama", nargs=2, metavar=("SERVE", "MODEL"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    say(**setting())
    engines_by_name = engines(args.precisions.split(","), args.kv_dtype, not args.no_torch)
    llama = Llama(args.llama[0], args.llama[1], args.threads) if args.llama else None
    for context in map(int, filter(None, args.contexts.split(","))):
        decode(engines_by_name, context, llama)
    if args.prefill:
        prefill(engines_by_name, args.prefill, llama)
    if args.image:
        image(engines_by_name)
    if len(engines_by_name) == 1:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        # Since the first decode, the buffer that is read for the ceiling is in memory, too.
        buffer = READ if args.contexts else 0
        say(peak_resident_gb=(peak - buffer) / 1e9, of=next(iter(engines_by_name)), read_buffer_gb=buffer / 1e9)


if __name__ == "__main__":
    main()
