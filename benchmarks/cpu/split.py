"""How evenly a decode step is split among 2 to 64 threads, computed: `python -m benchmarks.cpu.split`. JSON lines.

One decoder layer and the head of the full-size Int4 model run here, on one thread, but split as the kernels split them
for each number of threads. Each chunk is timed, and chunks are then dealt, as the thread pool does, to whichever of the
threads is free first. `largest` is the largest thread's share of an op over the mean share; `efficiency` of a step is
the time of its chunks over the time that all threads are held, layers counted 32 times. It is what the split alone
would allow. Not in it: the memory's bandwidth, which is used up by far fewer than 64 threads, waking threads up, cores
of unequal speed, and what is not a kernel.
"""

from __future__ import annotations

import argparse
import heapq
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from benchmarks.timing import say, setting
from qvl_kernels import cpu
from qvl_kernels.cpu.library import Library, library
from qvl_kernels.cpu.linears import pack_dense
from qvl_kernels.reference import BoundLinear, Precision, cache_width

HIDDEN, HEADS, DIM, WIDTH, VOCABULARY, LAYERS = 4096, 32, 128, 11008, 151936, 32
GROUP, BLOCK = 128, 16  # inputs of a scale; tokens of a cache block
TRIALS = 40  # more than the calls after which a kernel has chosen
THREADS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)

Op = Callable[[], object]


class Shares(NamedTuple):
    """The parts of an op that threads shared, dealt to a number of them."""

    work: float  # ns of all chunks
    longest: float  # ns until the last thread is done, of all parts in turn

    def over(self, threads: int) -> float:
        """The largest share over the mean share; 1 is even."""
        return self.longest * threads / self.work


def dealt(parts: list[list[int]], threads: int) -> Shares:
    """Deal each part's chunks, in order, to the thread that is free first, as the pool's threads take them."""
    longest = 0.0
    for chunks in parts:
        busy = [0.0] * threads
        for chunk in chunks:
            heapq.heappush(busy, heapq.heappop(busy) + chunk)
        longest += max(busy)
    return Shares(float(sum(map(sum, parts))), longest)


def undisturbed(runs: list[list[list[int]]]) -> list[list[int]]:
    """The least time of each chunk over several runs of an op, which have the same chunks."""
    return [[min(times) for times in zip(*part, strict=True)] for part in zip(*runs, strict=True)]


def int4(outputs: int, inputs: int, precision: Precision) -> BoundLinear:
    """A GPTQ linear of random codes."""
    qweight = torch.randint(-(2**31), 2**31, (inputs // 8, outputs)).to(torch.int32)
    qzeros = torch.full((inputs // GROUP, outputs // 8), 0x77777777, dtype=torch.int32)
    scales = torch.full((inputs // GROUP, outputs), 0.002, dtype=torch.float16)
    return cpu.prepare_gptq(qweight, qzeros, scales, None, 4, 1, None, precision)


def step(
    context: int, precision: Precision, dtype: torch.dtype = torch.bfloat16
) -> tuple[dict[str, Op], dict[str, Op]]:
    """The ops of a decode step of one request: those of a layer, and those after the last one."""
    x, weight = torch.randn(1, HIDDEN).to(dtype), torch.ones(HIDDEN, dtype=dtype)
    qkv, wide = torch.randn(1, 3 * HIDDEN).to(dtype), torch.randn(1, 2 * WIDTH).to(dtype)
    blocks = context // BLOCK + 1
    k, v = (torch.zeros(blocks, HEADS, BLOCK, cache_width(DIM, dtype), dtype=dtype) for _ in range(2))
    tables, slots = torch.arange(blocks)[None], torch.tensor([context])
    angles, logn = torch.zeros(1, DIM), torch.ones(1)
    q, narrow = torch.randn(1, HEADS, DIM).to(dtype), torch.randn(1, WIDTH).to(dtype)
    c_attn, c_proj = int4(3 * HIDDEN, HIDDEN, precision), int4(HIDDEN, HIDDEN, precision)
    up_gate, down = int4(2 * WIDTH, HIDDEN, precision), int4(HIDDEN, WIDTH, precision)
    layer: dict[str, Op] = {
        "norms": lambda: (cpu.add_rms_norm(x, x, weight, 1e-6), cpu.add_rms_norm(x, x, weight, 1e-6)),
        "c_attn": lambda: c_attn(x),
        "rotary": lambda: cpu.rotary_to_cache(qkv, angles, angles, logn, k, v, slots),
        "attention": lambda: cpu.paged_attention(q, k, v, tables, [0, 1], [context + 1]),
        "c_proj": lambda: c_proj(x),
        "up and gate": lambda: up_gate(x),
        "swiglu": lambda: cpu.swiglu(wide),
        "down": lambda: down(narrow),
    }
    table = torch.randn(VOCABULARY, HIDDEN, dtype=dtype)
    head: Op
    if precision == "fast":
        packed = pack_dense(table)
        del table
        head = lambda: packed.int8(x)  # noqa: E731
    else:
        head = lambda: cpu.linear(x, table)  # noqa: E731
    logits = torch.randn(1, VOCABULARY).to(dtype)
    return layer, {"head": head, "greedy": lambda: cpu.greedy(logits)}


def settle(precision: Precision) -> None:
    """Call the kernels of one row until they have chosen how many streams they read (csrc/linear/trial.inl)."""
    x = torch.randn(1, HIDDEN, dtype=torch.bfloat16)
    for linear in (int4(HIDDEN, HIDDEN, precision), pack_dense(torch.randn(HIDDEN, HIDDEN)).int8):
        for _ in range(TRIALS):
            linear(x)


def measure(kernels: Library, op: Op, threads: int, runs: int) -> list[list[int]]:
    """Chunks of an op, each in the run that was disturbed the least."""
    return undisturbed([kernels.chunks(op, threads) for _ in range(runs)])


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch's own ops use one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def main() -> None:
    """Print a line for each number of threads, with the largest share of each op."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", default=",".join(map(str, THREADS)), help="default: %(default)s")
    parser.add_argument("--context", type=int, default=2000, help="tokens in the cache; default: %(default)s")
    parser.add_argument("--precision", choices=["fast", "exact"], default="fast")
    parser.add_argument("--runs", type=int, default=5, help="each chunk counts at its best; default: %(default)s")
    args = parser.parse_args()
    torch.manual_seed(0)
    say(**setting(), computed="shares of simulated threads", precision=args.precision, context=args.context)
    with one_thread():
        settle(args.precision)
        layer, rest = step(args.context, args.precision)
        for threads in map(int, args.threads.split(",")):
            line: dict[str, Any] = {}
            totals: dict[str, float] = defaultdict(float)
            for ops, times in ((layer, LAYERS), (rest, 1)):
                for name, op in ops.items():
                    shares = dealt(measure(library(), op, threads, args.runs), threads)
                    line[name] = round(shares.over(threads), 3)
                    totals["work"] += times * shares.work
                    totals["held"] += times * shares.longest * threads
            say(threads=threads, efficiency=totals["work"] / totals["held"], largest=line)


if __name__ == "__main__":
    main()
