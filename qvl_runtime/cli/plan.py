"""What `qvl plan` says: the needs of a checkpoint on this machine or a named GPU, as a table or as JSON."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvl_runtime.cli.terminal import print_table, size
from qvl_runtime.plan.gpus import Machine, gpu
from qvl_runtime.plan.plan import Choices, Load, Peak, Plan, choices_of, ways_to_fit
from qvl_runtime.weights.loader import model_config
from qvl_runtime.weights.manifest import is_converted

if TYPE_CHECKING:
    from rich.table import Table

CONTEXTS = (300, 2048, 8192)
READ_AT_ONCE = 256 << 20  # bytes: more than any cache
READ_FOR = 0.25  # seconds
DOCUMENTED = {"encode 2048": Load(2049, 2048), "generate 8192": Load(8193, 1)}


def plan_of(folder: Path, gpu_name: str | None, choices: Choices, measure: bool = True) -> dict[str, Any]:
    """The plan of a checkpoint folder as plain values; bytes, tokens a second."""
    config = model_config(folder)
    if is_converted(folder):  # what it holds is decided
        held = choices_of(folder, choices.dtype)
        choices = replace(choices, vision=held.vision, head=held.head)
    plan = Plan(config, choices, "cpu" if gpu_name is None else "cuda")
    machine = this_machine(folder, choices.dtype, measure) if gpu_name is None else gpu(gpu_name)
    loads = dict(DOCUMENTED) | {"all, 8 images": Load(config.context_limit, config.context_limit, 8)}
    room = plan.room(machine)
    return {
        "model": str(folder),
        "machine": machine._asdict(),
        "dtype": plan.dtype,
        "weights": plan.weights,
        "weights_total": sum(plan.weights.values()),
        "kv_per_token": plan.kv_per_token,
        "kv_per_image": plan.kv_per_image,
        "features_per_image": plan.feature_bytes,
        "fits": {"tokens": room.tokens, "images": room.images},
        "peaks": {name: _peak(plan, load, machine) for name, load in loads.items()},
        "speed_bounds": {str(n): plan.bound_tokens_per_s(machine, n) for n in CONTEXTS},
    }


def show(plan: dict[str, Any]) -> None:
    """The plan as lines and a table; a line breaks between words where standard output is a terminal."""
    from rich.console import Console

    console, machine = Console(highlight=False, markup=False, soft_wrap=not sys.stdout.isatty()), plan["machine"]
    parts = ", ".join(f"{name} {size(count)}" for name, count in plan["weights"].items() if count)
    console.print(f"weights   {size(plan['weights_total'])} in {plan['dtype']}: {parts}")
    console.print(
        f"KV cache  {size(plan['kv_per_token'])} a token; an image takes {size(plan['kv_per_image'])} there and "
        f"{size(plan['features_per_image'])} of features"
    )
    fits = plan["fits"]
    console.print(
        f"fits      {machine['name']} ({size(machine['memory'])}): {fits['tokens']:,} tokens, or {fits['images']:,} "
        "images with their tokens"
    )
    print_table(peak_table(plan["peaks"]))
    if any(plan["speed_bounds"].values()):
        said = ", ".join(f"{rate:,.1f} at {n} tokens" for n, rate in plan["speed_bounds"].items() if rate)
        console.print(f"speed     at most, by bytes a token over memory bandwidth: {said} (a bound, not a forecast)")


def peak_table(peaks: dict[str, dict[str, Any]]) -> Table:
    """What each load takes at its peak, and whether it fits."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table("peak", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for name in ("weights", "KV", "features", "work", "rest", "total"):
        table.add_column(name, justify="right")
    table.add_column("")
    for name, peak in peaks.items():
        held = sum(peak[part] for part in ("vision", "language", "embedding", "head"))
        cells = [size(n) for n in (held, *(peak[p] for p in ("kv", "features", "workspace", "reserved", "total")))]
        table.add_row(name, *cells, "fits" if peak["fits"] else f"too large; {peak['way_out']}")
    return table


