"""Measure every op and compare with the last committed run: `python -m benchmarks.kernels`.

    python -m benchmarks.kernels                  # to out/kernels.json, ratios against benchmarks/results/kernels.json
    python -m benchmarks.kernels --keep           # and make this run the one to compare with
    python -m benchmarks.kernels --quick          # sizes divided by 16, one round: does it still run?

A ratio above 1 is a kernel faster than the baseline's. Another column holds torch's time over ours in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BASELINE = ROOT / "benchmarks" / "results" / "kernels.json"
OUT = ROOT / "out" / "kernels.json"


def measure(out: Path, quick: bool) -> None:
    """Run the benchmarks in their own process. Raises `SystemExit` if one of them fails."""
    out.parent.mkdir(parents=True, exist_ok=True)
    options = ["--benchmark-max-time=0.05", "--benchmark-min-rounds=1"] if quick else ["--benchmark-max-time=0.7"]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "benchmarks/kernels",
        "-q",
        "-o",
        "python_files=bench_*.py",
        "--benchmark-disable-gc",
        "--benchmark-quiet",
        f"--benchmark-json={out}",
        *options,
    ]
    environment = os.environ | ({"QVL_BENCH_SCALE": "16"} if quick else {})
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)


def figures(path: Path) -> dict[str, dict[str, Any]]:
    """By case: seconds of ours and of torch, with the spread of ours."""
    by_case: dict[str, dict[str, Any]] = {}
    for bench in json.loads(path.read_text())["benchmarks"]:
        way, stats = bench["params"]["way"], bench["stats"]
        case = by_case.setdefault(bench["group"], {})
        case[way] = stats["median"]
        if way == "ours":
            case |= {"q1": stats["q1"], "q3": stats["q3"], **bench["extra_info"]}
    return by_case


def compared(new: dict[str, dict[str, Any]], old: dict[str, dict[str, Any]]) -> list[list[str]]:
    """One row a case: time, GB/s, Gop/s, torch's time over ours, then over now."""
    rows = []
    for name, now in new.items():
        before = old.get(name, {}).get("ours")
        rows.append(
            [
                name,
                f"{1e6 * now['ours']:,.0f} ({1e6 * now['q1']:,.0f}-{1e6 * now['q3']:,.0f})",
                f"{now['gb_s']:.1f}",
                f"{now['gop_s']:,.0f}",
                f"{now['torch'] / now['ours']:.2f}" if "torch" in now else "",
                f"{before / now['ours']:.2f}" if before else "",
            ]
        )
    return rows


HEADINGS = ("op", "us, median (quartiles)", "GB/s", "Gop/s", "torch / ours", "then / now")


def markdown(rows: list[list[str]]) -> str:
    """A Markdown table of the rows under HEADINGS."""
    lines = [HEADINGS, ["---"] * len(HEADINGS), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Measure, print the comparison, and with `--keep` make this run the baseline."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--keep", action="store_true", help="make this run the one that later ones are compared with")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    measure(args.out, args.quick)
    print(markdown(compared(figures(args.out), figures(BASELINE) if BASELINE.is_file() and not args.quick else {})))
    if args.keep:
        BASELINE.parent.mkdir(exist_ok=True)
        baseline = json.loads(args.out.read_text())
        for bench in baseline["benchmarks"]:
            bench["stats"].pop("data", None)  # every round: 1.8 MB
        BASELINE.write_text(json.dumps(baseline, indent=1) + "\n")


if __name__ == "__main__":
    main()
