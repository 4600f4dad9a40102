"""How the model's thread holds Python's lock: `python -m benchmarks.serving.lock_costs` prints it as JSON.

The calls of kernels are timed in an engine of one thread that is alone: while they run, other threads may have the
lock, and in the rest of a step they may not.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from benchmarks.serving.simulation import Holding

LONG_CALL_S = 5e-5  # in which a thread that waits for the lock wakes up; after shorter calls the model has it again
TIMES = 8
STEPS = 40


class CallTimes:
    """Seconds in the calls of kernels, and how many of them were long."""

    def __init__(self) -> None:
        from qvl_kernels.cpu.library import library

        self.seconds, self.calls = 0.0, 0
        used = library()
        used.kernels = SimpleNamespace(**{name: self._timed(call) for name, call in vars(used.kernels).items()})
        used.replay = self._timed(used.replay)

    def _timed(self, call: Callable[..., None]) -> Callable[..., None]:
        def timed(*arguments: Any) -> None:
            began = time.perf_counter()
            call(*arguments)
            seconds = time.perf_counter() - began
            self.seconds += seconds
            self.calls += seconds > LONG_CALL_S

        return timed


def lock_costs() -> tuple[Holding, Holding, Holding]:
    """Measure in a process of its own: for a step of decoding, for what a prompt adds, and for a new picture."""
    command = [sys.executable, "-m", "benchmarks.serving.lock_costs"]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    decode, prompt, picture = (Holding(*values) for values in json.loads(found))
    return decode, prompt, picture


def main() -> None:
    """Time steps with one answer, with a prompt about a known picture, and with one about a new picture."""
    import numpy as np
    import torch
    from PIL import Image

    from qvl_runtime import Engine, SamplingParams

    torch.set_num_threads(1)
    times = CallTimes()
    engine, noise = Engine(), np.random.default_rng(0)

    def picture() -> Image.Image:
        return Image.fromarray(noise.integers(0, 256, (48, 48, 3), dtype=np.uint8))

    def step(image: Image.Image, text: str, further: int) -> tuple[np.ndarray, np.ndarray]:
        """Seconds, seconds in kernels and long calls: of a step with a prompt, and of one of the further steps."""
        params = SamplingParams(max_tokens=1 + further, temperature=0, ignore_eos=True)
        request = engine.submit(engine.encode([{"image": image}, {"text": text}]), params)
        first = one(1)
        rest = one(further)
        assert request.done
        return first, rest / further

    def one(steps: int) -> np.ndarray:
        before = np.array([time.thread_time(), times.seconds, times.calls])
        for _ in range(steps):
            engine.core.step()
        spent: np.ndarray = np.array([time.thread_time(), times.seconds, times.calls]) - before
        return spent

    known = picture()
    step(known, "Warm", STEPS)
    new = np.mean([step(picture(), f"New {n}", STEPS)[0] for n in range(TIMES)], 0)
    seen, decode = np.mean([step(known, f"{n} known", STEPS) for n in range(TIMES)], 0)
    print(json.dumps([_holding(*decode), _holding(*(seen - decode)), _holding(*(new - seen))]))


def _holding(seconds: float, kernels: float, calls: float) -> Holding:
    return Holding(1 - kernels / seconds, calls)


if __name__ == "__main__":
    main()
