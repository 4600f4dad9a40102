"""Check and measure the whole GPU path in one command: by estimate less than four minutes on an H100.

    python -m benchmarks.gpu.suite --out out/gpu [--golden FOLDER] [--only correct,graphs] [--budget 230]

It runs from a bare checkout (PYTHONPATH=kernels:.), without a network. On a CUDA machine: compile every kernel in
parallel processes; every kernel against its definition, whole models against float32, the same tokens with graphs and
without; the linears of a layer and the head against tinygemm and cuBLAS; the documented table, times to first token, a
decode step kernel by kernel and 1 to 64 requests together for Int4, BF16 and Int4 with every option; the vision
encoder, the whole and its parts; one way against another, such as dependent launches on and off; plain torch; every
kernel's GB/s; and which targets are met. Kernels are timed by CUDA graphs over inputs that rotate through a cold L2.

Each row is printed and kept in OUT/suite.jsonl as it comes. A part that fails, or takes three times its seconds, stops
no other, and where the GPU is lost the rest runs in a new process. A second run leaves out the parts that are done
(--again: none). --resume names the suite.jsonl of another folder. Writes suite.json and suite.md as well; exits with 1
if any check failed.

Without a GPU the same parts run in Triton's interpreter at tiny sizes; their times mean nothing, but the computed
bounds do. Or, with --dry-run, at full size on a GPU that is pretended: every line runs that would on an H100, and every
kernel is bound to its arguments, or compiled too, but nothing is computed.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks.gpu.journal import Journal
from benchmarks.gpu.page import page
from benchmarks.gpu.parts import EXPECTED, PATIENCE, Parts, Row, context_lost, parts_of
from benchmarks.gpu.place import Place

NOT_BY_DEFAULT = ("sanitizer",)  # takes minutes
ALWAYS = ("targets",)  # judges what the other parts measured


def run(parts: Parts, deadline: float, journal: Journal, patient: bool = True) -> tuple[list[str], list[str]]:
    """Run the parts; returns notes on skipped or failed ones, and what is left if the GPU is lost on the way.

    patient: leave a part the time that it takes, where times are no figures.
    """
    notes: list[str] = []
    names = [*parts]
    for name in names:
        began = time.perf_counter()
        if began > deadline:
            notes.append(f"{name} was skipped: the time budget is used up (--budget)")
            continue
        journal.start(name)
        latest = float("inf") if patient else began + PATIENCE * EXPECTED.get(name, 10)
        cut = False
        try:
            for row in parts[name]():
                journal.add(name, row)
                print(json.dumps({"part": name, **row}), flush=True)
                cut = time.perf_counter() > latest
                if cut:
                    notes.append(
                        f"{name} was cut off after {len(journal.rows[name])} rows: {PATIENCE} times its seconds"
                    )
                    break
        except Exception as fault:  # reported in the notes and by the exit status
            notes.append(f"{name} FAILED after {len(journal.rows[name])} rows: {type(fault).__name__}: {fault}")
            journal.add(name, {"failed": f"{type(fault).__name__}: {fault}", "right": False})
            print(f"# {notes[-1]}", file=sys.stderr, flush=True)
            if context_lost(fault):
                return notes, names[names.index(name) + 1 :]
        if not cut and not any("failed" in row for row in journal.rows[name]):
            journal.finish(name, time.perf_counter() - began)
        print(f"# {name}: {time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)
    return notes, []


def environment(place: Place) -> Row:
    """Date, commit, device and versions of this run."""
    import torch

    from qvl_kernels import report
    from qvl_runtime.host import device_name

    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "not installed"
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "commit": git.stdout.strip(),
        "device": device_name(place.device),
        "torch": torch.__version__,
        "triton": triton,
        "python": platform.python_version(),
        **report(place.device),
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line, with the names of the parts to run as `only`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of the results (default: out/gpu; of a dry run, out/dry)")
    parser.add_argument("--golden", type=Path, help="what the original computes: tiny/, lm_*.safetensors")
    parser.add_argument("--only", help="parts, separated by commas")
    parser.add_argument("--budget", type=float, default=230, help="start no part after this many seconds")
    parser.add_argument("--resume", type=Path, help="go on from this suite.jsonl (default: the one in --out)")
    parser.add_argument("--dry-run", choices=("bind", "compile"), help="pretend a GPU: shapes but no numbers, no times")
    parser.add_argument("--again", action="store_true", help="run parts that are done, too")
    options = parser.parse_args(arguments)
    options.out = options.out or Path("out/gpu" if options.dry_run is None else "out/dry")
    options.only = (
        options.only.split(",") if options.only else [name for name in EXPECTED if name not in NOT_BY_DEFAULT]
    )
    unknown = [name for name in options.only if name not in EXPECTED]
    if unknown:
        parser.error(f"there is no part {unknown[0]!r}; there are {', '.join(EXPECTED)}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suite; returns the exit status."""
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    lines = options.out / "suite.jsonl"
    if options.resume is not None and not lines.exists():
        shutil.copyfile(options.resume, lines)
    journal = Journal(lines)
    with ExitStack() as stack:
        if options.dry_run is None:
            place = Place.find()
            parts = parts_of(place, options.golden, lambda: journal.rows)
        else:
            from benchmarks.gpu.dry_run import pretended_gpu
            from benchmarks.gpu.dry_run.parts import counted_parts

            bound = stack.enter_context(pretended_gpu(options.dry_run == "compile"))
            place = replace(Place.find(), layers=1)  # more would run the same lines
            parts = counted_parts(parts_of(place, options.golden, lambda: journal.rows), bound)
        return measure(options, place, parts, journal)


