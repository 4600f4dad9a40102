"""Everything about the GPU path that can be checked and measured, in one command and under ten minutes.

    python -m benchmarks.gpu_suite --out out/gpu [--golden FOLDER] [--only correct,graphs] [--budget 570]

On a CUDA machine: every kernel against its definition, whole models against float32, the same tokens with graphs and
without, GB/s and percent of a copy, the documented table with the full-size model, 1 to 64 requests together, and
compute-sanitizer where it is installed. Without one the same runs in Triton's interpreter at tiny sizes, whose times
say nothing, and what is worth reading are the computed bounds. Writes suite.json and suite.md; exits with 1 where
something was wrong.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu.place import Place

Row = dict[str, Any]
Parts = dict[str, Callable[[], Iterable[Row]]]


def parts_of(place: Place, golden: Path | None) -> Parts:
    """The parts by name, the ones that say whether it is right first."""
    from benchmarks.gpu import bounds, kernels, models, table

    ceiling: list[float] = []

    def measured() -> float:
        if not ceiling:
            ceiling.append(place.copy_ceiling())
        return ceiling[0]

    def copy() -> Iterator[Row]:
        rate = measured()
        yield {"copy_gb_s": rate / 1e9, "of_peak": rate / place.peak if place.peak else None}

    return {
        "bounds": bounds.bounds,
        "launches": lambda: launches(place),
        "correct": lambda: kernels.correct(place),
        "goldens": lambda: models.goldens(place, golden),
        "graphs": lambda: models.graphs(place),
        "ceiling": copy,
        "speed": lambda: kernels.speed(place, measured()),
        "int4": lambda: table.table(place, "int4"),
        "bf16": lambda: table.table(place, "bf16"),
        "sanitizer": lambda: sanitizer(place),
    }


def launches(place: Place) -> Iterator[Row]:
    """Counted in a process of its own, whose launches are noted and not run."""
    command = [sys.executable, "-m", "benchmarks.gpu.launches", "--json", *["--quarter"] * place.tiny]
    counted = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    if counted.returncode:
        raise RuntimeError(f"{' '.join(command[1:])} failed: {counted.stderr.strip().splitlines()[-1:]}")
    yield from json.loads(counted.stdout)


def sanitizer(place: Place) -> Iterator[Row]:
    """The kernels at their odd sizes under memcheck, where it is installed."""
    tool = shutil.which("compute-sanitizer")
    if place.tiny or tool is None:
        yield {"tool": "memcheck", "ran": False, "note": "no GPU" if place.tiny else "compute-sanitizer is not in PATH"}
        return
    command = [tool, "--error-exitcode", "9", sys.executable, "-m", "benchmarks.gpu_suite", "--only", "correct"]
    found = subprocess.run([*command, "--out", "out/sanitized"], capture_output=True, text=True, check=False)
    summary = [line for line in found.stdout.splitlines() if "ERROR SUMMARY" in line]
    yield {"tool": "memcheck", "ran": True, "note": "; ".join(summary), "right": found.returncode == 0}


def run(parts: Parts, deadline: float) -> tuple[dict[str, list[Row]], list[str]]:
    """The rows of each part, and what was left out for lack of time or went wrong, which stops no other part."""
    found: dict[str, list[Row]] = {}
    notes: list[str] = []
    for name, part in parts.items():
        began = time.perf_counter()
        if began > deadline:
            notes.append(f"{name} was left out: the time is over (--budget)")
            continue
        rows = found.setdefault(name, [])
        try:
            for row in part():
                rows.append(row)
                print(json.dumps({"part": name, **row}), flush=True)
        except Exception as fault:  # said in the report and in the exit code
            notes.append(f"{name} FAILED after {len(rows)} rows: {type(fault).__name__}: {fault}")
            rows.append({"failed": str(fault), "right": False})
        print(f"# {name}: {time.perf_counter() - began:.1f} s", file=sys.stderr)
    return found, notes


def setting(place: Place) -> Row:
    """Where and when this ran."""
    import torch

    from qvl_kernels import report
    from qvl_runtime.host import device_name

    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "commit": git.stdout.strip(),
        "device": device_name(place.device),
        "torch": torch.__version__,
        "python": platform.python_version(),
        **report(place.device),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/gpu"))
    parser.add_argument("--golden", type=Path, help="what the original computes: tiny/, lm_*.safetensors")
    parser.add_argument("--only", help="parts, separated by commas")
    parser.add_argument("--budget", type=float, default=570, help="seconds after which no part begins")
    asked = parser.parse_args(arguments)
    place = Place.find()
    parts = parts_of(place, asked.golden)
    wanted = asked.only.split(",") if asked.only else [*parts]
    unknown = [name for name in wanted if name not in parts]
    if unknown:
        parser.error(f"there is no part {unknown[0]!r}; there are {', '.join(parts)}")
    deadline = time.perf_counter() + asked.budget
    found, notes = run({name: parts[name] for name in wanted}, deadline)
    if place.tiny:
        notes.insert(0, "There is no GPU here: tiny sizes in Triton's interpreter, and no time below is a figure.")
    from benchmarks.gpu.page import page

    said = setting(place)
    asked.out.mkdir(parents=True, exist_ok=True)
    (asked.out / "suite.json").write_text(json.dumps({"setting": said, "notes": notes, "parts": found}, indent=1))
    (asked.out / "suite.md").write_text(page(said, found, notes))
    print(f"# written to {asked.out}", file=sys.stderr)
    wrong = [row for rows in found.values() for row in rows if row.get("right") is False]
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
