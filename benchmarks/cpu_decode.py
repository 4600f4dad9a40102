"""Whole steps of the full-size model, random weights, on this CPU, llama.cpp in turns. One JSON line a figure.

    python -m benchmarks.cpu_decode --precision fast --contexts 0,300,2000 --prefill 512
        [--llama SERVE MODEL.gguf]   # a server that answers "tg N", "pp N" and "depth N" on its standard input

A step is everything: embedding, blocks, head, the choice of the token.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
from collections.abc import Callable
from typing import IO, cast

import torch

from benchmarks.alternating import alternate, say, setting
from benchmarks.cpu_kernels import reader
from qvl_runtime import Engine, SamplingParams
from qvl_runtime.schedule.device_sampler import sampler_for
from qvl_runtime.schedule.runner import Chunk
from qvl_runtime.schedule.sampler import Draws, Row

READ = 1 << 30  # bytes a sample of the ceiling


class Llama:
    """A llama.cpp that keeps its model loaded and times what it is told."""

    def __init__(self, server: str, model: str, threads: int) -> None:
        self.process = subprocess.Popen(
            [server, model, str(threads), "4096"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self._in, self._out = cast("IO[str]", self.process.stdin), cast("IO[str]", self.process.stdout)
        if self._out.readline().strip() != "ready":
            raise SystemExit(f"{server} did not load {model}")

    def __call__(self, command: str) -> None:
        self._in.write(command + "\n")
        self._in.flush()
        self._out.readline()


def decode(engine: Engine, context: int, llama: Llama | None) -> None:
    runner, model = engine.loop.runner, engine.loop.runner.model
    weights = sum(model.bytes_by_part[part] for part in ("language", "head"))
    nbytes = weights + context * runner.cache.bytes_per_token
    params = SamplingParams(temperature=0.0).resolve(engine.defaults)
    with runner.cache.sequence(1.0) as sequence:
        if context:
            runner.run([Chunk(sequence, [1] * context)])
        choose = sampler_for(model.ops)
        draws = Draws(params, [1], engine.config.vocab_size, model.device, 0)

        def step() -> None:
            # the context grows by a token each time, as the peer's does
            choose(runner.compute([Chunk(sequence, [1])])([0]), [Row(draws, 0)])

        calls: dict[str, Callable[[], object]] = {"qvl": step, "read": reader(READ)}
        if llama is not None:
            llama(f"depth {context}")
            calls["llama.cpp"] = lambda: llama("tg 1")
        found = alternate(calls, processes=() if llama is None else (llama.process.pid,))
    ceiling = READ / found["read"].seconds
    for name, timing in found.items():
        if name != "read":
            say(decode=name, context=context, tok_s=1 / timing.seconds, ms=timing.seconds * 1e3,
                gb_s=nbytes / timing.seconds / 1e9, of_read=nbytes / timing.seconds / ceiling, read_gb_s=ceiling / 1e9,
                over_ours=timing.seconds / found["qvl"].seconds, load=timing.load, samples=timing.samples)  # fmt: skip


def prefill(engine: Engine, tokens: int, llama: Llama | None) -> None:
    runner, model = engine.loop.runner, engine.loop.runner.model
    with runner.cache.sequence(1.0) as sequence:

        def run() -> None:
            sequence.truncate(0)
            model.logits(runner.run([Chunk(sequence, [1] * tokens)])[-1:])

        calls: dict[str, Callable[[], object]] = {"qvl": run}
        if llama is not None:
            calls["llama.cpp"] = lambda: llama(f"pp {tokens}")
        found = alternate(calls, wanted=3, processes=() if llama is None else (llama.process.pid,))
    for name, timing in found.items():
        say(prefill=name, tokens=tokens, tok_s=tokens / timing.seconds, s=timing.seconds,
            over_ours=timing.seconds / found["qvl"].seconds, load=timing.load, samples=timing.samples)  # fmt: skip


def picture(engine: Engine) -> None:
    model, size = engine.loop.runner.model, engine.config.visual.image_size
    pixels = torch.randn(1, 3, size, size)
    timing = alternate({"picture": lambda: model.encode_pictures(pixels)}, wanted=3)["picture"]
    say(picture=engine.engine_config.precision, s=timing.seconds, load=timing.load, samples=timing.samples)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen-vl-chat-int4", help="qwen-vl-chat-int4 or qwen-vl-chat")
    parser.add_argument("--precision", default="fast", choices=["exact", "fast"])
    parser.add_argument("--contexts", default="0,300,2000")
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--picture", action="store_true", help="also the full visual tower")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--llama", nargs=2, metavar=("SERVE", "MODEL"))
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    say(**setting())
    engine = Engine(
        synthetic=asked.model, precision=asked.precision, device="cpu", max_model_len=4096,
        repeat_blocks=asked.model == "qwen-vl-chat",
    )  # fmt: skip
    llama = Llama(*asked.llama, asked.threads) if asked.llama else None
    for context in map(int, filter(None, asked.contexts.split(","))):
        decode(engine, context, llama)
    if asked.prefill:
        prefill(engine, asked.prefill, llama)
    if asked.picture:
        picture(engine)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    say(peak_resident_gb=peak / 1e9, **engine.report()["kernels"])


if __name__ == "__main__":
    main()
