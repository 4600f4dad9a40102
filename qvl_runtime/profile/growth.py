"""How cost grows with context, prompt, batch and images, and what bounds each: measured point by point."""

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
PICTURES = (0, 1, 2, 4, 8)
MOMENT = 1.0  # seconds; what takes no longer is measured three times, after a call that is not counted
QUESTION = 32  # tokens of text beside the images
BATCH_CONTEXT = 256


@dataclass(frozen=True, slots=True)
class Point:
    x: int
    seconds: Spread


@dataclass(frozen=True, slots=True)
class Curve:
    """Seconds of a piece of work against its size, and one sentence on what bounds it, from the figures."""

    name: str
    axis: str
    points: tuple[Point, ...]
    bound: str


def growth(
    engine: Engine,
    ceilings: Ceilings,
    quick: bool = False,
    progress: Callable[[str], None] = lambda what: None,
    most_s: float = math.inf,
) -> list[Curve]:
    """The four curves, each as far as the context and the KV cache of this engine reach.

    Prompts and images go no further than the first size that takes more than `most_s` seconds.
    """
    slots = min(engine.loop.runner.cache.num_slots, engine.max_model_len)
    reach = [n for n in CONTEXTS if n + 32 <= slots][: 2 if quick else None]
    progress("decode against context")
    taken = steps.decode(engine, reach, rounds=3)
    curves = [Curve("decode", "context, tokens", _points(taken), _decode_bound(engine, taken, ceilings))]
    prompts = [n for n in PROMPTS if n + 32 <= slots][: 2 if quick else None]
    progress("prefill against length")
    filled = _rising(prompts, lambda n, rounds: steps.prefill(engine, n, rounds=rounds), most_s)
    curves.append(Curve("prefill", "prompt, tokens", _points(filled), _prefill_bound(engine, filled, ceilings)))
    fits = engine.loop.runner.cache.num_slots // (BATCH_CONTEXT + 32)
    sizes = [n for n in BATCHES if n <= min(fits, engine.engine_config.max_running)][: 2 if quick else None]
    progress("decode against batch")
    context = min(BATCH_CONTEXT, slots - 32)
    together = {n: steps.decode(engine, [context], n, rounds=3)[context] for n in sizes}
    curves.append(Curve("batch", f"sequences, each at context {context}", _points(together), _batch_bound(together)))
    progress("images")
    span = engine.config.visual.n_queries + 2
    counts = [n for n in PICTURES if n * span + QUESTION <= slots][: 2 if quick else None]
    asked = _rising(counts, lambda n, rounds: steps.prefill(engine, n * span + QUESTION, rounds=rounds), most_s)
    towers = _rising([n for n in asked if n], lambda n, rounds: steps.images(engine, n, rounds=rounds), most_s)
    seen = {n: asked[n].plus(towers[n]) if n else asked[n] for n in asked if not n or n in towers}
    axis = f"images and {QUESTION} tokens, to the first token"
    curves.append(Curve("images", axis, _points(seen), _image_bound(towers, asked)))
    return curves


def _rising(sizes: Sequence[int], measure: Callable[[int, int], Spread], most_s: float) -> dict[int, Spread]:
    """`measure(size, rounds)` of rising sizes until one takes more than most_s; once after one that took long."""
    taken: dict[int, Spread] = {}
    for size in sizes:
        slow = any(spread.median > MOMENT for spread in taken.values())
        taken[size] = measure(size, 1 if slow else 3)
        if taken[size].median > most_s:
            break
    return taken


def _points(taken: dict[int, Spread]) -> tuple[Point, ...]:
    return tuple(Point(x, seconds) for x, seconds in taken.items())


def slope(taken: dict[int, Spread]) -> float:
    """Seconds for each unit of x, by least squares."""
    import numpy as np

    x, y = np.array([*taken], float), np.array([s.median for s in taken.values()])
    return float(np.polyfit(x, y, 1)[0]) if len(x) > 1 else 0.0


def _decode_bound(engine: Engine, taken: dict[int, Spread], ceilings: Ceilings) -> str:
    per_token = engine.loop.runner.cache.bytes_per_token
    first, growth_s = min(taken), slope(taken)
    weights = steps.bytes_read(engine, first) / taken[first].median / 1e9
    further = f"{per_token / growth_s / 1e9:.1f} GB/s" if growth_s > 0 else "a speed lost in the spread"
    return (
        f"Memory: at context {first} a step reads weights and cache at {weights:.1f} GB/s, and each further token of "
        f"context adds {per_token / 2**10:.0f} KiB read at {further}, of {ceilings.read_gb_s.median:.1f} at best."
    )


def _prefill_bound(engine: Engine, taken: dict[int, Spread], ceilings: Ceilings) -> str:
    language = _language_parameters(engine)
    rates = {n: 2 * language * n / s.median / 1e9 for n, s in taken.items()}
    return (
        f"Arithmetic: the decoder's products run at {', '.join(f'{r:.0f} ({n} tokens)' for n, r in rates.items())} "
        f"Gop/s; torch's own 16-bit product of such a size at {ceilings.gemm_gop_s.median:.0f}."
    )


def _batch_bound(taken: dict[int, Spread]) -> str:
    sizes: Sequence[int] = [*taken]
    gains = ", ".join(f"{n * taken[sizes[0]].median / sizes[0] / taken[n].median:.1f} times for {n}" for n in sizes[1:])
    return (
        f"Tokens a second of all together grow {gains}: weights are read once for all, arithmetic and each "
        "sequence's own cache grow with the batch."
    )


def _image_bound(towers: dict[int, Spread], asked: dict[int, Spread]) -> str:
    if not towers:
        return "Not measured: an image does not fit the context."
    each = ", ".join(f"{s.median / n:.3g} s ({n} in a pass)" for n, s in towers.items())
    most = max(towers)
    share = towers[most].median / (towers[most].median + asked[most].median)
    return (
        f"Arithmetic: the visual tower takes {each} for each image, {share:.0%} of the time at {most}; the rest is "
        "the prefill of what the images become."
    )


def _language_parameters(engine: Engine) -> int:
    c = engine.config
    return c.num_hidden_layers * (4 * c.hidden_size**2 + 3 * c.hidden_size * c.ffn_width)
