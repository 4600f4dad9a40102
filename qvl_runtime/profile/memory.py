"""Peak memory as the model's authors measured it: encoding 2048 tokens, and generating 8192.

Their table, measured with the original code on an A100-SXM4-80G and read as GiB: BF16 22.60 and 28.01, Int4 11.82 and
17.23. On a GPU this is device memory; on a CPU, the resident memory of the whole process, Python and torch included.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from qvl_runtime.engine.engine import Engine
from qvl_runtime.engine.estimate import planned_peak
from qvl_runtime.host import peak_memory, reset_peak_memory
from qvl_runtime.profile import steps
from qvl_runtime.profile.speed import weight_format
from qvl_runtime.schedule.api import SamplingParams

ENCODED, GENERATED = 2048, 8192  # tokens
PUBLISHED = {
    ("bf16", "encode"): 22.60,
    ("bf16", "generate"): 28.01,
    ("int4", "encode"): 11.82,
    ("int4", "generate"): 17.23,
}
GIB = 2**30


@dataclass(frozen=True, slots=True)
class Case:
    """Peak memory of one of the two published cases, or of loading the model before them; bytes."""

    name: str  # "load", "encode" or "generate"
    tokens: int
    peak: int
    planned: int | None  # what `qvl plan` estimates; None for loading
    published_gib: float | None  # of the original code, on an A100-80G
    how: str  # what was run


@dataclass(frozen=True, slots=True)
class MemoryReport:
    """Peak memory of a model; bytes."""

    weights: str  # "int4", "bf16", ...
    counted: str  # which memory the peaks measure
    base: int  # of the process before the model was loaded
    parts: dict[str, int]  # weights in memory, by part of the model
    kv_per_token: int
    cases: tuple[Case, ...]
    notes: tuple[str, ...]


def profile_memory(
    open_engine: Callable[[], Engine], base: int, progress: Callable[[str], None] = lambda task: None
) -> MemoryReport:
    """Load the model and run both cases. Needs a fresh process: an earlier, higher peak would hide these.

    base: bytes that the process holds without the model (`process.process_bytes`). If the context is shorter than a
    case, the case is shortened to it, with a note.
    """
    progress("load")
    reset_peak_memory()
    engine = open_engine()
    device, cache = engine.core.runner.model.device, engine.core.runner.cache
    cases = [Case("load", 0, peak_memory(device), None, None, "")]
    process_bytes = base if device.type == "cpu" else 0
    max_tokens = min(engine.max_model_len, cache.num_slots)
    kv_tokens = prompt_tokens = images = 0
    notes = []
    weights = weight_format(engine)
    full_size = (engine.config.num_hidden_layers, engine.config.hidden_size) == (32, 4096)
    for name, published_tokens, run in (("encode", ENCODED, encode), ("generate", GENERATED, generate)):
        tokens = min(published_tokens, max_tokens - (name == "encode"))  # encoding leaves room for an answer
        if tokens < published_tokens:
            notes.append(f"{name}: {tokens} tokens instead of {published_tokens}, the limit of context and KV cache")
        progress(f"{name} {tokens} tokens")
        reset_peak_memory(device)
        how = run(engine, tokens)
        if name == "encode":
            prompt_tokens, images = tokens, int(includes_image(engine, tokens))
        # A CPU allocates the cache's pages when they are written and keeps them; the last token is never written.
        kv_tokens = cache.num_slots if device.type != "cpu" else min(cache.num_slots, kv_tokens + tokens)
        planned = planned_peak(engine, kv_tokens, prompt_tokens, images, process_bytes)
        published = PUBLISHED.get((weights, name)) if full_size else None
        cases.append(Case(name, tokens, peak_memory(device), planned, published, how))
    counted = "memory that torch allocated on the device" if device.type == "cuda" else "resident memory of the process"
    return MemoryReport(
        weights,
        counted,
        base,
        dict(engine.core.runner.model.bytes_by_part),
        cache.bytes_per_token,
        tuple(cases),
        tuple(notes),
    )


def includes_image(engine: Engine, tokens: int) -> bool:
    """Whether a prompt of `tokens` tokens has an image: if that leaves room for text."""
    return tokens > engine.config.visual.span


def encode(engine: Engine, tokens: int) -> str:
    """Answer a prompt of `tokens` tokens, an image and text, with one token; no text token repeats if they suffice."""
    visual = engine.config.visual
    image = torch.randint(0, 256, (visual.image_size, visual.image_size, 3), dtype=torch.uint8).numpy()
    opening = [visual.image_start_id, visual.image_end_id] if includes_image(engine, tokens) else []
    count = tokens - (visual.span if opening else 0)
    text = [i * visual.image_start_id // count for i in range(count)]  # each reads its own page of the embedding
    images = [image] if opening else []
    engine.generate([{"token_ids": opening + text, "images": images}], SamplingParams(max_tokens=1, temperature=0.0))
    return "one image and text, computed" if opening else "text, computed"


def generate(engine: Engine, tokens: int) -> str:
    """Run the last steps of an answer that fills the KV cache up to `tokens`."""
    steps.decode(engine, [tokens - 1], rounds=1)
    return "KV cache written up to the last token, then two steps"
