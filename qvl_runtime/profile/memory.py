"""Peak memory as the model's authors measured it: encoding 2048 tokens, and generating 8192.

Their table, on an A100-SXM4-80G with the original code, read as GiB: BF16 22.60 and 28.01, Int4 11.82 and 17.23. Device
memory on a GPU; on a CPU the resident memory of the whole process, Python and torch included.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from qvl_runtime.engine.engine import Engine
from qvl_runtime.host import peak_memory, reset_peak_memory
from qvl_runtime.plan.gpus import Machine
from qvl_runtime.plan.plan import Load, Plan, choices_of
from qvl_runtime.profile import steps
from qvl_runtime.profile.speed import kind_of
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
    """One of the two published cases, or the loading that comes before them. Bytes."""

    name: str  # "load", "encode" or "generate"
    tokens: int
    peak: int
    planned: int | None  # what `qvl plan` reckons for it; None for loading
    published_gib: float | None  # of the original, on a GPU
    how: str


@dataclass(frozen=True, slots=True)
class MemoryReport:
    weights: str
    counted: str  # what the peaks are of
    base: int  # before the model was loaded
    parts: dict[str, int]  # bytes of the weights as they are held
    kv_per_token: int
    cases: tuple[Case, ...]
    notes: tuple[str, ...]


def profile_memory(
    open_engine: Callable[[], Engine], base: int, progress: Callable[[str], None] = lambda what: None
) -> MemoryReport:
    """Load the model and run both cases; a process of its own, since a peak that was reached before stays.

    base: what the process holds beside it (`plan_report.process_bytes`). Where the context is shorter than a case, the
    case is as long as the context, and says so.
    """
    progress("load")
    reset_peak_memory()
    engine = open_engine()
    device, cache = engine.loop.runner.model.device, engine.loop.runner.cache
    cases = [Case("load", 0, peak_memory(device), None, None, "")]
    plan, machine = plan_of(engine), Machine("", 0, None, base if device.type == "cpu" else 0)
    longest, load = min(engine.max_model_len, cache.num_slots), Load(0, 0)
    notes = []
    kind = kind_of(engine)
    full_size = (engine.config.num_hidden_layers, engine.config.hidden_size) == (32, 4096)
    for name, wanted, run in (("encode", ENCODED, encode), ("generate", GENERATED, generate)):
        tokens = min(wanted, longest - 1 if name == "encode" else longest)  # encoding leaves room for an answer
        if tokens < wanted:
            notes.append(f"{name}: {tokens} tokens in place of {wanted}, which is what context and KV cache hold")
        progress(f"{name} {tokens} tokens")
        reset_peak_memory(device)
        how = run(engine, tokens)
        if name == "encode":
            load = Load(0, tokens, int(with_image(engine, tokens)))
        # A CPU brings in the cache's pages as they are written, and they stay. The last token of each is only chosen.
        written = cache.num_slots if device.type != "cpu" else min(cache.num_slots, load.tokens + tokens)
        load = load._replace(tokens=written)
        planned = plan.peak(load, machine).total
        cases.append(
            Case(name, tokens, peak_memory(device), planned, PUBLISHED.get((kind, name)) if full_size else None, how)
        )
    counted = "memory that torch allocated on the device" if device.type == "cuda" else "resident memory of the process"
    return MemoryReport(
        kind,
        counted,
        base,
        dict(engine.loop.runner.model.bytes_by_part),
        cache.bytes_per_token,
        tuple(cases),
        tuple(notes),
    )


def plan_of(engine: Engine) -> Plan:
    """The plan of what runs, as the engine made it before it loaded; synthetic weights are all in memory."""
    asked, model = engine.engine_config, engine.loop.runner.model
    choices = choices_of(engine.folder, str(model.dtype).removeprefix("torch."), asked.precision, asked.kv_dtype)
    if asked.synthetic is not None:
        choices = replace(choices, mapped=())
    choices = replace(choices, step_tokens=asked.max_step_tokens, embedding_on_host=asked.embedding_on_host)
    return Plan(engine.config, choices, model.device.type)


def with_image(engine: Engine, tokens: int) -> bool:
    """Whether an image is among so many tokens that are encoded: where it leaves room for text."""
    return tokens > engine.config.visual.span


def encode(engine: Engine, tokens: int) -> str:
    """An image and text, `tokens` in all, and one token of an answer; no word comes twice where there are enough."""
    visual = engine.config.visual
    image = torch.randint(0, 256, (visual.image_size, visual.image_size, 3), dtype=torch.uint8).numpy()
    opening = [visual.image_start_id, visual.image_end_id] if with_image(engine, tokens) else []
    words = tokens - (visual.span if opening else 0)
    text = [i * visual.image_start_id // words for i in range(words)]  # each brings in its own page of the embedding
    images = [image] if opening else []
    engine.generate([{"token_ids": opening + text, "images": images}], SamplingParams(max_tokens=1, temperature=0.0))
    return "one image and text, computed" if opening else "text, computed"


def generate(engine: Engine, tokens: int) -> str:
    """The last steps of an answer that fills the KV cache up to `tokens`."""
    steps.decode(engine, [tokens - 1], rounds=1)
    return "KV cache written up to the last token, then two steps"
