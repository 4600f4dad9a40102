"""What a decoding step costs outside its kernels: `python -m benchmarks.overhead`. One JSON line a figure.

python -m benchmarks.overhead                                                        # nano
python -m benchmarks.overhead --synthetic qwen-vl-chat-int4 --precision fast --context 200
"""

from __future__ import annotations

import argparse
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from statistics import median
from typing import Any

import torch.nn.functional as F

from benchmarks.timing import say, setting
from qvl_kernels.cpu.library import library
from qvl_runtime import Engine, SamplingParams

SCHEDULING = ("loop", "schedule", "layout")  # parts that know requests and blocks, and no numbers of the model


class Parts:
    """Seconds by part, each without the parts that it calls."""

    def __init__(self) -> None:
        self.spent, self.calls = defaultdict[str, float](float), Counter[str]()
        self._inner = [0.0]

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap the function so that its seconds, less those of parts that it calls, count for `name`."""

        def run(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            self._inner.append(0.0)
            result = function(*args, **kwargs)
            took = time.perf_counter() - began
            self.spent[name] += took - self._inner.pop()
            self._inner[-1] += took
            self.calls[name] += 1
            return result

        return run

    def watch(self, owner: Any, attribute: str, name: str) -> None:
        """Replace an attribute, a callable, by its timed wrapper."""
        setattr(owner, attribute, self.timed(name, getattr(owner, attribute)))


def watched(engine: Engine) -> Parts:
    """The engine with every part of a step timed. Kernels are the C++ ones and torch's GEMM and attention.

    A decode step that is replayed from a recording is one call.
    """
    parts, core = Parts(), engine.core
    parts.watch(library(), "replay", "kernels")
    for kernel in vars(library().kernels):
        parts.watch(library().kernels, kernel, "kernels")
    parts.watch(F, "linear", "kernels")
    parts.watch(F, "scaled_dot_product_attention", "kernels")
    parts.watch(core.runner.model, "forward", "model")
    parts.watch(core.runner.model, "logits", "model")
    parts.watch(core.runner, "_step", "layout")
    parts.watch(core.scheduler, "schedule", "schedule")
    if core.runner.graphs is not None:
        parts.watch(core.runner.graphs, "run", "layout")
    for name in ("sample", "read"):
        parts.watch(core.computing, name, "sampler")
    parts.watch(core, "step", "loop")
    return parts


def decode(engine: Engine, parts: Parts, running: int, context: int, steps: int, params: SamplingParams) -> None:
    """Medians over the steps of `running` requests of about `context` tokens that share a prefix."""
    core, requests = engine.core, []
    for i in range(running):
        ids = [(7 * j) % 200 for j in range(context - 1)]
        requests.append(engine.submit(engine.encode({"token_ids": [*ids, i]}), params))
        core.step()  # the others find all but their last token
    while any(branch.pending > 1 for branch in core.scheduler.running) or len(core.scheduler.running) < running:
        core.step()
    core.step()  # is recorded
    by_step: list[defaultdict[str, float]] = []
    for _ in range(steps):
        parts.spent.clear()
        parts.calls.clear()
        core.step()
        by_step.append(parts.spent.copy())
    for request in requests:
        core.cancel(request)
    ms = {name: 1000 * median(spent[name] for spent in by_step) for name in by_step[0]}
    step = sum(ms.values())
    calls = parts.calls["kernels"]
    marshalling = calls * empty_call()
    outside = step - ms["kernels"] + marshalling
    scheduling = sum(ms[name] for name in SCHEDULING)
    say(
        running=running,
        context=context,
        steps=steps,
        step_ms=step,
        outside_kernels_ms=outside,
        outside_kernels=outside / step,
        scheduler_and_cache_ms=scheduling,
        scheduler_and_cache=scheduling / step,
        kernel_calls=calls,
        of_calls_themselves_ms=marshalling,
        **{f"{name}_ms": value for name, value in ms.items()},
    )


def empty_call(repeats: int = 1000) -> float:
    """Milliseconds of a kernel call that has nothing to do: the cost of passing its arguments through ctypes."""
    kernel = library().kernels.rms_norm
    began = time.perf_counter()
    for _ in range(repeats):
        kernel(None, None, 0, 0, 16, None, 1e-6, None, None)
    return 1000 * (time.perf_counter() - began) / repeats


def main() -> None:
    """Print the overhead of decode steps at each number of running requests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint; without it the shipped nano")
    parser.add_argument("--synthetic", help="qwen-vl-chat-int4: random weights of that size")
    parser.add_argument("--precision", default="exact", choices=["exact", "fast"])
    parser.add_argument("--running", default="1,16,64", help="requests that decode together")
    parser.add_argument("--context", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--no-graphs", action="store_true", help="decode op by op")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--penalty", type=float, default=1.0, help="the repetition penalty; 1 is off")
    args = parser.parse_args()
    engine = Engine(
        args.model,
        synthetic=args.synthetic,
        precision=args.precision,
        device="cpu",
        max_model_len=4096,
        graphs=not args.no_graphs,
    )
    say(
        **setting(),
        model=engine.folder.name,
        precision=args.precision,
        temperature=args.temperature,
        penalty=args.penalty,
    )
    params = SamplingParams(
        max_tokens=10**4, temperature=args.temperature, repetition_penalty=args.penalty, ignore_eos=True, seed=0
    )
    parts = watched(engine)
    for running in map(int, args.running.split(",")):
        decode(engine, parts, running, args.context, args.steps, params)


if __name__ == "__main__":
    main()
