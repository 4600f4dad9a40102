"""Tokens a second as the model's authors measured them: one image of context, then 1792 and 7934 tokens generated.

Their table, on one A100-SXM4-80G with the original code: 28.87 and 24.32 tokens/s in BF16, 37.79 and 34.34 in Int4. The
lengths are those at which the sequence reaches 2048 and 8192 tokens.
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

LENGTHS = (1792, 7934)  # generated tokens of the published table
PUBLISHED = {("bf16", 1792): 28.87, ("bf16", 7934): 24.32, ("int4", 1792): 37.79, ("int4", 7934): 34.34}  # A100-80G
SAMPLED = 5  # contexts between the first token and the last at which a long answer is measured


@dataclass(frozen=True, slots=True)
class Answered:
    """One answer, really generated, token by token."""

    tokens: int
    timings: Timings
    ttft_s: float
    tpot_s: dict[str, float]  # p50, p95, p99 of the times between tokens

    @property
    def split(self) -> dict[str, float]:
        """Seconds by what they went into."""
        t = self.timings
        return {"image decode": t.image_s, "vision tower": t.vision_s, "prefill": t.prefill_s, "decode": t.decode_s}


@dataclass(frozen=True, slots=True)
class Mean:
    """The mean speed over a published length."""

    length: int  # tokens generated
    tok_s: Spread
    gb_s: float  # weights and KV cache read a second
    of_read: float  # share of the read ceiling
    published: float | None  # tokens/s of the original on an A100-80G
    how: str


@dataclass(frozen=True, slots=True)
class Batch:
    """Decoding of several sequences together, each at the same context."""

    size: int
    context: int
    tok_s: Spread  # of all together


@dataclass(frozen=True, slots=True)
class SpeedReport:
    weights: str  # "int4" or "bf16" and so on
    ceilings: Ceilings
    answer: Answered
    means: tuple[Mean, ...]
    batches: tuple[Batch, ...]
    notes: tuple[str, ...]


def profile_speed(
    engine: Engine,
    tokens: int | None = None,
    lengths: Sequence[int] = LENGTHS,
    batches: Sequence[int] = (1, 2, 4, 8),
    rounds: int = 5,
    progress: Callable[[str], None] = lambda what: None,
    ceilings: Ceilings | None = None,
) -> SpeedReport:
    """Measure one answer of `tokens` tokens to one image, the mean over each length, and batches of sequences.

    tokens None: the whole of the longest length on a GPU, 32 on a CPU; ceilings None: measured first. Lengths that were
    not generated are measured at `SAMPLED` contexts along them, and said to be. Raises `ConfigError` where nothing fits
    into the model's context.
    """
    model = engine.loop.runner.model
    start = engine.config.visual.n_queries + 2
    room = min(engine.max_model_len, engine.loop.runner.cache.num_slots) - start - 1
    fitting = [length for length in lengths if length <= room]
    notes = [f"{length} tokens do not fit: there is room for {room}" for length in lengths if length > room]
    if tokens is None:
        tokens = max(fitting, default=room) if model.device.type == "cuda" else 32
    if not 2 <= tokens <= room:
        raise ConfigError(f"tokens is {tokens}; expected 2 to {room}, which is what the context and KV cache hold")
    if ceilings is None:
        progress("ceilings")
        ceilings = Ceilings.measured(model.device, model.dtype)
    progress(f"one image, {tokens} tokens")
    answer, gaps = _answer(engine, tokens)
    means = []
    for length in fitting:
        progress(f"mean over {length} tokens")
        means.append(_mean(engine, start, length, gaps, ceilings, rounds))
    groups = []
    for size in batches:
        if size * (start + 2) > engine.loop.runner.cache.num_slots or size > engine.engine_config.max_running:
            notes.append(f"a batch of {size} does not fit the KV cache")
            continue
        progress(f"batch of {size}")
        spread = steps.decode(engine, [start], size, rounds)[start]
        groups.append(Batch(size, start, spread.rate(size)))
    return SpeedReport(kind_of(engine), ceilings, answer, tuple(means), tuple(groups), tuple(notes))


def kind_of(engine: Engine) -> str:
    """ "int4", or the dtype in short."""
    quantization = engine.config.quantization
    if quantization is not None:
        return f"int{quantization.bits}"
    return {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}[str(engine.loop.runner.model.dtype).split(".")[1]]


def _answer(engine: Engine, tokens: int) -> tuple[Answered, list[float]]:
    """One image and nothing else, as it is published; and the seconds of each token after the first."""
    import numpy as np

    size = engine.config.visual.image_size
    noise = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    began = time.perf_counter()
    request = engine.submit(engine.encode([{"image": noise}]), params)
    first, at = None, []
    try:
        while not request.done:
            engine.loop.step()
            if request.tasks and len(request.tasks[0].token_ids) > len(request.prompt.token_ids):
                at.append(time.perf_counter())
                first = first or at[0] - began
    finally:
        engine.loop.cancel(request)
    completion = request.completion()
    gaps = [after - before for before, after in pairwise(at)]
    ttft = first if first is not None else completion.timings.ttft_s
    return Answered(len(completion.token_ids), completion.timings, ttft, percentiles(gaps)), gaps


def _mean(engine: Engine, start: int, length: int, gaps: Sequence[float], ceilings: Ceilings, rounds: int) -> Mean:
    """Generated where the answer was long enough; else the mean of steps at contexts spaced evenly along it."""
    if len(gaps) + 1 >= length:
        seconds, how = Spread.of(gaps[:length]), f"{length} tokens generated"
        seconds = seconds._replace(median=sum(gaps[: length - 1]) / (length - 1))
    else:
        # midpoints of equal parts: exact for a cost that grows linearly with the context
        contexts = [start + round((i + 0.5) * length / SAMPLED) for i in range(SAMPLED)]
        taken = steps.decode(engine, contexts, rounds=rounds)
        median, p10, p90 = (sum(column) / SAMPLED for column in zip(*(s[:3] for s in taken.values()), strict=True))
        seconds = Spread(median, p10, p90, rounds)
        how = f"steps at {SAMPLED} contexts from {contexts[0]} to {contexts[-1]}, {rounds} times; not generated"
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
    return PUBLISHED.get((kind_of(engine), length)) if full_size else None


def as_table(report: SpeedReport) -> list[dict[str, str]]:
    """One row a published length: what `qvl profile speed` shows."""
    return [
        {
            "generated": f"{mean.length}",
            "tokens/s": mean.tok_s.said(),
            "GB/s": f"{mean.gb_s:.1f}",
            "of the read ceiling": f"{mean.of_read:.0%}",
            "original, A100-80G": "" if mean.published is None else f"{mean.published}",
            "measured": mean.how,
        }
        for mean in report.means
    ]
