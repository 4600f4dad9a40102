"""The whole report, to benchmarks/results/<machine>-<date>/: JSON, a Markdown page and plots.

    python -m benchmarks.report             # nano and the full-size model with random weights: half an hour
    python -m benchmarks.report --quick     # nano alone, little of everything, to out/report: under 3 minutes
    python -m benchmarks.report --only "full-size Int4, fast" --only nano

Each model runs in its own process, three times in turns with the others, so that spreads show how much the machine
drifts in all that time. A model that does not fit this machine is left out, and the page says why.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.bounds import CONTEXTS, MEASURED, bounds
from benchmarks.report.gather import MODELS, QUICK
from benchmarks.report.page import write_page
from benchmarks.report.plots import draw
from benchmarks.report.pool import pooled
from benchmarks.serving import serving
from qvl_runtime.host import free_memory
from qvl_runtime.profile.jsonable import jsonable
from qvl_runtime.profile.run_info import RunInfo
from qvl_runtime.profile.speed import LENGTHS, PUBLISHED
from qvl_runtime.weights.synthetic import SYNTHETIC

ROOT = Path(__file__).resolve().parents[2]


def measured(label: str, quick: bool, again: bool = False) -> dict[str, Any]:
    """The output of `gather` for one model, or why it was left out. again: a pass after the first."""
    needed, free = MODELS[label].memory_gib, free_memory(device()) / 2**30
    if needed > free:
        return {"label": label, "skipped": f"needs {needed:.0f} GiB of memory, and {free:.1f} are free"}
    chosen = [flag for flag, enabled in (("--quick", quick), ("--again", again)) if enabled]
    command = [sys.executable, "-m", "benchmarks.report.gather", label, *chosen]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{label}: {' '.join(command)} ended with code {done.returncode}; its output is above")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def in_turns(labels: Sequence[str], quick: bool, passes: int) -> list[dict[str, Any]]:
    """Every model measured `passes` times, all of them before the next time, and their passes as one."""
    taken: dict[str, list[dict[str, Any]]] = {label: [] for label in labels}
    for number in range(passes):
        for label, records in taken.items():
            if records and "skipped" in records[0]:
                continue
            print(f"pass {number + 1} of {passes}: {label}", file=sys.stderr, flush=True)
            record = measured(label, quick, again=number > 0)
            if number and "skipped" in record:
                print(f"{label}: {record['skipped']}, so this pass leaves it out", file=sys.stderr)
            else:
                records.append(record)
    return [pooled(records) for records in taken.values()]


def device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def computed() -> list[dict[str, Any]]:
    """The computed bounds of GPUs, with the original's published figure on one, and ours on another."""
    published = {
        ("A100-SXM4-80GB", name, context): PUBLISHED[kind, length]
        for name, kind in zip(SYNTHETIC, ("bf16", "int4"), strict=True)
        for context, length in zip(CONTEXTS, LENGTHS, strict=True)
    }
    return [
        {
            **b,
            "published": published.get((b["machine"], b["model"], b["context"])),
            "measured": MEASURED.get((b["model"], b["context"])) if b["machine"].startswith("H100") else None,
        }
        for b in bounds()
    ]


def folder_name(machine: RunInfo) -> str:
    """Such as "intel-r-xeon-r-processor-2-threads-2026-11-22"."""
    name = re.sub(r"[^a-z0-9]+", "-", machine.device.removeprefix("cpu ").lower()).strip("-")
    return f"{name}-{machine.date[:10]}"


def main() -> None:
    """Measure the models and serving, and write the JSON, the plots and the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", action="append", choices=MODELS, help="measure this model; repeat for several")
    parser.add_argument("--passes", type=int, help="how often each model is measured (default 3; 1 with --quick)")
    parser.add_argument("--out", type=Path, help="the folder to write; without it, one named after machine and day")
    args = parser.parse_args()
    began, machine = time.perf_counter(), RunInfo.collect(device())
    out = args.out or (
        ROOT / "out" / "report" if args.quick else ROOT / "benchmarks" / "results" / folder_name(machine)
    )
    out.mkdir(parents=True, exist_ok=True)
    passes = args.passes or (1 if args.quick else 3)
    models = in_turns(args.only or [*(QUICK if args.quick else MODELS)], args.quick, passes)
    print("serving", file=sys.stderr)
    rates, count = ([float("inf")], 6) if args.quick else ([2.0, 5.0, 10.0, 20.0, float("inf")], 60)
    report = {
        "machine": jsonable(machine),
        "command": " ".join(["python -m benchmarks.report", *sys.argv[1:]]),
        "quick": args.quick,
        "passes": passes,
        "models": models,
        "serving": serving.measure({}, rates, count, 6),
        "bounds": computed(),
    }
    report["minutes"] = (time.perf_counter() - began) / 60
    (out / "report.json").write_text(json.dumps(report, indent=1, default=str) + "\n")
    images = draw(report, out)
    write_page(report, images, out / "README.md")
    print(f"{out / 'README.md'}: {report['minutes']:.1f} minutes", file=sys.stderr)


if __name__ == "__main__":
    main()
