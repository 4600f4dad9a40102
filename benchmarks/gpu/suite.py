"""Check and measure the whole GPU path in one command and under ten minutes.

    python -m benchmarks.gpu.suite --out out/gpu [--golden FOLDER] [--only correct,graphs] [--budget 570]

On a CUDA machine: every kernel against its definition, whole models against float32, the same tokens with graphs and
without, GB/s and percent of a copy, the documented table with the full-size model, 1 to 64 requests together, and
compute-sanitizer where it is installed. Without a GPU the same parts run in Triton's interpreter at tiny sizes; their
times mean nothing, but the computed bounds do. Writes suite.json and suite.md; exits with 1 if any check failed.
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
    """The parts by name, correctness first."""
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
    """Count launches in another process, which records launches and does not run them."""
    command = [sys.executable, "-m", "benchmarks.gpu.launches", "--json", *["--quarter"] * place.tiny]
    counted = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    if counted.returncode:
        raise RuntimeError(f"{' '.join(command[1:])} failed: {counted.stderr.strip().splitlines()[-1:]}")
    yield from json.loads(counted.stdout)


def sanitizer(place: Place) -> Iterator[Row]:
    """Run the kernels at odd sizes under memcheck, if it is installed."""
    tool = shutil.which("compute-sanitizer")
    if place.tiny or tool is None:
        yield {"tool": "memcheck", "ran": False, "note": "no GPU" if place.tiny else "compute-sanitizer is not in PATH"}
        return
    command = [tool, "--error-exitcode", "9", sys.executable, "-m", "benchmarks.gpu.suite", "--only", "correct"]
    checked = subprocess.run([*command, "--out", "out/sanitized"], capture_output=True, text=True, check=False)
    summary = [line for line in checked.stdout.splitlines() if "ERROR SUMMARY" in line]
    yield {"tool": "memcheck", "ran": True, "note": "; ".join(summary), "right": checked.returncode == 0}


def run(parts: Parts, deadline: float) -> tuple[dict[str, list[Row]], list[str]]:
    """Run the parts; returns their rows, and notes on skipped or failed ones. A failure stops no other part."""
    rows_by_part: dict[str, list[Row]] = {}
    notes: list[str] = []
    for name, part in parts.items():
        began = time.perf_counter()
        if began > deadline:
            notes.append(f"{name} was skipped: the time budget is used up (--budget)")
            continue
        rows = rows_by_part.setdefault(name, [])
        try:
            for row in part():
                rows.append(row)
                print(json.dumps({"part": name, **row}), flush=True)
        except Exception as fault:  # reported in the notes and by the exit status
            notes.append(f"{name} FAILED after {len(rows)} rows: {type(fault).__name__}: {fault}")
            rows.append({"failed": str(fault), "right": False})
        print(f"# {name}: {time.perf_counter() - began:.1f} s", file=sys.stderr)
    return rows_by_part, notes


def environment(place: Place) -> Row:
    """Date, commit, device and versions of this run."""
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
    """Run the suite; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/gpu"))
    parser.add_argument("--golden", type=Path, help="what the original computes: tiny/, lm_*.safetensors")
    parser.add_argument("--only", help="parts, separated by commas")
    parser.add_argument("--budget", type=float, default=570, help="start no part after this many seconds")
    options = parser.parse_args(arguments)
    place = Place.find()
    parts = parts_of(place, options.golden)
    selected = options.only.split(",") if options.only else [*parts]
    unknown = [name for name in selected if name not in parts]
    if unknown:
        parser.error(f"there is no part {unknown[0]!r}; there are {', '.join(parts)}")
    deadline = time.perf_counter() + options.budget
    rows_by_part, notes = run({name: parts[name] for name in selected}, deadline)
    if place.tiny:
        notes.insert(0, "There is no GPU here: tiny sizes in Triton's interpreter, and no time below is a figure.")
    from benchmarks.gpu.page import page

    setting = environment(place)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "suite.json").write_text(
        json.dumps({"setting": setting, "notes": notes, "parts": rows_by_part}, indent=1)
    )
    (options.out / "suite.md").write_text(page(setting, rows_by_part, notes))
    print(f"# written to {options.out}", file=sys.stderr)
    wrong = [row for rows in rows_by_part.values() for row in rows if row.get("right") is False]
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