def show_json(plan: dict[str, Any]) -> None:
    print(json.dumps(plan, ensure_ascii=False, indent=2))


def this_machine(folder: Path, dtype: str, measure: bool = True) -> Machine:
    """This computer: the memory that can be had, how fast it is read, what this process takes beside a checkpoint."""
    import torch

    from qvl_runtime.host import device_name, free_memory

    base = process_bytes(folder, dtype)
    return Machine(
        device_name(torch.device("cpu")),
        free_memory(torch.device("cpu")) + base,
        read_bandwidth() if measure else None,
        base,
    )


def process_bytes(folder: Path, dtype: str = "auto", synthetic: str | None = None) -> int:
    """Bytes that a process holds beside a folder's model, once one has run in it; 0 where the system does not tell.

    Measured, by running the small checkpoint that comes along once and letting go of it: of 250 MiB a part is code that
    is read in when it is first called, so that importing torch alone says 30 MiB less. In the model's dtype, since
    float32 calls other GEMMs; and where packed weights are laid out at load, which calls 8 MiB of torch's code that
    nothing else does, its Int4 sibling. What was compiled for the shapes of this model is taken off, as another has its
    own. The folder's tokenizer is there: the published one takes 59 MiB. synthetic: weights that are run in its place.
    """
    import gc

    import numpy as np

    from qvl_runtime.engine.engine import NANO, Engine
    from qvl_runtime.formats.host_memory import trim_heap
    from qvl_runtime.host import resident_memory
    from qvl_runtime.prompt.tokenizer import VOCABULARY_FILE, Tokenizer
    from qvl_runtime.schedule.api import SamplingParams
    from qvl_runtime.weights.synthetic import synthetic_config

    config, lies_ready = model_config(folder), synthetic is None and is_converted(folder)
    if synthetic is not None:
        config = synthetic_config(synthetic, config)
    dtype = config.dtype if dtype == "auto" else dtype
    packs = config.quantization is not None and not lies_ready
    small, precision = (NANO.with_name("nano_int4"), "fast") if packs else (NANO, "exact")
    engine = Engine(small, device="cpu", dtype=dtype, precision=precision, max_model_len=1024, kv_cache_bytes=8 << 20)
    asked = engine.encode([{"image": np.zeros((32, 32, 3), np.uint8)}, {"text": "What is it?"}])
    request = engine.submit(asked, SamplingParams(max_tokens=4, temperature=0))
    while not request.done:
        engine.loop.step()
    own = Plan(engine.config, choices_of(small, dtype, precision)).compiled(Load(0, len(asked.prompt.token_ids), 1))
    del engine, request, asked
    tokenizer = Tokenizer.from_folder(folder) if (folder / VOCABULARY_FILE).is_file() else None
    gc.collect()
    trim_heap()
    there = resident_memory()
    del tokenizer
    return max(0, there - own)


def read_bandwidth() -> float:
    """Bytes a second that this CPU reads from memory at best: a quarter of a second of it, after a first pass."""
    import time

    import torch

    from qvl_kernels.bandwidth import reader

    read, nbytes, _ = reader(torch.device("cpu"), READ_AT_ONCE)
    read()
    best, end = 0.0, time.perf_counter() + READ_FOR
    while (began := time.perf_counter()) < end:
        read()
        best = max(best, nbytes / (time.perf_counter() - began))
    return best


def _peak(plan: Plan, load: Load, machine: Machine) -> dict[str, Any]:
    peak: Peak = plan.peak(load, machine)
    ways = ways_to_fit(plan, load, machine)
    fits = peak.total <= machine.memory
    way_out = ways[0][0] if ways else "a larger machine" if not fits else None
    return {**peak._asdict(), "total": peak.total, "fits": fits, "way_out": way_out}
