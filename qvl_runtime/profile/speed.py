"""Tokens per second the way the model's authors measured them: one image, then 1792 and 7934 generated tokens.

Their table, measured with the original code on one A100-SXM4-80G: 28.87 and 24.32 tokens/s in BF16, 37.79 and 34.34 in
Int4. At these lengths the sequence reaches 2048 and 8192 tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from qvl_runtime.engine.engine import Engine
from qvl_runtime.errors import ConfigError
from qvl_runtime.profile import steps
from qvl_runtime.profile.run_info import Ceilings
from qvl_runtime.profile.spread import Spread, percentiles
from qvl_runtime.schedule.api import SamplingParams, Timings

LENGTHS = (1792, 7934)  # generated tokens in the published table
PUBLISHED = {("bf16", 1792): 28.87, ("bf16", 7934): 24.32, ("int4", 1792): 37.79, ("int4", 7934): 34.34}  # A100-80G
NUM_CONTEXTS = 5  # at which a long answer is measured, between its first token and its last


@dataclass(frozen=True, slots=True)
class TimedAnswer:
    """Timings of one answer that was generated token by token."""

    tokens: int
    timings: Timings
    ttft_s: float
    tpot_s: dict[str, float]  # p50, p95, p99 of the times between tokens

    @property
    def split(self) -> dict[str, float]:
        """Seconds per phase of the request."""
        t = self.timings
        return {"image decode": t.image_s, "vision encoder": t.vision_s, "prefill": t.prefill_s, "decode": t.decode_s}


@dataclass(frozen=True, slots=True)
class Mean:
    """The mean speed over a published length."""

    length: int  # tokens generated
    tok_s: Spread
    gb_s: float  # weights and KV cache read, GB/s
    of_read: float  # fraction of the read ceiling
    published: float | None  # tokens/s of the original code on an A100-80G
    how: str  # generated, or estimated from steps


@dataclass(frozen=True, slots=True)
class Batch:
    """Decoding of several sequences together, each at the same context."""

    size: int
    context: int
    tok_s: Spread  # of all sequences together


@dataclass(frozen=True, slots=True)
class SpeedReport:
    """Speed of a model on this machine, with the ceilings of the machine."""

    weights: str  # "int4", "bf16", ...
    ceilings: Ceilings
    answer: TimedAnswer
    means: tuple[Mean, ...]
    batches: tuple[Batch, ...]
    notes: tuple[str, ...]


def profile_speed(
    engine: Engine,
    tokens: int | None = None,
    lengths: Sequence[int] = LENGTHS,
    batches: Sequence[int] = (1, 2, 4, 8),
    rounds: int = 5,
    progress: Callable[[str], None] = lambda task: None,
    ceilings: Ceilings | None = None,
) -> SpeedReport:
    """Measure one answer of `tokens` tokens to one image, the mean over each length, and batches of sequences.

    tokens None: the longest length on a GPU, 32 on a CPU. ceilings None: measured first. Lengths that were not
    generated are estimated from steps at `NUM_CONTEXTS` contexts along them, and marked so. Raises `ConfigError` if
    nothing fits the model's context.
    """
    model = engine.core.runner.model
    start = engine.config.visual.n_queries + 2
    capacity = min(engine.max_model_len, engine.core.runner.cache.num_slots) - start - 1
    fitting = [length for length in lengths if length <= capacity]
    notes = [f"{length} tokens do not fit: the limit is {capacity}" for length in lengths if length > capacity]
    if tokens is None:
        tokens = max(fitting, default=capacity) if model.device.type == "cuda" else 32
    if not 2 <= tokens <= capacity:
        raise ConfigError(f"tokens is {tokens}; expected 2 to {capacity}, the limit of the context and KV cache")
    if ceilings is None:
        progress("ceilings")
        ceilings = Ceilings.measure(model.device, model.dtype)
    progress(f"one image, {tokens} tokens")
    answer, gaps = _answer(engine, tokens)
    means = []
    for length in fitting:
        progress(f"mean over {length} tokens")
        means.append(_mean(engine, start, length, gaps, ceilings, rounds))
    groups = []
    for size in batches:
        if size * (start + 2) > engine.core.runner.cache.num_slots or size > engine.engine_config.max_running:
            notes.append(f"a batch of {size} does not fit the KV cache")
            continue
        progress(f"batch of {size}")
        spread = steps.decode(engine, [start], size, rounds)[start]
        groups.append(Batch(size, start, spread.rate(size)))
    return SpeedReport(weight_format(engine), ceilings, answer, tuple(means), tuple(groups), tuple(notes))


def weight_format(engine: Engine) -> str:
    """ "int4" or "int8" if the weights are quantized, else a short dtype name such as "bf16"."""
    quantization = engine.config.quantization
    if quantization is not None:
        return f"int{quantization.bits}"
    return {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}[str(engine.core.runner.model.dtype).split(".")[1]]


def _answer(engine: Engine, tokens: int) -> tuple[TimedAnswer, list[float]]:
    """Answer one image without text, as published; also returns the seconds per token after the first."""
    import numpy as np

    size = engine.config.visual.image_size
    noise = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    began = time.perf_counter()
    request = engine.submit(engine.encode([{"image": noise}]), params)
    first, arrivals = None, []
    try:
        while not request.done:
            engine.core.step()
            if request.branches and len(request.branches[0].token_ids) > len(request.prompt.token_ids):
                arrivals.append(time.perf_counter())
                first = first or arrivals[0] - began
    finally:
        engine.core.cancel(request)
    completion = request.completion()
    gaps = [after - before for before, after in pairwise(arrivals)]
    ttft = first if first is not None else completion.timings.ttft_s
    return TimedAnswer(len(completion.token_ids), completion.timings, ttft, percentiles(gaps)), gaps


def _mean(engine: Engine, start: int, length: int, gaps: Sequence[float], ceilings: Ceilings, rounds: int) -> Mean:
    """The mean over the generated answer if it is long enough, else over steps at contexts spaced evenly along it."""
    if len(gaps) + 1 >= length:
        seconds, how = Spread.of(gaps[:length]), f"{length} tokens generated"
        seconds = seconds._replace(median=sum(gaps[: length - 1]) / (length - 1))
    else:
        # midpoints of equal parts are exact for a cost that grows linearly with the context
        contexts = [start + round((i + 0.5) * length / NUM_CONTEXTS) for i in range(NUM_CONTEXTS)]
        spreads = steps.decode(engine, contexts, rounds=rounds).values()
        median, p10, p90 = (sum(column) / NUM_CONTEXTS for column in zip(*(s[:3] for s in spreads), strict=True))
        seconds = Spread(median, p10, p90, rounds)
        how = f"steps at {NUM_CONTEXTS} contexts from {contexts[0]} to {contexts[-1]}, {rounds} times; not generated"
    nbytes = steps.bytes_read(engine, start + length // 2)
    gb_s = nbytes / seconds.median / 1e9
    return Mean(
        length,
        seconds.rate(1.0),
        gb_s,
        gb_s / ceilings.read_gb_s.median,
        _published(engine, length),
        how,
    )


def _published(engine: Engine, length: int) -> float | None:
    full_size = (engine.config.num_hidden_layers, engine.config.hidden_size) == (32, 4096)
    return PUBLISHED.get((weight_format(engine), length)) if full_size else None


def as_table(report: SpeedReport) -> list[dict[str, str]]:
    """One row per length, for `qvl profile speed`."""
    return [
        {
            "generated": f"{mean.length}",
            "tokens/s": mean.tok_s.text(),
            "GB/s": f"{mean.gb_s:.1f}",
            "of the read ceiling": f"{mean.of_read:.0%}",
            "original, A100-80G": "" if mean.published is None else f"{mean.published}",
            "measured": mean.how,
        }
        for mean in report.means
    ]
