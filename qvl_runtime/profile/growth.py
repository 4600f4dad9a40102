"""Measure how cost grows with context, prompt length, batch size and images, and what bounds each."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qvl_runtime.engine.engine import Engine
from qvl_runtime.profile import steps
from qvl_runtime.profile.run_info import Ceilings
from qvl_runtime.profile.spread import Spread

CONTEXTS = (256, 512, 1024, 2048, 4096, 8192)
PROMPTS = (64, 128, 256, 512, 1024, 2048)
BATCHES = (1, 2, 4, 8, 16, 32)
IMAGES = (0, 1, 2, 4, 8)
SLOW = 1.0  # seconds; faster work is measured three times, after a warm-up call
QUESTION = 32  # text tokens after the images
BATCH_CONTEXT = 256


@dataclass(frozen=True, slots=True)
class Point:
    """Seconds of work of size `x`."""

    x: int
    seconds: Spread


@dataclass(frozen=True, slots=True)
class Curve:
    """Seconds of work against its size, and a sentence on what bounds it, computed from the figures."""

    name: str
    axis: str
    points: tuple[Point, ...]
    bound: str


def growth(
    engine: Engine,
    ceilings: Ceilings,
    quick: bool = False,
    progress: Callable[[str], None] = lambda task: None,
    max_seconds: float = math.inf,
) -> list[Curve]:
    """Measure the four curves, each as far as the context and the KV cache of this engine allow.

    The curves of prompts and images end at the first size that takes more than `max_seconds`.
    """
    slots = min(engine.core.runner.cache.num_slots, engine.max_model_len)
    contexts = [n for n in CONTEXTS if n + 32 <= slots][: 2 if quick else None]
    progress("decode against context")
    decoded = steps.decode(engine, contexts, rounds=3)
    curves = [Curve("decode", "context, tokens", _points(decoded), _decode_bound(engine, decoded, ceilings))]
    prompts = [n for n in PROMPTS if n + 32 <= slots][: 2 if quick else None]
    progress("prefill against length")
    prefilled = _measure_rising(prompts, lambda n, rounds: steps.prefill(engine, n, rounds=rounds), max_seconds)
    curves.append(Curve("prefill", "prompt, tokens", _points(prefilled), _prefill_bound(engine, prefilled, ceilings)))
    max_batch = engine.core.runner.cache.num_slots // (BATCH_CONTEXT + 32)
    sizes = [n for n in BATCHES if n <= min(max_batch, engine.engine_config.max_running)][: 2 if quick else None]
    progress("decode against batch")
    context = min(BATCH_CONTEXT, slots - 32)
    batches = {n: steps.decode(engine, [context], n, rounds=3)[context] for n in sizes}
    curves.append(Curve("batch", f"sequences, each at context {context}", _points(batches), _batch_bound(batches)))
    progress("images")
    span = engine.config.visual.n_queries + 2
    counts = [n for n in IMAGES if n * span + QUESTION <= slots][: 2 if quick else None]
    prompt = _measure_rising(
        counts, lambda n, rounds: steps.prefill(engine, n * span + QUESTION, rounds=rounds), max_seconds
    )
    vision = _measure_rising(
        [n for n in prompt if n], lambda n, rounds: steps.images(engine, n, rounds=rounds), max_seconds
    )
    totals = {n: prompt[n].plus(vision[n]) if n else prompt[n] for n in prompt if not n or n in vision}
    axis = f"images and {QUESTION} tokens, to the first token"
    curves.append(Curve("images", axis, _points(totals), _image_bound(vision, prompt)))
    return curves


def _measure_rising(
    sizes: Sequence[int], measure: Callable[[int, int], Spread], max_seconds: float
) -> dict[int, Spread]:
    """Call `measure(size, rounds)` for rising sizes until one takes over max_seconds; one round after a slow size."""
    spreads: dict[int, Spread] = {}
    for size in sizes:
        slow = any(spread.median > SLOW for spread in spreads.values())
        spreads[size] = measure(size, 1 if slow else 3)
        if spreads[size].median > max_seconds:
            break
    return spreads


def _points(spreads: dict[int, Spread]) -> tuple[Point, ...]:
    return tuple(Point(x, seconds) for x, seconds in spreads.items())


def slope(spreads: dict[int, Spread]) -> float:
    """Seconds per unit of x, by least squares."""
    import numpy as np

    x, y = np.array([*spreads], float), np.array([s.median for s in spreads.values()])
    return float(np.polyfit(x, y, 1)[0]) if len(x) > 1 else 0.0


def _decode_bound(engine: Engine, decoded: dict[int, Spread], ceilings: Ceilings) -> str:
    per_token = engine.core.runner.cache.bytes_per_token
    first, growth_s = min(decoded), slope(decoded)
    rate = steps.bytes_read(engine, first) / decoded[first].median / 1e9
    context_rate = f"{per_token / growth_s / 1e9:.1f} GB/s" if growth_s > 0 else "a rate below the noise"
    return (
        f"Memory: at context {first} a step reads weights and cache at {rate:.1f} GB/s, and each further token of "
        f"context adds {per_token / 2**10:.0f} KiB read at {context_rate}, of {ceilings.read_gb_s.median:.1f} at best."
    )


def _prefill_bound(engine: Engine, prefilled: dict[int, Spread], ceilings: Ceilings) -> str:
    language = _language_parameters(engine)
    rates = {n: 2 * language * n / s.median / 1e9 for n, s in prefilled.items()}
    return (
        f"Arithmetic: the decoder's matmuls run at {', '.join(f'{r:.0f} ({n} tokens)' for n, r in rates.items())} "
        f"Gop/s; torch's own 16-bit matmul of this size at {ceilings.gemm_gop_s.median:.0f}."
    )


def _batch_bound(batches: dict[int, Spread]) -> str:
    first, *larger = batches
    gains = ", ".join(f"{n * batches[first].median / first / batches[n].median:.1f} times for {n}" for n in larger)
    return (
        f"Tokens per second of the whole batch grow {gains}: weights are read once per batch, while arithmetic and "
        "KV cache reads grow with it."
    )


def _image_bound(vision: dict[int, Spread], prompt: dict[int, Spread]) -> str:
    if not vision:
        return "Not measured: an image does not fit the context."
    each = ", ".join(f"{s.median / n:.3g} s ({n} in a pass)" for n, s in vision.items())
    count = max(vision)
    share = vision[count].median / (vision[count].median + prompt[count].median)
    return (
        f"Arithmetic: the vision encoder takes {each} per image, {share:.0%} of the time at {count}; the rest is "
        "the prefill of the image tokens."
    )


def _language_parameters(engine: Engine) -> int:
    c = engine.config
    return c.num_hidden_layers * (4 * c.hidden_size**2 + 3 * c.hidden_size * c.ffn_width)
