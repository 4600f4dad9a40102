"""One model in one process: its speed, its growth and its memory as JSON, for `benchmarks.report` to put together."""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qvl_runtime import Engine
from qvl_runtime.engine.engine import NANO
from qvl_runtime.profile.growth import growth
from qvl_runtime.profile.jsonable import jsonable
from qvl_runtime.profile.memory import profile_memory
from qvl_runtime.profile.process import process_bytes
from qvl_runtime.profile.run_info import RunInfo
from qvl_runtime.profile.speed import LENGTHS, profile_speed

ROOT = Path(__file__).resolve().parents[2]
NANO_INT4 = ROOT / "qvl_runtime" / "nano_int4"


@dataclass(frozen=True, slots=True)
class Model:
    """A model to measure: options of `Engine`, and which figures."""

    label: str
    options: dict[str, Any]
    curves: bool = False  # also how cost grows
    memory_gib: float = 0.0  # that it needs; skipped where the machine has less
    note: str = ""
    batches: tuple[int, ...] = (1, 2, 4, 8)
    lengths: tuple[int, ...] = field(default=LENGTHS)


FULL = {"max_model_len": 8448, "kv_cache_bytes": 4352 * 2**20}  # 8192 tokens and what a batch needs
MODELS = {
    model.label: model
    for model in (
        Model("nano", {}, curves=True),
        Model("nano Int4, fast", {"model": str(NANO_INT4), "precision": "fast"}),
        Model(
            "full-size Int4, fast",
            {"synthetic": "qwen-vl-chat-int4", "precision": "fast", **FULL},
            curves=True,
            memory_gib=14,
        ),
        Model("full-size Int4, exact", {"synthetic": "qwen-vl-chat-int4", **FULL}, memory_gib=16),
        Model(
            "full-size BF16",
            {"synthetic": "qwen-vl-chat", "repeat_blocks": True, **FULL},
            memory_gib=10,
            batches=(1, 8),
            note="all blocks share the memory of one, so its peak memory is not that of the model: see `qvl plan`",
        ),
    )
}
QUICK = ("nano",)
AGAIN_S = 3.0  # a later pass goes along a curve until a point takes longer


def gather(model: Model, quick: bool, again: bool = False) -> dict[str, Any]:
    """Memory from one engine; speed and growth from another, after the first is gone.

    again: a later pass, which leaves out memory, the same in each, and the long ends of curves.
    """

    def progress(what: str) -> None:
        print(f"{model.label}: {what}", file=sys.stderr, flush=True)

    memory = None
    if not again and not model.options.get("repeat_blocks"):  # first, while the process holds nothing else
        options = model.options
        folder = Path(options.get("model", NANO))
        base = process_bytes(folder, options.get("dtype", "auto"), options.get("synthetic"))
        memory = jsonable(profile_memory(lambda: Engine(**options), base, progress))
        gc.collect()
    engine = Engine(**model.options)
    lengths = LENGTHS[:1] if quick else model.lengths
    batches = model.batches[:2] if quick else model.batches
    speed = profile_speed(engine, 8 if quick else None, lengths, batches, 3 if quick else 5, progress)
    curves = growth(engine, speed.ceilings, quick, progress, AGAIN_S if again else math.inf) if model.curves else []
    return {
        "label": model.label,
        "options": portable_options(model.options),
        "note": model.note,
        "summary": engine.summary(),
        "kernels": engine.report()["kernels"],
        "machine": jsonable(RunInfo.collect(engine.core.runner.model.device)),
        "speed": jsonable(speed),
        "growth": jsonable(curves),
        "memory": memory,
    }


def portable_options(options: dict[str, Any]) -> dict[str, Any]:
    """The options with the path of a shipped checkpoint relative to the checkout."""
    model = options.get("model")
    return options | ({"model": str(Path(model).relative_to(ROOT))} if model else {})


def main() -> None:
    """Print one model's figures as one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("label", choices=MODELS)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--again", action="store_true", help="a later pass: without memory and the long ends of curves")
    args = parser.parse_args()
    print(json.dumps(gather(MODELS[args.label], args.quick, args.again)))


if __name__ == "__main__":
    main()