def measure(options: argparse.Namespace, place: Place, parts: Parts, journal: Journal) -> int:
    """Run the selected parts, those that are left; returns the exit status."""
    going_on = journal.begin(environment(place) | {"dry_run": options.dry_run})
    left = [name for name in options.only if options.again or name not in journal.done or name in ALWAYS]
    if going_on and len(left) < len(options.only):
        print(f"# done before: {', '.join(name for name in options.only if name not in left)}", file=sys.stderr)
    deadline = time.perf_counter() + options.budget
    patient = place.tiny or options.dry_run is not None
    notes, lost = run({name: parts[name] for name in left}, deadline, journal, patient)
    if options.dry_run is not None:
        notes = ["A GPU was pretended: there are no numbers behind the shapes, and no time below is a figure.", *notes]
    write(options.out, journal, parts, place, notes)
    if lost:
        print(f"# the GPU is lost; a new process runs {', '.join(lost)}", file=sys.stderr, flush=True)
        seconds = str(max(0.0, deadline - time.perf_counter()))
        command = [sys.executable, "-m", "benchmarks.gpu.suite", "--out", str(options.out), "--budget", seconds]
        command += ["--golden", str(options.golden)] if options.golden else []
        subprocess.run([*command, "--only", ",".join(lost)], check=False)
        return 1
    rows = [row for part in journal.rows.values() for row in part]
    return 1 if any(row.get("right") is False for row in rows) else 0


def write(out: Path, journal: Journal, parts: Parts, place: Place, notes: list[str]) -> None:
    """Write suite.json and suite.md of everything in the journal."""
    if place.tiny:
        notes = ["There is no GPU here: tiny sizes in Triton's interpreter, and no time below is a figure.", *notes]
    rows = {name: journal.rows[name] for name in parts if name in journal.rows}
    setting = journal.setting | {"seconds": {name: round(seconds, 1) for name, seconds in journal.done.items()}}
    (out / "suite.json").write_text(json.dumps({"setting": setting, "notes": notes, "parts": rows}, indent=1))
    (out / "suite.md").write_text(page(setting, rows, notes))
    print(f"# written to {out}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
