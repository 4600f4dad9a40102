"""The parts of the suite by name; each yields rows, and keeps those it has if a later measurement fails."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu.place import Place

Row = dict[str, Any]
Parts = dict[str, Callable[[], Iterable[Row]]]
# Seconds of each part on an H100, in the order in which they run: estimates, none measured as it is now. Full-size
# engines took 10 to 13 s to make on 2026-11-26, and 456 kernels 29 s to compile in 14 processes; the rest is counted
# from engines, launches and repetitions. A part that takes three times as long is cut off after a row, so that the
# others get their turn.
EXPECTED = {
    "bounds": 1, "compile": 55, "ceiling": 2, "correct": 12, "graphs": 10, "goldens": 5, "linears": 17, "small": 2,
    "int4": 23, "bf16": 26, "tower": 7, "variants": 18, "int4-options": 23, "head": 5, "speed": 9, "eager": 5,
    "launches": 5, "sanitizer": 300, "targets": 1,
}  # fmt: skip
PATIENCE = 3


def parts_of(place: Place, golden: Path | None, so_far: Callable[[], Mapping[str, list[Row]]]) -> Parts:
    """The parts in the order in which they are worth having if time runs out.

    so_far: returns the rows of the parts that have run.
    """
    from benchmarks.gpu import bounds, compiling, kernels, linears, models, small, targets, tower, variants

    measured: list[float] = []

    def ceiling() -> float:
        if not measured:
            measured.append(place.read_ceiling())
        return measured[0]

    return {
        "bounds": bounds.bounds,
        "compile": lambda: compiling.compiled(place),
        "ceiling": lambda: ceilings(place),
        "correct": lambda: kernels.correct(place),
        "graphs": lambda: models.graphs(place),
        "goldens": lambda: models.goldens(place, golden),
        "linears": lambda: linears.linears(place, ceiling()),
        "small": lambda: small.small_kernels(place),
        "int4": full_size(place, "int4"),
        "bf16": full_size(place, "bf16"),
        "tower": lambda: tower.tower(place, ceiling()),
        "variants": lambda: variants.variants(place),
        "int4-options": full_size(place, "int4-options"),
        "head": lambda: linears.head(place, ceiling()),
        "speed": lambda: kernels.speed(place, ceiling()),
        "eager": lambda: eager(place),
        "launches": launches,
        "sanitizer": lambda: sanitizer(place),
        "targets": lambda: targets.targets(so_far()),
    }


def ceilings(place: Place) -> Iterator[Row]:
    """What a large copy and a large read move, as shares of the data sheet's bandwidth."""
    for what, rate in (("copy", place.copy_ceiling()), ("read", place.read_ceiling())):
        yield {"ceiling": what, "gb_s": rate / 1e9, "of_peak": rate / place.peak if place.peak else None}


def full_size(place: Place, kind: str) -> Callable[[], Iterator[Row]]:
    """The measurements of an engine; one that fails leaves a row that says so, and the others run."""

    def rows() -> Iterator[Row]:
        from benchmarks.gpu.models import kernels_variable

        with kernels_variable("reference" if place.tiny else None):  # other parts run models in the interpreter
            yield from _measured(place, kind)
        place.settle()

    return rows


def _measured(place: Place, kind: str) -> Iterator[Row]:
    from benchmarks.gpu import step, table
    from benchmarks.gpu.asking import WARMED, finish, submit, text
    from benchmarks.gpu.engines import LONGEST, make_engine

    began = time.perf_counter()
    engine = make_engine(place, kind, 64 if place.tiny else LONGEST)
    submit(engine, [text(WARMED, 0)], 2)  # compiles what the warm-up did not
    finish(engine)
    yield {"what": "ready", "model": kind, "seconds": time.perf_counter() - began}
    for measure in (table.speeds, table.first_tokens, step.steps, table.throughput):
        try:
            yield from measure(place, engine, kind)
        except Exception as fault:  # reported in the row and by the exit status
            yield {"what": measure.__name__, "failed": f"{type(fault).__name__}: {fault}", "right": False}
            if context_lost(fault):
                raise


def eager(place: Place) -> Iterator[Row]:
    """The same model in plain torch, op by op, in BF16: the package's reference ops on the GPU.

    Its blocks share their weights, of 0.4 GB, so that it is made in a second; a step reads as much as with others.
    """
    from benchmarks.gpu.asking import text, tokens_per_second
    from benchmarks.gpu.engines import make_engine
    from benchmarks.gpu.models import kernels_variable

    with kernels_variable("reference"):
        engine = make_engine(place, "bf16", 64 if place.tiny else 1024, repeat_blocks=not place.tiny)
        context, tokens = (3, 2) if place.tiny else (512, 12)
        yield {
            "model": "bf16, plain torch",
            "context": context,
            "tok_s": tokens_per_second(engine, [text(context, 0)], tokens),
        }
    del engine
    place.settle()


def launches() -> Iterator[Row]:
    """Count launches in another process, which records launches and does not run them."""
    command = [sys.executable, "-m", "benchmarks.gpu.launches", "--json"]
    counted = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    if counted.returncode:
        raise RuntimeError(f"{' '.join(command[1:])} failed: {counted.stderr.strip().splitlines()[-1:]}")
    yield from json.loads(counted.stdout)


def sanitizer(place: Place) -> Iterator[Row]:
    """Run the kernels at odd sizes under memcheck, if it is installed; only when asked for, as it takes minutes."""
    tool = shutil.which("compute-sanitizer")
    if place.tiny or tool is None:
        yield {"tool": "memcheck", "ran": False, "note": "no GPU" if place.tiny else "compute-sanitizer is not in PATH"}
        return
    command = [tool, "--error-exitcode", "9", sys.executable, "-m", "benchmarks.gpu.suite", "--only", "correct"]
    checked = subprocess.run([*command, "--out", "out/sanitized"], capture_output=True, text=True, check=False)
    summary = [line for line in checked.stdout.splitlines() if "ERROR SUMMARY" in line]
    yield {"tool": "memcheck", "ran": True, "note": "; ".join(summary), "right": checked.returncode == 0}


def context_lost(fault: BaseException) -> bool:
    """Whether no further call of this process will reach the GPU."""
    text = f"{type(fault).__name__} {fault}"
    return any(sign in text for sign in ("CUDA error", "AcceleratorError", "illegal memory", "device-side assert"))
